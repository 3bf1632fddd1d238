import math
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining, AutoTokenizer

from modular_star_encoder.data.tokenizer import token_spellings, train_tokenizer
from modular_star_encoder.training import pretraining
from modular_star_encoder.training.pretraining import model_config, pretrain
from modular_star_encoder.training.recipes import PretrainingRecipe, hub_config_folder, load_recipe
from modular_star_encoder.training.starting_points import start_from_spellings, start_from_unigrams
from tests.errors import raises
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_tokenizer
from tests.training.retrieval_runs import end_by_signals, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six repositories of two languages, each with words of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(6):
        language, comment = (("py", "#"), ("go", "//"))[number % 2]
        for place in range(8):
            file = folder / f"repository{number}" / f"file{place}.{language}"
            file.parent.mkdir(exist_ok=True)
            lines = [f"{comment} word{number} step {place}"] + [f"value{number}_{i} = {place} * {i}" for i in range(12)]
            file.write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("recipe")
    tiny_config(vocab_size=400, residual_dropout=0.1).save_pretrained(folder)
    settings = {"model": str(folder), "corpus": {"folder": str(corpus)}, "start_from_corpus": True, "max_tokens": 64}
    settings |= {"max_steps": 6, "warmup_steps": 2, "tokens_per_step": 256, "rows_per_device": 2, "learning_rate": 1e-2}
    settings |= {"eval_fraction": 0.3, "eval_rows": 8, "logging_steps": 1, "eval_steps": 3, "save_steps": 2}
    return write_recipe(folder / "recipe.yaml", settings)


def run(recipe_file, out, *overrides, progress=False):
    estimates = []
    recipe = load_recipe(PretrainingRecipe, recipe_file, overrides)
    return pretrain(recipe, out, progress=progress, announce=estimates.append), estimates[0]


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_recipe_makes_a_checkpoint_that_loads_and_a_log_of_every_exit(recipe_file, tmp_path, packing):
    log, estimate = run(recipe_file, tmp_path / "run", f"packing={packing}", "max_steps=30", "learning_rate=2.0e-3")
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert estimate.parameters == model.num_parameters()
    assert model.config.vocab_size == len(tokenizer)
    assert estimate.rows_per_step == 4
    training = [entry for entry in log["log_history"] if "loss" in entry]
    assert len(training) == 30
    evaluations = [entry for entry in log["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == list(range(3, 31, 3))
    assert log["evaluation"] == evaluations[-1]
    lines = (tmp_path / "run" / "report.md").read_text().splitlines()
    quality = {cells[1]: cells[2:-1] for line in lines if (cells := [cell.strip() for cell in line.split("|")])[1:]}
    loss, accuracy = (log["evaluation"][f"eval_{name}_exit_4"] for name in ("mlm_loss", "icc_accuracy"))
    assert quality["4"] == [f"{loss:.3f}", f"{math.exp(loss):.1f}", f"{100 * accuracy:.1f}"]
    assert {"1", "2", "guess by common identifiers"} < quality.keys()
    assert quality["guess"][::2] == [f"{log['unigram_entropy']:.3f}", "50.0"]
    for kind in ("mlm_loss", "icc_accuracy"):
        assert {f"{kind}_exit_{exit_layer}" for exit_layer in (1, 2, 4)} <= set(training[0])
        assert f"eval_{kind}_exit_4" in log["evaluation"]
    first, last = (sum(entry["mlm_loss_exit_4"] for entry in part) / 5 for part in (training[:5], training[-5:]))
    assert last < 0.9 * first
    assert 0 < log["unigram_entropy"] < torch.tensor(400.0).log()
    assert 1 <= len(log["held_out_repositories"]) <= 3


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("max_tokens=512", "training.length.too_long", "max_tokens=512 must be at most"),
        ("tokens_per_step=200", "training.tokens_per_step.multiple", "2 × 64 × 1 = 128"),
        ("model=nowhere", "config.unknown", "'nowhere'"),
        ("milestones=[1, 2]", "training.schedule", "fractions=[]"),
        ("milestones=[5, 5] fractions=[0.1, 0.1]", "training.schedule", "[5, 5]"),
        ("milestones=[1] fractions=[0.1]", "training.schedule", "warmup_steps=2"),
        ("milestones=[5] fractions=[half]", "training.schedule", "['half']"),
        ("max_tokens=32", "settings.value", "max_tokens must be greater than or equal to 35, not 32"),
        ("eval_rows=1000000000", "settings.value", "eval_rows must be less than or equal to 100000"),
        ("max_steps=0", "settings.value", "max_steps must be greater than 0, not 0"),
        ("corpus.depth=0", "training.corpus.too_few_repositories", "1 repositories (corpus"),
        ("corpus.rows=x", "data.corpus.source", "exactly one"),
        ("corpus.speed=3", "data.corpus.options", "speed"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(recipe_file, tmp_path, override, key, value):
    with raises(key, value):
        run(recipe_file, tmp_path / "run", *re.split(r" (?=\w+=)", override))
    assert not (tmp_path / "run").exists()


def test_the_accuracy_by_identifiers_is_measured_on_a_part_of_many_held_out_rows(recipe_file, tmp_path, monkeypatch):
    def measured(fitted, unseen, tokenizer):
        raise InterruptedError(f"{len(list(fitted))} and {len(list(unseen))} rows")

    monkeypatch.setattr(pretraining, "identifier_overlap_accuracy", measured)
    with pytest.raises(InterruptedError, match="2048 and 2048 rows"):
        run(recipe_file, tmp_path / "run", "eval_rows=100000")


def test_five_repositories_are_enough_whatever_share_is_held_out_and_both_parts_are_named(
    recipe_file, corpus, tmp_path, capsys
):
    for number in range(5):
        shutil.copytree(corpus / f"repository{2 * (number % 3)}", tmp_path / "five" / f"repository{number}")
    for share in (0.01, 0.9):
        overrides = (f"corpus.folder={tmp_path / 'five'}", "max_steps=1", f"eval_fraction={share}")
        log, _ = run(recipe_file, tmp_path / str(share), *overrides, progress=True)
        held_out = log["held_out_repositories"]
        assert len(held_out) == (2 if share < 0.5 else 3)
        part = f"{8 * len(held_out)} files held out, of {len(held_out)} repositories: {', '.join(held_out)}"
        printed = capsys.readouterr().out.splitlines()
        assert part in printed
        assert any("the fewest that give pairs" in line for line in printed) == (share < 0.5)


def test_weights_keep_their_tokenizer_and_a_named_one_may_have_fewer_tokens_than_the_model(recipe_file, tmp_path):
    run(recipe_file, tmp_path / "first", "max_steps=1")
    model = tmp_path / "first" / "model"
    run(recipe_file, tmp_path / "again", "max_steps=1", f"model={model}")
    assert (tmp_path / "again/model/tokenizer.json").read_text() == (model / "tokenizer.json").read_text()
    assert not (tmp_path / "again" / "tokenizer").exists()
    tiny_config(vocab_size=500).save_pretrained(tmp_path / "larger")
    override = f"model={tmp_path / 'larger'}", f"tokenizer={tmp_path / 'first' / 'tokenizer'}"
    log, _ = run(recipe_file, tmp_path / "second", "max_steps=1", *override)
    assert log["steps"] == 1
    weights = load_file(tmp_path / "second" / "model" / "model.safetensors")
    bias = next(value for name, value in weights.items() if name.endswith("decoder.bias"))
    # What can't occur is as rare as what doesn't.
    assert bias.shape == (500,)
    assert bias[400:].max() < bias[4:400].mean()


@pytest.mark.parametrize("lacks", ["mask_token", "pad_token"])
def test_a_tokenizer_that_lacks_a_token_is_refused_before_the_corpus_is_tokenized(recipe_file, tmp_path, lacks):
    tokenizer = train_tokenizer(["def f(): return 1"], 300, progress=False)
    setattr(tokenizer, lacks, None)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with raises("data.tokenizer.token_missing", lacks):
        run(recipe_file, tmp_path / "run", f"tokenizer={tmp_path / 'tokenizer'}")
    assert not (tmp_path / "run" / "tokens").exists()


def test_a_folder_that_happens_to_be_there_is_not_taken_for_a_configuration_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_config().save_pretrained(tmp_path / "small")
    tiny_config().save_pretrained(tmp_path / "mine")
    recipe = hub_config_folder("small") / "recipe.yaml"
    assert model_config(load_recipe(PretrainingRecipe, recipe)).num_hidden_layers == 8
    for name in ("./small", "mine"):
        assert model_config(load_recipe(PretrainingRecipe, recipe, [f"model={name}"])).num_hidden_layers == 4


def test_numbers_that_yaml_reads_as_words_are_numbers(recipe_file):
    assert load_recipe(PretrainingRecipe, recipe_file, ["adam_epsilon=1e-6"]).training["adam_epsilon"] == 1e-6
    recipe = load_recipe(PretrainingRecipe, recipe_file, ["milestones=[1e3, 2000]", "fractions=[1e-1, 0]"])
    arguments = recipe.arguments(recipe_file.parent, progress=False)
    assert (arguments.milestones, arguments.fractions) == ([1000, 2000], [0.1, 0.0])


def test_ended_at_random_moments_and_restarted_it_ends_with_the_same_weights(recipe_file, tmp_path):
    settings = yaml.safe_load(recipe_file.read_text()) | {"max_steps": 40, "save_steps": 8}
    recipe = write_recipe(tmp_path / "recipe.yaml", settings)
    end_by_signals("pretrain", recipe, tmp_path)


def test_starting_from_unigrams_predicts_the_tokens_frequencies():
    decoder = torch.nn.Linear(8, VOCAB_SIZE)
    counts = torch.arange(VOCAB_SIZE)
    start_from_unigrams(decoder, counts)
    torch.testing.assert_close(decoder(torch.zeros(8)).softmax(-1), (counts + 1) / (counts + 1).sum())


def test_tokens_with_one_spelling_start_out_similar_and_others_do_not():
    embedding = torch.nn.Embedding(4, 4096, padding_idx=0)
    start_from_spellings(embedding, ["<pad>", "parse", "parse", "format"], seed=0)
    vectors = embedding.weight.detach().clone()
    correlations = torch.corrcoef(vectors[1:])
    assert correlations[0, 1].item() == pytest.approx(0.8, abs=0.03)
    assert correlations[0, 2].item() == pytest.approx(0, abs=0.06)
    assert vectors[1:].std().item() == pytest.approx(0.3, abs=0.015)
    assert not vectors[0].any()
    for seed in (0, 1):
        start_from_spellings(embedding, ["<pad>", "parse", "parse", "format"], seed=seed)
        assert torch.equal(embedding.weight, vectors) is (seed == 0)


def test_every_token_has_a_spelling_that_ignores_case_spaces_and_underscores():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Return", " return", "_RETURN"])
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    spellings = dict(zip(tokens, token_spellings(tokenizer), strict=True))
    assert spellings["Return"] == spellings[" return"] == spellings["_RETURN"] == "return"
    assert spellings["("] != spellings[")"]
    assert spellings["<sep>"] != spellings["<cls>"]
