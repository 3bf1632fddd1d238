"""Our configurations: each builds, and has the size that it says."""

import pytest
import torch

from modular_star_encoder import modeling
from modular_star_encoder.hub.manifest import load_manifest
from modular_star_encoder.modeling import ModularStarEncoderConfig
from modular_star_encoder.training.recipes import hub_config_folder, load_config

# Counted, and what the paper calls them.
PAPER = {
    "pretrained": (1_104_091_214, 1e9),
    "finetuned": (1_061_894_144, 1e9),
    "finetuned-4": (163_663_872, 160e6),
    "finetuned-9": (302_700_032, 300e6),
    "finetuned-18": (552_965_120, 550e6),
    "finetuned-27": (803_230_208, 800e6),
}
OURS = {
    "small": (13_346_874, 13e6),
    "mini": (2_868_790, 2.9e6),
    "mose-code": (15_920_512, 16e6),
    "quickstart": (1_495_808, 1.5e6),
}


@pytest.mark.parametrize("name", [*PAPER, *OURS])
def test_a_configuration_builds_on_the_meta_device_and_has_its_size(name):
    config = load_config(name)
    with torch.device("meta"):
        model = getattr(modeling, config.architectures[0])(config)
    exact, named = (PAPER | OURS)[name]
    assert model.num_parameters() == exact
    assert exact == pytest.approx(named, rel=0.11 if name == "pretrained" else 0.07)


def test_every_configuration_is_tried():
    folder = hub_config_folder("small").parent
    assert {path.parent.name for path in folder.glob("*/config.json")} == set(PAPER) | set(OURS)


@pytest.mark.parametrize("exit_layer", [4, 9, 18, 27])
def test_a_cut_configuration_is_what_slicing_the_full_one_gives(exit_layer):
    expected = load_config("finetuned").cut(exit_layer)
    expected.exit_layers = [exit_layer]
    # With one exit, no list of all exits.
    expected.output_all_exits = None
    assert load_config(f"finetuned-{exit_layer}").to_diff_dict() == expected.to_diff_dict()


@pytest.mark.parametrize(("name", "repositories"), [("quickstart", 6), ("small", 6), ("finetuned", 6)])
def test_a_manifest_publishes_every_exit_of_its_model(name, repositories):
    manifest = load_manifest(hub_config_folder(name) / "publish.yaml", ["namespace=me", "license=apache-2.0"])
    assert len(manifest.repositories) == repositories
    exits = ModularStarEncoderConfig.from_pretrained(hub_config_folder(name)).exit_layers
    sliced = [entry.exit_layer for entry in manifest.repositories if entry.only_exit]
    # The deepest exit is the fine-tuned model itself, or a slice without the other heads.
    assert sliced in (exits, exits[:-1])
