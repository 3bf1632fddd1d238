import json
import logging
import os
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from modular_star_encoder.inference.checkpoints import load_checkpoint, slice_checkpoint, stored_license
from modular_star_encoder.inference.encoders import load_encoder
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining, ModularStarEncoderModel
from tests.errors import raises
from tests.published.stand_in import write_stand_in
from tests.tiny import EXIT_LAYERS, REPOSITORY, cache_repository, change_json, run, tiny_model, tiny_tokenizer

TEXTS = ["add two numbers", "def subtract(first, second):\n    return first - second", "x"]


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def config(folder):
    return json.loads((folder / "config.json").read_text())


def load(folder, **options):
    return SentenceTransformer(str(folder), device="cpu", **options)


@pytest.mark.parametrize("exit_layer", EXIT_LAYERS)
def test_encode_at_an_exit_equals_encode_of_the_slice_bit_for_bit(checkpoint, tmp_path, exit_layer):
    sliced, whole = slice_checkpoint(checkpoint, exit_layer, tmp_path / "slice"), load(checkpoint)
    expected = whole.encode(TEXTS, prompt_name="query", exit_layer=exit_layer)
    for model in (load(sliced), load(checkpoint, config_kwargs={"exit_layer": exit_layer})):
        assert np.array_equal(model.encode(TEXTS, prompt_name="query"), expected)
    assert expected.shape == (3, 16)
    is_deepest = exit_layer == max(EXIT_LAYERS)
    assert np.allclose(expected, whole.encode(TEXTS, prompt_name="query"), atol=1e-2) == is_deepest


def test_token_embeddings_of_short_texts_hold_no_padding(checkpoint):
    model = load(checkpoint)
    lengths = [len(model.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert [len(one) for one in model.encode(TEXTS, output_value="token_embeddings")] == lengths


def test_a_slice_has_its_shallower_exits_names_its_parent_and_a_slice_of_it_is_the_slice(checkpoint, tmp_path):
    sliced, direct = (slice_checkpoint(checkpoint, k, tmp_path / str(k)) for k in (2, 1))
    assert np.array_equal(load(sliced).encode(TEXTS, exit_layer=1), load(checkpoint).encode(TEXTS, exit_layer=1))
    twice = slice_checkpoint(sliced, 1, tmp_path / "twice")
    assert (direct / "model.safetensors").read_bytes() == (twice / "model.safetensors").read_bytes()
    first, second = config(sliced), config(twice)
    assert (first["num_hidden_layers"], first["exit_layers"], first["exit_norm"]) == (2, [1, 2], "none")
    assert (first["parent_num_hidden_layers"], first["parent_exit_layers"]) == (4, [1, 2, 4])
    assert (first["exit_layer"], first["parent_model"], second["parent_model"]) == (None, "model", "model")
    trained = shutil.copytree(checkpoint, tmp_path / "run" / "model")
    (trained / "training_log.json").write_text("{}")
    named = slice_checkpoint(trained, 1, tmp_path / "named")  # after the run, not after its folder model/
    assert config(named)["parent_model"] == "run"
    assert first["auto_map"] == second["auto_map"]


@pytest.mark.parametrize(
    ("dtype", "loaded"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float32", "bfloat16")],
)
def test_a_slice_is_stored_in_the_dtype_of_its_parents_weights_and_loaded_in_the_one_of_its_configuration(
    copy, tmp_path, dtype, loaded
):
    change_json(copy, dtype=loaded)
    dtype, loaded = getattr(torch, dtype), getattr(torch, loaded)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    sliced = slice_checkpoint(copy, 2, tmp_path / "slice")
    stored = load_file(sliced / "model.safetensors")
    assert all(tensor.dtype == dtype and torch.equal(tensor, weights[name]) for name, tensor in stored.items())
    assert AutoModel.from_pretrained(sliced).dtype == loaded
    assert np.array_equal(load(sliced).encode(TEXTS), load(copy).encode(TEXTS, exit_layer=2))


@pytest.mark.parametrize(
    ("card", "own", "kept"),
    [
        ("---\ntags: [a]\nlicense: mit\n---\nlicense: no\n", "bsd", "mit"),
        ("# A card\n---\nlicense: no\n---\n", "bsd", "bsd"),
        ("---\ntags: [a]\n---\n", None, None),
        ("---\nlicense: other\n---\n", "bsd", None),
        ("---\nlicense: other\n---\n", ["mit"], None),
    ],
)
def test_a_slice_of_a_slice_has_the_licence_in_the_card_or_the_configuration_of_its_parent(
    copy, tmp_path, card, own, kept
):
    change_json(copy, parent_license=own)
    (copy / "README.md").write_text(card)
    sliced = slice_checkpoint(copy, 2, tmp_path / "slice")
    assert stored_license(slice_checkpoint(sliced, 1, tmp_path / "twice")) == kept


def test_only_exit_keeps_one_head_and_the_same_embedding(checkpoint, tmp_path):
    sliced = slice_checkpoint(checkpoint, 2, tmp_path / "slice", only_exit=True)
    assert set(AutoModel.from_pretrained(sliced).projection_heads) == {"2"}
    assert np.array_equal(load(sliced).encode(TEXTS), load(checkpoint).encode(TEXTS, exit_layer=2))


def change_tensors(folder, drop=(), **added):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor.clone() for name, tensor in tensors.items() if not name.startswith(tuple(drop))}
    save_file(kept | added, folder / "model.safetensors", metadata={"format": "pt"})


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def change(**changes):
    return partial(change_json, **changes)


@pytest.fixture
def reported(monkeypatch):
    """A list that gets the records that transformers' loader of models logs."""
    records = []
    monkeypatch.setattr(logging.getLogger("transformers.modeling_utils"), "callHandlers", records.append)
    return records


PANIC = {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8A"}  # its trie refers to places beyond its end
HEAD, LAYER = "projection_heads.2.", "model.layers.4.mlp.c_fc.bias"
DAMAGES = [
    (write("model.safetensors", "not a tensor"), "damaged", ""),
    (lambda folder: change_tensors(folder, drop=[HEAD]), "tensors", f"4 tensors are missing, such as {HEAD}"),
    (lambda folder: change_tensors(folder, **{LAYER: torch.ones(2)}), "tensors", f"left over, such as {LAYER}"),
    *((change(**{size: 2**16}), "shapes", "") for size in ("vocab_size", "intermediate_size")),
    (change(num_hidden_layers=2, exit_layers=[1, 2]), "tensors", "left over"),
    (change(exit_layers=[2, 1]), "damaged", "[2, 1]"),
    (change(exit_norm="lst"), "damaged", "('last', 'all', 'none'), got lst"),
    (change(model_type="bert"), "other_model", "'bert'"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer", ""),
    (write("tokenizer.json", "{}"), "tokenizer", ""),
    (write("tokenizer_config.json", '{"a": "b'), "tokenizer", ""),
    (partial(change_json, name="tokenizer.json", normalizer=PANIC), "tokenizer", "beyond its end"),
    (write("tokenizer_config.json", '{"pad_token": ""}'), "tokenizer", "The pad_token ''"),
    (write("tokenizer_config.json", '{"extra_special_tokens": {"pad_token": ""}}'), "tokenizer", "The pad_token ''"),
    (write("config.json", '{"a":' * 5000 + "1" + "}" * 5000), "damaged", ""),
]


@pytest.mark.parametrize(("damage", "fault", "value"), DAMAGES)
@pytest.mark.parametrize("use", [load_checkpoint, lambda copy: slice_checkpoint(copy, 2, copy.parent / "slice")])
def test_a_damaged_checkpoint_is_one_sentence_and_nothing_is_written(
    copy, damage, fault, value, use, reported, monkeypatch
):
    damage(copy)
    if fault == "shapes":  # refused before memory is filled
        monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    with raises(f"checkpoint.{fault}", copy, value.format(copy)) as error:
        use(copy)
    assert "\n" not in str(error.value)
    assert not reported  # transformers' table of tensors
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_only_the_layers_and_heads_up_to_the_exit_are_loaded(copy):
    change_tensors(copy, drop=[HEAD])
    assert load_checkpoint(str(copy), exit_layer=1)[0].config.num_hidden_layers == 1
    with pytest.raises(ValueError, match="its exits are 1, 2, 4"):
        load_checkpoint(copy, exit_layer=3)


def test_a_model_of_another_class_is_not_sliced(copy, tmp_path):
    change_json(copy, architectures=["TheirModel"])
    with raises("checkpoint.other_class", "TheirModel"):
        slice_checkpoint(copy, 2, tmp_path / "slice")


def test_a_slice_of_a_repository_is_a_sentence_transformer_too(copy, tmp_path, monkeypatch):
    change_json(copy, "config_sentence_transformers.json", prompts={"query": "find: "})
    cache_repository(copy, tmp_path / "hub", monkeypatch)
    from_folder = slice_checkpoint(copy, 2, tmp_path / "from-folder")
    from_hub = slice_checkpoint(REPOSITORY, 2, tmp_path / "from-hub")
    files = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (from_folder, from_hub)]
    assert files[0] == files[1]
    assert load(from_hub).prompts["query"] == "find: "


@pytest.mark.parametrize("content", ["", "[1]", "{}"])
def test_a_repository_with_an_adapter_is_one_sentence(copy, tmp_path, monkeypatch, content):
    write("adapter_config.json", content)(copy)
    cache_repository(copy, tmp_path / "hub", monkeypatch)
    for use in (load_checkpoint, load_encoder):
        with raises("checkpoint.adapter", REPOSITORY, "adapter_config.json"):
            use(REPOSITORY)


def test_a_published_checkpoint_is_sliced_into_our_layout(tmp_path):
    write_stand_in(tmp_path / "published", "finetuned")
    full = AutoModel.from_pretrained(tmp_path / "published", dtype=torch.float32)
    exit_layer = full.config.exit_layers[1]
    sliced = slice_checkpoint(tmp_path / "published", exit_layer, tmp_path / "slice")
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    found = run(AutoModel.from_pretrained(sliced, dtype=torch.float32), **batch).sentence_embedding
    assert torch.equal(found, run(full, **batch, exit_layer=exit_layer).sentence_embedding)


@pytest.mark.parametrize("name", [None, 5, b"mose-code", ["mose-code"]])
def test_a_checkpoint_that_is_neither_name_nor_path_is_one_sentence(name, tmp_path):
    for use in (load_checkpoint, lambda name: slice_checkpoint(name, 1, tmp_path / "out")):
        with raises("checkpoint.name", name, "mose-code"):
            use(name)


def test_a_missing_folder_a_file_in_its_place_and_missing_files_are_named(copy, tmp_path):
    for path in (tmp_path / "no", str(tmp_path / "no"), "./no-such-folder", "no-such-folder", copy / "config.json"):
        with pytest.raises(FileNotFoundError, match="There is no checkpoint folder"):
            load_checkpoint(path)
    for name, problem in (("model.safetensors", "has no weights"), ("config.json", "has no config.json")):
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=problem):
            load_checkpoint(copy)


def _pipe(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def _index(folder, shard):
    (folder / "model.safetensors").rename(folder.parent / "foreign.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))


def _link(folder, name):
    (folder.parent / "secret").write_text("{}")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.parent / "secret")


def _tensors(folder, header, size=0):
    data = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + size)


EMPTY, HUGE = ({"dtype": "U8", "shape": [end], "data_offsets": [0, end]} for end in (0, 2**40))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (change(**{f"k{n}": n for n in range(20_000)}), "its config.json has more than"),
        (partial(_tensors, header={f"t{n}": EMPTY for n in range(20_000)}), "has a header of more than"),
        (partial(_tensors, header={"t" * 2**21: EMPTY}), "has a header of more than"),
        (partial(_tensors, header={"t": EMPTY}, size=2**40), "has more bytes than its header says"),
        (partial(_tensors, header={"t": HUGE}, size=2**40), "or more than"),
        (partial(_pipe, name="tokenizer.json"), "its tokenizer.json is not a file"),
        (partial(_pipe, name="other.safetensors"), "its other.safetensors is not a file"),
        (partial(_index, shard="../foreign.safetensors"), "its weight file ../foreign.safetensors"),
        (partial(_index, shard="/dev/zero"), "its weight file /dev/zero"),
        (partial(_index, shard=["a"]), "its weight file"),
        (partial(_link, name="modules.json"), "its modules.json is a link to a file outside"),
        (partial(_link, name="1_Pooling/config.json"), "its config.json is a link to a file outside"),
        (partial(_link, name="additional_chat_templates/x.jinja"), "its x.jinja is a link to a file outside"),
        (write("adapter_config.json", "{}"), "merge the adapter first"),
    ],
)
def test_files_too_large_to_read_in_seconds_pipes_and_files_outside_the_folder_are_reported_unread(
    copy, change, problem, monkeypatch
):
    change(copy)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    with pytest.raises(FileNotFoundError, match=re.escape(problem)):
        load_checkpoint(copy)


def test_a_link_to_the_blobs_of_the_hub_s_cache_is_followed_and_to_other_blobs_is_not(copy):
    root = copy.parent
    for name in ("blobs", "snapshots", "other"):
        (root / name).mkdir()
    snapshot = copy.rename(root / "snapshots" / "1")
    (snapshot / "config.json").rename(root / "blobs" / "1")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    load_checkpoint(snapshot)
    (root / "blobs").rename(root / "other" / "blobs")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../other/blobs/1")
    with pytest.raises(FileNotFoundError, match="outside"):
        load_checkpoint(snapshot)


def test_a_configuration_chooses_neither_other_weights_nor_an_attention(copy):
    change_json(copy, transformers_weights="adapter_model.bin", attn_implementation="flex_attention")
    loaded = load_checkpoint(copy)[0].config
    assert loaded._attn_implementation == "sdpa"
    assert not hasattr(loaded, "transformers_weights")


@pytest.mark.parametrize("model_class", [ModularStarEncoderModel, ModularStarEncoderForPreTraining])
def test_a_model_without_projection_heads_is_an_error(tmp_path, model_class, reported):
    torch.manual_seed(0)
    model_class(tiny_model().config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with raises("checkpoint.not_retrieval", tmp_path):
        load_checkpoint(tmp_path)
    assert not reported


def test_a_repository_that_the_hub_does_not_give_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="owner/none is not a local folder and cannot be downloaded from the Hub"):
        load_checkpoint("owner/none")
