import re
import shutil

import pytest

from modular_star_encoder.demo.page import ExitCosts, circumstances, cost_card, short_name
from modular_star_encoder.inference import PROFILE_NAME
from modular_star_encoder.inference.checkpoints import checkpoint_checksum
from tests.demo.conftest import profile_of


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "my-model")


def costs_of(folder, **options):
    fingerprint = checkpoint_checksum(folder)
    profile_of(options.pop("fingerprint", fingerprint), **options).save(folder / PROFILE_NAME)
    return ExitCosts.of(str(folder), fingerprint)


def test_every_figure_is_the_one_of_the_checkpoints_own_profile(copy):
    costs = costs_of(copy)
    assert re.findall("<b>(.*?)</b>", cost_card(costs, 1)) == ["1.2 ms", "101 MB", "1.1 M", "0.111"]
    assert re.findall("<b>(.*?)</b>", cost_card(costs, 4)) == ["4.9 ms", "104 MB", "4.4 M", "0.444"]
    assert re.findall(r"width:([\d.]+)%", cost_card(costs, 1)) == ["25.0", "97.1", "25.0", "25.0"]
    assert "<script>" not in cost_card(ExitCosts(costs.profile.with_quality("<script>", {1: 0.5})), 1)
    assert "1 × 32 tokens" in circumstances(costs)
    assert "2026-01-02" in circumstances(costs)


def test_a_checkpoint_without_a_profile_of_its_weights_says_so_and_how_to_make_one(copy):
    card = cost_card(ExitCosts.of(str(copy), checkpoint_checksum(copy)), 1)
    assert "my-model has no exit profile" in card
    assert "mose profile my-model" in card
    assert short_name("/gone/from/here/model") == "model"  # the page may be public
    assert short_name("someone/model") == "someone/model"
    assert not re.search(r"\d ms|MB", card)
    assert "other weights" in cost_card(costs_of(copy, fingerprint="of another model"), 1)
    (copy / PROFILE_NAME).write_text("{}")
    assert "can&#x27;t be read" in cost_card(ExitCosts.of(str(copy), "f"), 1)


def test_an_unmeasured_quality_or_exit_and_times_of_another_machine_are_named_as_such(copy):
    costs = costs_of(copy, exits=(1,), quality=False)
    assert "--quality" in cost_card(costs, 1)
    assert "exit 4" in cost_card(costs, 4)
    assert "another machine" not in circumstances(costs)
    elsewhere = {"processor": "another", "threads": 99}
    assert "another machine" in circumstances(costs_of(copy, machine=elsewhere))
