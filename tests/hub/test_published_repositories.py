"""From checkpoints to a Hub and back: whoever downloads what was published gets the embeddings of its source."""

import json
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, constants
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

import modular_star_encoder_cli as cli
from modular_star_encoder.data.prompts import text_prompt
from modular_star_encoder.evaluation.checkpoint import load_checkpoint
from modular_star_encoder.hub import clean_process
from modular_star_encoder.hub.publishing import publish
from modular_star_encoder.hub.reloading import ReloadRequest, reload_all_in_clean_process
from modular_star_encoder.hub.verification import TEXTS
from modular_star_encoder.training.adapters import add_adapters, merged_model
from tests.hub.repositories import finetuned_entry, manifest, write_finetuned, write_pretrained
from tests.hub.stand_in_hub import TOKEN, StandInHub
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow


def train_one_step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings.sum().backward()
    optimizer.step()
    return model


def write_lora_tuned(folder):
    """A model tuned by adapters, which are saved and merged as `mose finetune` does."""
    train_one_step(add_adapters(tiny_model(), {"r": 4})).save_pretrained(folder / "adapter")
    merged_model(tiny_model(), folder / "adapter").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def write_fsdp2_saved(folder):
    """A model that FSDP2 had split, saved as it was, without a tokenizer."""
    init_process_group("gloo", init_method=f"file://{folder.parent / 'rendezvous'}", rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), tiny_model()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train_one_step(model).save_pretrained(folder)
    finally:
        destroy_process_group()
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        "pretrained": write_pretrained(root / "pretrained"),
        "finetuned": write_finetuned(root / "model"),
        "lora": write_lora_tuned(root / "lora"),
        "fsdp2": write_fsdp2_saved(root / "fsdp2"),
    }


@pytest.fixture(scope="module")
def plan(sources):
    slices = [{"name": f"tiny-{k}", "slice_of": "tiny", "exit_layer": k, "only_exit": True} for k in EXIT_LAYERS]
    entries = [
        {"name": "tiny-pretrained", "checkpoint": str(sources["pretrained"])},
        finetuned_entry(sources["finetuned"], trained_from="tiny-pretrained"),
        *slices,
        {"name": "tiny", "branch": "exit-2", "slice_of": "tiny", "exit_layer": 2},
        {"name": "tiny-lora", "checkpoint": str(sources["lora"])},
        {"name": "tiny-fsdp2", "checkpoint": str(sources["fsdp2"]), "tokenizer": str(sources["finetuned"])},
    ]
    return manifest(entries)


@pytest.fixture(scope="module")
def hub(plan, sources):
    """A Hub that holds what one call published, and what a Trainer pushed."""
    with StandInHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        hub.publications = publish(
            plan, upload=True, api=HfApi(endpoint=hub.endpoint, token=TOKEN), progress=False, private=True
        )
        push_by_trainer(hub, sources["finetuned"], patch)
        yield hub


def push_by_trainer(hub, source, patch):
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    model, tokenizer = load_checkpoint(source)
    arguments = TrainingArguments(
        source.parent / "trainer", hub_model_id="me/by-trainer", report_to="none", use_cpu=True
    )
    Trainer(model, arguments, processing_class=tokenizer).push_to_hub(tags=["code"])


def snippets(card):
    return re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def home(hub, tmp_path_factory):
    """A cache of the Hub that a stranger filled by running every snippet of every card."""
    home = tmp_path_factory.mktemp("home")
    cards = {
        f"{name} {branch}": snippets(hub.files(name, branch)["README.md"].decode())
        for name, repository in hub.repositories.items()
        for branch in repository.branches
        if name != "me/by-trainer"
    }
    assert {name: len(codes) for name, codes in cards.items()} == {
        "me/tiny-pretrained main": 4,
        "me/tiny main": 3,
        "me/tiny exit-2": 3,
        "me/tiny-lora main": 3,
        "me/tiny-fsdp2 main": 3,
        **{f"me/tiny-{k} main": 2 for k in EXIT_LAYERS},
    }
    # One with a single exit has no choice to show; a Trainer writes a card of its own.
    load = 'SentenceTransformer("me/by-trainer", trust_remote_code=True)'
    cards["me/by-trainer main"] = [f"from sentence_transformers import SentenceTransformer\n{load}"]
    (home / "cards.json").write_text(json.dumps(cards))
    script = Path(__file__).with_name("run_snippets.py")
    result = subprocess.run(
        [sys.executable, "-P", script, clean_process.__file__, home / "cards.json"],
        env=hub.environment(home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-3000:]
    home.joinpath("output").write_text(result.stdout)
    return home


def test_one_call_publishes_every_repository_and_branch(hub):
    assert [one.repository for one in hub.publications] == [
        "me/tiny-pretrained",
        "me/tiny",
        *(f"me/tiny-{k}" for k in EXIT_LAYERS),
        "me/tiny",
        "me/tiny-lora",
        "me/tiny-fsdp2",
    ]
    assert all(one.uploaded for one in hub.publications)
    for name in hub.repositories:
        assert {"config.json", "model.safetensors", "modeling_modular_star_encoder.py"} <= set(hub.files(name))
        assert (
            not [path for path in hub.files(name) if path.endswith((".bin", ".pt", ".pkl"))] or name == "me/by-trainer"
        )


def test_the_snippets_of_the_cards_print_what_they_say(home):
    output = dict(re.findall(r"^# (.+)\n((?:[^#].*\n)*)", home.joinpath("output").read_text(), re.M))
    assert output["me/tiny main 2"] == "1\n(1, 16)\n"
    assert output["me/tiny exit-2 2"] == "1\n(1, 16)\n"
    assert re.fullmatch(r"torch\.Size\(\[1, \d+, 32\]\)\n", output["me/tiny-pretrained main 1"])
    assert float(re.search(r"[-\d.]+", output["me/tiny-2 main 0"])[0]) <= 1


def test_strangers_get_the_embeddings_of_the_source_offline_from_the_cache(hub, home, sources):
    prompt, model = text_prompt(), "me/tiny"
    wanted = {
        (model, None): ("finetuned", EXIT_LAYERS),
        (model, "exit-2"): ("finetuned", (1, 2)),
        **{(f"me/tiny-{k}", None): ("finetuned", (k,)) for k in EXIT_LAYERS},
        ("me/tiny-lora", None): ("lora", EXIT_LAYERS),
        ("me/tiny-fsdp2", None): ("fsdp2", EXIT_LAYERS),
    }
    requests = [ReloadRequest(name, TEXTS, prompt, exits, branch) for (name, branch), (_, exits) in wanted.items()]
    pushed = ReloadRequest("me/by-trainer", TEXTS, prompt)
    asked = len(hub.requests)
    environment = hub.environment(home, HF_HUB_OFFLINE="1")
    *reloaded, by_trainer = reload_all_in_clean_process([*requests, pushed], progress=False, environment=environment)
    assert len(hub.requests) == asked
    seen = set()
    for (source, exits), found in zip(wanted.values(), reloaded, strict=True):
        expected = embeddings(sources[source], sources["finetuned"], exits)
        seen.add(expected[exits[-1]].tobytes())
        for k in exits:
            np.testing.assert_allclose(found.exits[k], expected[k], atol=1e-6)
        np.testing.assert_allclose(found.auto_model, expected[exits[-1]], atol=1e-6)
    assert len(seen) == 5, "three exits, and two models that learned something"
    own = embeddings(sources["finetuned"], sources["finetuned"], (4,))[4]
    np.testing.assert_allclose(by_trainer.auto_model, own, atol=1e-6)


def embeddings(source, tokenizer, exits):
    """By our own code, from the folder that was published."""
    from modular_star_encoder.data.tokenizer import load_tokenizer
    from modular_star_encoder.modeling import ModularStarEncoderForRetrieval

    model = ModularStarEncoderForRetrieval.from_pretrained(source).eval()
    batch = load_tokenizer(tokenizer)([text_prompt() + text for text in TEXTS], padding=True, return_tensors="pt")
    with torch.inference_mode():
        return {k: model(**batch, exit_layer=k).sentence_embedding.numpy() for k in exits}


def test_the_command_says_what_would_change_and_uploads_when_told(hub, plan, sources, capsys, monkeypatch):
    monkeypatch.setattr("modular_star_encoder.hub.publishing.HfApi", lambda: HfApi(endpoint=hub.endpoint, token=TOKEN))
    monkeypatch.setattr("modular_star_encoder.hub.publishing.verify_repositories", lambda *_, **__: [])
    report = str(sources["finetuned"].parent / "report.json")
    folder = [str(sources["finetuned"]), "--repository", "me/new", "--evaluation", report]
    assert cli.main(["publish", *folder]) == 0
    assert capsys.readouterr().out.endswith("nothing was uploaded: a dry run\n")
    assert "me/new" not in hub.repositories
    assert cli.main(["publish", *folder, "--upload", "--public"]) == 0
    assert f"revision {hub.commits('me/new')[0]}" in capsys.readouterr().out
    assert not hub.repositories["me/new"].private
    assert cli.main(["card", *folder]) == 0
    assert capsys.readouterr().out == hub.files("me/new")["README.md"].decode()
