"""Published repositories load unmodified, or an error names the tensor; `tests/published` compares their outputs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForSequenceClassification

from modular_star_encoder import modeling
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval, ModularStarEncoderModel
from modular_star_encoder.modeling.published_checkpoints import check_layout, describe
from modular_star_encoder.training.recipes import hub_config_folder
from tests.published.stand_in import SHAPE, describe_variant, tensor_shapes, write_stand_in
from tests.tiny import equal, run, tiny_batch, tiny_model

EXITS = SHAPE["matryoshka_layers"]


@pytest.fixture
def write(tmp_path):
    """Write a float32 stand-in whose config.json wraps two numbers in lists; `edit` changes its tensors."""
    defaults = {"dtype": torch.float32, "listed": ("conditional_size", "hidden_size")}

    def write_repository(kind, edit=None, **options):
        folder = write_stand_in(tmp_path / kind, kind, **defaults | options)
        if edit:
            tensors = load_file(folder / "model.safetensors")
            edit(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write_repository


def drop(name):
    return lambda tensors: tensors.pop(name)


def cut_rows(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def add(name):
    return lambda tensors: tensors.update({name: torch.zeros(2)})


def zero(name, rows=slice(None)):
    return lambda tensors: tensors[name].__setitem__(rows, 0)


def prefix_trunk(tensors):
    for name in [name for name in tensors if name.startswith("starEncoder2.")]:
        tensors[name.replace("starEncoder2.", "starEncoder2.module.")] = tensors.pop(name)


def test_a_fine_tuned_checkpoint_gives_every_exit_and_loads_at_each(write):
    folder = write("finetuned")
    full = AutoModel.from_pretrained(folder)
    assert type(full) is ModularStarEncoderForRetrieval
    assert full.config.exit_layers == EXITS
    embeddings = run(full, **tiny_batch()).projected_pooled_normalized
    assert isinstance(embeddings, list)
    for exit_layer, embedding in zip(EXITS, embeddings, strict=True):
        cut = AutoModel.from_pretrained(folder, exit_layer=exit_layer)
        assert cut.config.num_hidden_layers == exit_layer
        equal(run(cut, **tiny_batch()).sentence_embedding, embedding)


@pytest.mark.parametrize("depth", [2, 3, 6])
@pytest.mark.parametrize("cut_head_index", [0, 2])
def test_a_slice_with_one_head_equals_its_exit_of_the_full_model(write, depth, cut_head_index):
    full = AutoModel.from_pretrained(write("finetuned"))
    cut = AutoModel.from_pretrained(write("finetuned-3", depth=depth, cut_head_index=cut_head_index))
    embedding = run(cut, **tiny_batch()).projected_pooled_normalized
    equal(embedding, run(full, **tiny_batch(), exit_layer=3).sentence_embedding)
    assert cut.config.exit_layers == [3]
    assert cut.config.exit_weight(3) == 3 / 6
    with pytest.raises(ValueError, match="its exits are 3"):
        cut(**tiny_batch(), exit_layer=1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": "head", "transform_norm": "layer_norm", "vocabulary_bias": "predictions.decoder.bias"},
        {"pooler_in_heads": True, "edit": prefix_trunk},
    ],
    ids=["plain", "heads", "pooler_and_trunk"],
)
def test_a_pre_trained_checkpoint_loads_in_every_spelling(write, options):
    folder = write("pretrained", **options)
    loaded, trunk = AutoModelForPreTraining.from_pretrained(folder), AutoModel.from_pretrained(folder)
    masked_lm, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert (type(loaded), type(trunk)) == (modeling.ModularStarEncoderForPreTraining, ModularStarEncoderModel)
    output = run(loaded, **tiny_batch())
    assert output.prediction_logits is output.logits
    equal(run(masked_lm, **tiny_batch()).logits, output.logits)
    equal(output.seq_relationship_logits, output.icc_logits[-1])
    equal(run(trunk, **tiny_batch()).last_hidden_state, output.exit_hidden_states[-1])


@pytest.mark.parametrize(
    ("name", "gap", "as_if"),
    [
        # The first upload has no vocabulary bias; a table of exit vectors may lack the last one.
        ("cls.predictions.bias", drop, zero("cls.predictions.bias")),
        ("cls.conditional_embeddings.weight", cut_rows, zero("cls.conditional_embeddings.weight", -1)),
    ],
)
def test_the_gaps_of_published_uploads_count_as_zeros(write, tmp_path, name, gap, as_if):
    expected = run(AutoModelForPreTraining.from_pretrained(write("pretrained", edit=as_if)), **tiny_batch())
    loaded = AutoModelForPreTraining.from_pretrained(write("pretrained", edit=gap(name)))
    loaded.save_pretrained(tmp_path / "ours")
    for model in (loaded, AutoModelForPreTraining.from_pretrained(tmp_path / "ours")):
        equal(run(model, **tiny_batch()).to_tuple(), expected.to_tuple())


@pytest.mark.parametrize(
    ("called", "kind", "loaded"),
    [
        (ModularStarEncoderModel, "finetuned", ModularStarEncoderModel),
        (modeling.ModularStarEncoderPreTrainedModel, "finetuned", ModularStarEncoderForRetrieval),
        (modeling.ModularStarEncoderPreTrainedModel, "pretrained", modeling.ModularStarEncoderForPreTraining),
    ],
)
def test_a_class_loads_itself_and_the_base_class_what_the_file_fits(write, called, kind, loaded):
    folder = write(kind)
    model = called.from_pretrained(folder, exit_layer=2)
    assert type(model) is loaded
    expected = run(AutoModel.from_pretrained(folder), **tiny_batch(), exit_layer=2).exit_hidden_states
    equal(run(model, **tiny_batch(), exit_layer=2).exit_hidden_states, expected)


def test_arguments_reach_the_configuration(write):
    folder = write("finetuned")
    classifier = modeling.ModularStarEncoderForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert classifier.classifier.out_features == 3
    pretrained = AutoModelForSequenceClassification.from_pretrained(write("pretrained"), num_labels=3)
    assert run(pretrained, **tiny_batch()).logits.shape == (3, 3)
    model = AutoModel.from_pretrained(folder, output_all_exits=False, pooling="lasttoken", dtype=torch.float16)
    assert isinstance(run(model, **tiny_batch()).projected_pooled_normalized, torch.Tensor)
    assert (model.config.pooling, model.dtype) == ("lasttoken", torch.float16)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("starEncoder2.layers.1.mlp.c_fc.bias"), r"model\.layers\.1\.mlp\.c_fc\.bias .* is missing"),
        (drop("starEncoder2.module.projection_heads.1.0.weight"), r"projection_heads\.2\.dense\.weight .* is missing"),
        (cut_rows("starEncoder2.embed_tokens.weight"), r"embed_tokens\.weight has shape \[\d+, 32\] instead of"),
        (add("starEncoder2.layers.0.extra"), r"starEncoder2\.layers\.0\.extra is unexpected"),
        (add("starEncoder2.module.norm.bias"), r"norm\.bias .* under two names"),
        (add("starEncoder2.layers.6.extra"), "7 layers"),
        (add("starEncoder2.module.projection_heads.5.0.bias"), "6 projection heads"),
    ],
)
def test_a_gap_in_a_published_file_is_an_error_that_names_it(write, edit, message):
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(write("finetuned", edit=edit))


@pytest.mark.parametrize("model_class", [ModularStarEncoderModel, ModularStarEncoderForRetrieval])
@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (drop("model.layers.1.mlp.c_fc.bias"), "missing"),
        (add("model.layers.0.extra"), "unexpected"),
        (cut_rows("model.layers.1.mlp.c_fc.bias"), "size"),
    ],
)
def test_our_own_checkpoints_never_load_with_a_random_trunk(tmp_path, model_class, edit, problem):
    tiny_model().save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=problem):
        model_class.from_pretrained(tmp_path)


def safetensors_size(shapes):
    """Bytes of a safetensors file with these bfloat16 tensors, and their number.

    Layout (github.com/huggingface/safetensors, "Format"): 8 bytes, a JSON header padded to a multiple of 8, data.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(shapes):
        start, end = end, end + 2 * torch.Size(shapes[name]).numel()
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [start, end]}
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + end, len(shapes)


def paper_shapes(kind, **variant):
    """Return the names and shapes of a published file's tensors; check first that they fit our model."""
    config = modeling.ModularStarEncoderConfig.from_pretrained(hub_config_folder(kind.partition("-")[0]))
    shape = {name: getattr(config, name) for name in (*SHAPE, "vocab_size") if hasattr(config, name)}
    shape |= {"conditional_size": config.exit_embedding_size, "matryoshka_layers": config.exit_layers}
    shapes = tensor_shapes(shape, describe_variant(kind, shape, options=variant))
    check_layout(shapes, *describe(shapes, config))
    return shapes


SIZES = {"finetuned": 2_123_859_344, "finetuned-27": 1_606_516_448, "finetuned-18": 1_105_969_000}
SIZES |= {"finetuned-9": 605_421_792, "finetuned-4": 327_340_112}


def test_the_models_have_the_bytes_and_tensors_of_the_published_files():
    assert safetensors_size(paper_shapes("pretrained")) == (2_208_252_348, 590)
    assert safetensors_size(paper_shapes("pretrained", vocabulary_bias=None)) == (2_208_153_948, 589)
    for kind, size in SIZES.items():
        computed, _ = safetensors_size(paper_shapes(kind, module_prefix=False, final_norm="absent"))
        assert computed == pytest.approx(size, abs=5000), kind
