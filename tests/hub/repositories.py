"""Checkpoints to publish, with the files of results that `mose profile` and `mose evaluate` write."""

import json

from modular_star_encoder.hub.manifest import Manifest
from modular_star_encoder.inference.checkpoints import checkpoint_checksum
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining
from tests.tiny import EXIT_LAYERS, save_tiny_checkpoint, tiny_model, tiny_profile, tiny_tokenizer


def write_pretrained(folder):
    tiny_model(ModularStarEncoderForPreTraining).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    log = {"steps": 150, "seconds": 1.5, "held_out_repositories": ["a", "b"]}
    log |= {"recipe": {"corpus": "/home/me", "seed": 0}}
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
