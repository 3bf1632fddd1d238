"""Checkpoints to publish, with figures such as the measuring commands write."""

import hashlib
import json
import shutil

from modular_star_encoder.hub.manifest import Manifest
from modular_star_encoder.inference.checkpoints import checkpoint_checksum
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining
from tests.tiny import EXIT_LAYERS, save_tiny_checkpoint, tiny_model, tiny_profile, tiny_tokenizer

REPOSITORY = "some-org/tiny.star-encoder"


def write_pretrained(folder):
    tiny_model(ModularStarEncoderForPreTraining).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    log = {
        "steps": 150,
        "seconds": 1.5,
        "held_out_repositories": ["a", "b"],
        "recipe": {"corpus": "/home/me", "seed": 0},
    }
    (folder / "training_log.json").write_text(json.dumps(log))
    return folder


def write_finetuned(folder):
    """A fine-tuned checkpoint with its exit profile, and report.json in its parent folder."""
    save_tiny_checkpoint(folder)
    fingerprint = checkpoint_checksum(folder)
    tiny_profile(fingerprint, quality=False).save(folder / "exit_profile.json")
    rows = [row("model", k, 0.1 * k) for k in EXIT_LAYERS] + [row("other", 2, 0.9), row("BM25", None, 0.5)]
    rows[2]["difference"] = None
    table = {"title": "CoSQA", "benchmark": "cosqa", "metric": "mrr", "rows": rows, "reference": "model, exit 4"}
    table |= {"size": "500 queries, 6,267 candidates each", "notes": ["a subset"]}
    report = {"command": "mose evaluate", "checkpoint_checksum": fingerprint, "tables": [table], "cells": []}
    (folder.parent / "report.json").write_text(json.dumps(report))
    return folder


def row(system, exit_layer, value):
    mean = {"value": value, "low": value - 0.02, "high": value + 0.02}
    place = {"retriever": system, "exit_layer": exit_layer, "dimensions": None}
    return {**place, "columns": {"all": mean}, "mean": mean, "others": {}, "difference": {"value": 0.1, "p": 0.5}}


def manifest(repositories, **changes):
    settings = {"namespace": "me", "title": "Tiny", "license": "apache-2.0", "repositories": repositories}
    return Manifest(**settings | changes)


def finetuned_entry(folder, **changes):
    report = str(folder.parent / "report.json")
    return {"name": "tiny", "checkpoint": str(folder), "evaluation": [report], **changes}


def cache_repository(checkpoint, cache):
    """Lay a checkpoint out as a download would: files by their hash, and a snapshot of links to them."""
    repository = cache / f"models--{REPOSITORY.replace('/', '--')}"
    commit = hashlib.sha1(b"a commit", usedforsecurity=False).hexdigest()
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for file in [path for path in checkpoint.rglob("*") if path.is_file()]:
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = repository / "snapshots" / commit / file.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return repository / "snapshots" / commit
