import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import HfApi, constants

import modular_star_encoder.cli.main as cli
from modular_star_encoder.data.prompts import text_prompt
from modular_star_encoder.data.tokenizer import load_tokenizer
from modular_star_encoder.hub import publishing, subprocess_check
from modular_star_encoder.hub.publishing import TEXTS, publish
from modular_star_encoder.hub.subprocess_check import ReloadRequest
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from tests.hub.stand_in_hub import TOKEN, StandInHub
from tests.tiny import EXIT_LAYERS, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(plan, sources):
    """A Hub with the repositories that one call published, and one that a Trainer pushed."""
    with StandInHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        publish(plan, upload=True, api=HfApi(endpoint=hub.endpoint, token=TOKEN), progress=False)
        folder = sources["finetuned"].parent / "trainer"
        run_script(hub, folder, "push_by_trainer", sources["finetuned"], folder, "me/by-trainer")
        yield hub


def run_script(hub, home, name, *arguments):
    """Run a function of scripts.py in a process whose only Hub is `hub`; return its output."""
    command = [sys.executable, "-P", Path(__file__).with_name("scripts.py"), name, *arguments]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    result = subprocess.run(command, env=hub.environment(home), check=False, **options)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-3000:]
    return result.stdout


def snippets(card):
    return re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)


OFFLINE = {
    ("me/tiny", "main"): EXIT_LAYERS,
    ("me/tiny", "exit-2"): (1, 2),
    **{(f"me/tiny-{k}", "main"): (k,) for k in EXIT_LAYERS},
    ("me/by-trainer", "main"): (),
}
"""Repository and branch → the exits besides the deepest; a Trainer writes no file that lets SentenceTransformer
choose one."""


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    """The output of all snippets of all cards, and embeddings computed offline after them."""
    folder = tmp_path_factory.mktemp("stranger")
    cards = {
        f"{name} {branch}": snippets(hub.files(name, branch)["README.md"].decode())
        for name, repository in hub.repositories.items()
        for branch in repository.branches
    }
    # A Trainer writes a card of its own; these repositories have to be in the cache, too.
    load = 'SentenceTransformer("me/by-trainer", trust_remote_code=True)'
    cards["me/by-trainer main"] = [f"from sentence_transformers import SentenceTransformer\n{load}"]
    places = ((name, exits, branch) for (name, branch), exits in OFFLINE.items())
    requests = [asdict(ReloadRequest(name, TEXTS, text_prompt(), exits, branch)) for name, exits, branch in places]
    (folder / "requests.json").write_text(json.dumps({"cards": cards, "offline": requests}))
    paths = [subprocess_check.__file__, folder / "requests.json", folder / "result.npz"]
    output = run_script(hub, folder, "run_snippets", *paths)
    return SimpleNamespace(cards=cards, output=output, embeddings=np.load(folder / "result.npz"))


def test_every_snippet_of_every_card_runs_and_prints_what_it_says(stranger):
    assert {name: len(codes) for name, codes in stranger.cards.items()} == {
        "me/tiny-pretrained main": 4,
        "me/tiny main": 3,
        "me/tiny exit-2": 3,
        "me/by-trainer main": 1,
        # One with a single exit has no choice to show.
        **{f"me/tiny-{k} main": 2 for k in EXIT_LAYERS},
    }
    output = dict(re.findall(r"^# (.+)\n((?:[^#].*\n)*)", stranger.output, re.MULTILINE))
    assert output["me/tiny main 2"] == output["me/tiny exit-2 2"] == "1\n(1, 16)\n"
    assert re.fullmatch(r"torch\.Size\(\[1, \d+, 32\]\)\n", output["me/tiny-pretrained main 1"])
    assert -1 <= float(re.search(r"-?[\d.]+", output["me/tiny-2 main 0"])[0]) <= 1


def test_strangers_get_the_embeddings_of_the_source_offline_from_the_cache(stranger, sources):
    expected = embeddings(sources["finetuned"])
    for number, (place, exits) in enumerate(OFFLINE.items()):
        names = {f"exit-{k}": k for k in exits} | {"auto_model": (exits or EXIT_LAYERS)[-1]}
        for name, k in names.items():
            found = stranger.embeddings[f"{number}/{name}"]
            np.testing.assert_allclose(found, expected[k], atol=1e-6, err_msg=f"{place} {name}")


def embeddings(source):
    """Embed with this package, from the folder that was published."""
    model = ModularStarEncoderForRetrieval.from_pretrained(source)
    batch = load_tokenizer(source)([text_prompt() + text for text in TEXTS], padding=True, return_tensors="pt")
    return {k: run(model, **batch, exit_layer=k).sentence_embedding.numpy() for k in EXIT_LAYERS}


def test_the_command_says_what_would_change_and_uploads_when_told(hub, plan, sources, capsys, monkeypatch):
    monkeypatch.setattr(publishing, "HfApi", lambda: HfApi(endpoint=hub.endpoint, token=TOKEN))
    monkeypatch.setattr(publishing, "verify_repositories", lambda *_, **__: {})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    report = str(sources["finetuned"].parent / "report.json")
    folder = [str(sources["finetuned"]), "--repository", "me/new", "--evaluation", report, "--license", "mit"]
    assert cli.main(["publish", *folder]) == 0
    assert capsys.readouterr().out.endswith("a dry run; --upload uploads the changes\n")
    assert "me/new" not in hub.repositories
    assert cli.main(["publish", *folder, "--upload", "--public"]) == 0
    place = f"revision {hub.commits('me/new')[0]} to the public repository {hub.endpoint}/me/new\n"
    assert capsys.readouterr().out.endswith(f"uploaded {place}")
    assert not hub.repositories["me/new"].private
    assert cli.main(["card", *folder]) == 0
    assert capsys.readouterr().out == hub.files("me/new")["README.md"].decode()
