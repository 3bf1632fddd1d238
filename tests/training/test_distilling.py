import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerState

from modular_star_encoder.data.finetuning_rows import RetrievalBatches, RetrievalTexts
from modular_star_encoder.data.pairs import RetrievalExample, Snippet, open_triplets
from modular_star_encoder.data.splits import BatchPlan, PairGroups
from modular_star_encoder.inference.checkpoints import load_checkpoint, stored_license, stored_prompts
from modular_star_encoder.inference.encoders import Encoder
from modular_star_encoder.training.ablation import AblationRecipe, Results, ablate
from modular_star_encoder.training.distilling import TaughtBatches, TeacherTargets, compute_teacher_vectors
from modular_star_encoder.training.finetuning import finetune
from modular_star_encoder.training.recipes import FinetuningRecipe, hub_config_folder, load_recipe
from modular_star_encoder.training.starting_points import grow, grow_checkpoint, start_from_teacher
from modular_star_encoder.training.trainer import AveragedWeights
from tests.errors import raises
from tests.tiny import NO_DROPOUT, ZERO, change_json, save_tiny_checkpoint, tiny_batch, tiny_config, tiny_model
from tests.training.retrieval_runs import end_by_signals, finetuning_settings, interrupt, write_recipe, write_triplets
from tests.training.test_finetuning import run, straight_and_interrupted

STUDENT = ZERO | NO_DROPOUT | {"exit_layers": (0, 1, 2), "num_hidden_layers": 2, "instruction_prompts": False}
EXIT_0 = STUDENT | {"exit_layers": (0,), "num_hidden_layers": 0}


def started(tokenizer, size):
    """A model of exit 0 after `start_from_teacher`, the teacher's centred vectors, and the weights of the tokens."""
    vectors = np.random.default_rng(0).normal(1, 1, (len(tokenizer), size)).astype(np.float32)
    counts = np.arange(len(tokenizer))
    model = tiny_model(**EXIT_0, projection_size=size).eval()
    start_from_teacher(model, tokenizer, vectors, counts)
    centred = vectors - vectors[4:].mean(axis=0)  # the first four are special
    return model, centred, 1e-3 / (1e-3 + counts / counts.sum())


def test_exit_0_starts_as_the_weighted_mean_of_the_teachers_token_vectors_and_special_tokens_change_nothing(tokenizer):
    model, vectors, weights = started(tokenizer, 16)
    ids = [2, 7, 150, 299, 7, 3]
    real = ids[1:-1]
    expected = (weights[real, None] * vectors[real]).sum(axis=0)
    found = model(torch.tensor([ids])).sentence_embedding[0].detach().numpy()
    assert found == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)
    assert model.model.token_weights.weight[:, 0].tolist() == pytest.approx([0, 0, 0, 0, *weights[4:]], rel=1e-5)


def test_a_model_narrower_than_its_teacher_starts_with_the_principal_components(tokenizer):
    model, vectors, _ = started(tokenizer, 48)
    vectors[:4] = 0
    table, head = model.model.embed_tokens.weight.detach(), model.projection_heads["0"].dense.weight.detach()
    left_out = np.linalg.svd(vectors, compute_uv=False)[model.config.hidden_size :]
    error = np.linalg.norm((table @ head.T).numpy() - vectors)
    assert error == pytest.approx(np.sqrt((left_out**2).sum()), rel=1e-4)
    assert error > 1


def test_every_exit_of_a_grown_model_embeds_like_exit_0_and_its_layers_learn(tokenizer):
    model, _, _ = started(tokenizer, 16)
    nn.init.normal_(model.projection_heads["0"].dense.bias)
    grown = grow(model, (0, 1, 3)).eval()
    assert (grown.config.num_hidden_layers, tuple(grown.config.exit_layers)) == (3, (0, 1, 3))
    batch = tiny_batch()
    embeddings = grown(**batch, exit_layers=(0, 1, 3)).exit_embeddings
    before = model(**batch).sentence_embedding
    assert (embeddings - before).abs().max() < 1e-6
    (embeddings[2] @ torch.ones(16)).sum().backward()
    assert all(layer.mlp.c_proj.weight.grad.any() for layer in grown.model.layers)
    assert grown.model.embed_tokens.weight[4:].std().item() == pytest.approx(1, rel=1e-3)


def test_models_that_cannot_start_or_grow_are_refused(tokenizer):
    counts = np.ones(len(tokenizer))
    with raises("training.start_from_teacher", "projection_size=20"):
        start_from_teacher(tiny_model(**EXIT_0), tokenizer, np.ones((len(tokenizer), 20)), counts)
    cases = ((EXIT_0, (1, 2), "[1, 2]"), (EXIT_0, (0, 5000), "[0, 5000]"), (STUDENT, (0, 3), "exit_layers=["))
    for changes, exits, named in (*cases, (EXIT_0 | {"exit_norm": "all"}, (0, 2), "exit_norm='all'")):
        with raises("training.grow", named) as error:
            grow(tiny_model(**changes), exits)
        assert "projection_head" not in str(error.value)


def test_a_grown_checkpoint_keeps_prompts_and_licence(tmp_path):
    start = save_tiny_checkpoint(tmp_path / "start", **EXIT_0)
    change_json(start, "config_sentence_transformers.json", prompts={"query": "Q: "})
    (start / "README.md").write_text("---\nlicense: mit\n---\n")
    grown = grow_checkpoint(start, (0, 2), tmp_path / "grown")
    assert (stored_prompts(grown), stored_license(grown)) == ({"query": "Q: "}, "mit")


def test_averaged_weights_follow_their_formula():
    model, average, state, expected = nn.Linear(1, 1, bias=False), AveragedWeights(0.5), TrainerState(), 0.0
    nn.init.zeros_(model.weight)
    average.on_train_begin(None, state, None, model=model)
    for state.global_step in range(1, 9):
        nn.init.constant_(model.weight, state.global_step)
        average.on_step_end(None, state, None, model=model)
        decay = min(0.5, (1 + state.global_step) / (10 + state.global_step))
        expected = decay * expected + (1 - decay) * state.global_step
    average.on_train_end(None, state, None, model=model)
    assert model.weight.item() == pytest.approx(expected, rel=1e-6)


def test_each_text_of_a_batch_has_its_own_vector_and_every_second_row_an_unpaired_text(tokenizer):
    snippets = [tuple(Snippet("python", f"def f{row}_{number}(): pass") for number in range(2)) for row in range(8)]
    examples = [RetrievalExample(f"text {row}", own, negative=snippets[row - 1][1]) for row, own in enumerate(snippets)]
    batches = RetrievalBatches(RetrievalTexts(examples, tokenizer), BatchPlan(PairGroups(examples), 4, 0), steps=2)
    unpaired = RetrievalTexts([RetrievalExample(f"alone {row}", ()) for row in range(5)], tokenizer)

    class Targets:
        def of(self, text, kind=None):
            return np.array([*map(ord, f"{kind}: {text}".ljust(50))], np.float32)

    taught = TaughtBatches(batches, Targets(), unpaired)
    for index, row in enumerate(map(taught.__getitem__, range(8))):
        assert ("text_ids" in row) is (index % 2 == 0)
        for side in {name.split("_")[0] for name in row}:
            kind, _, text = "".join(map(chr, row[f"{side}_teacher"].int())).strip().partition(": ")
            assert text in tokenizer.decode(row[f"{side}_ids"])
            assert kind == {"alone": "None", "text ": "query"}.get(text[:5], "document")


TEXTS = [f"read file {number} of the table" for number in range(10)]


class Teacher(Encoder):
    """Gives a text, with its prompt, a vector by its length; `asked` collects the texts."""

    name, exit_layers = "stand-in", (None,)

    def __init__(self, checksum="one"):
        self.checksum, self.asked = checksum, []

    def encode(self, texts, exit_layers, *, progress=True):
        self.asked += [prompt + text for prompt, text in texts]
        vectors = [[3, len(prompt + text), sum(map(ord, text)) % 7] for prompt, text in texts]
        return {None: np.array(vectors, np.float32)}


def compute(teacher, texts, cache, **options):
    return compute_teacher_vectors(teacher, texts, cache, progress=False, **options)


def test_each_text_is_computed_once_and_its_vector_is_the_teachers_at_unit_length(tmp_path):
    teacher = Teacher()
    compute(teacher, [*TEXTS[:6], *TEXTS[:2]], tmp_path)
    found = compute(teacher, TEXTS, tmp_path)
    assert sorted(teacher.asked) == sorted(TEXTS)
    expected = Teacher().encode([("", text) for text in TEXTS], [None])[None]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert found.rows(TEXTS) == pytest.approx(expected, abs=1e-6)
    assert (pickle.loads(pickle.dumps(found)).rows(TEXTS) == found.rows(TEXTS)).all()
    assert len(pickle.dumps(found)) < 1000
    with pytest.raises(KeyError, match="never seen"):
        found.rows(["never seen"])


def test_another_teacher_prompt_or_length_has_vectors_of_its_own(tmp_path):
    teachers = Teacher(), Teacher("two"), Teacher(), Teacher()
    options = {}, {}, {"prompt": "query: "}, {"max_characters": 9}
    found = [compute(one, TEXTS, tmp_path, **own) for one, own in zip(teachers, options, strict=True)]
    assert [len(teacher.asked) for teacher in teachers] == [10, 10, 10, 1]
    assert teachers[2].asked[0] == f"query: {TEXTS[0]}"
    assert teachers[3].asked == ["read file"]
    assert (found[3].rows([TEXTS[4]]) == found[3].rows([TEXTS[5]])).all()


def test_targets_are_centred_by_kind_and_an_unpaired_text_by_the_nearer_mean(tmp_path):
    teacher, code = Teacher(), [f"def read_{number}(): return table[{number}] + offset" for number in range(6)]
    found = compute(teacher, [*TEXTS, *code], tmp_path)
    kinds = {"query": found, "document": found}
    means = {"query": found.mean(TEXTS[:8]), "document": found.mean(code)}
    assert (found.mean(TEXTS[:8][::-1]) == means["query"]).all()
    assert means["query"] == pytest.approx(found.rows(TEXTS[:8]).mean(axis=0), abs=1e-6)
    targets, raw = TeacherTargets(kinds, means), TeacherTargets(kinds)
    for text, kind in ((TEXTS[9], "query"), (code[0], "document")):
        (vector,) = found.rows([text])
        centred = vector - means[kind]
        assert targets.of(text, kind) == pytest.approx(centred / np.linalg.norm(centred), abs=1e-6)
        assert raw.of(text) == pytest.approx(vector, abs=1e-6)
        nearest = min(means, key=lambda one: np.linalg.norm(vector - means[one]))
        assert (targets.of(text) == targets.of(text, nearest)).all()


@pytest.mark.slow
def test_exit_0_is_taught_then_grows_and_both_runs_survive_an_interruption_bit_for_bit(
    checkpoint, tmp_path, monkeypatch
):
    tiny_config(**STUDENT).save_pretrained(tmp_path / "student")
    (tmp_path / "texts.jsonl").write_text('{"text": "a text of its own"}\n{"text": "and another"}')
    distillation = {"teacher": str(checkpoint), "relational_weight": 0.5, "texts": str(tmp_path / "texts.jsonl")}
    distillation |= {"start_from_teacher": True, "cache": str(tmp_path / "cache")}
    settings = finetuning_settings(tmp_path / "student", write_triplets(tmp_path)) | {"tokenizer": str(checkpoint)}
    settings |= {"exit_layer": 0, "exit_weights": "uniform", "ema_decay": 0.9, "distillation": distillation}
    settings["objective"] = {"logit_scale": 20, "false_negative_margin": 0.0}
    first = write_recipe(tmp_path / "first.yaml", settings)
    straight_and_interrupted(first, tmp_path / "first", monkeypatch)
    run = tmp_path / "first" / "straight"
    log = json.loads((run / "model" / "training_log.json").read_text())
    assert {kind: len(mean) for kind, mean in log["teacher_means"].items()} == {"query": 16, "document": 16}
    assert {"cosine_loss_exit_0", "relational_loss_exit_0", "masked_by_teacher"} <= set(log["log_history"][0])
    averaged, last = (load_file(run / name / "model.safetensors") for name in ("model", "checkpoints/checkpoint-6"))
    assert not torch.equal(last["model.embed_tokens.weight"], averaged["model.embed_tokens.weight"])

    grown = grow_checkpoint(run / "model", (0, 1, 2), tmp_path / "grown")
    settings |= {"model": str(grown), "exit_layer": None}
    distillation["start_from_teacher"] = False
    second = write_recipe(tmp_path / "second.yaml", settings)
    straight_and_interrupted(second, tmp_path / "second", monkeypatch, "objective.mini_batch_tokens=200")
    model, _ = load_checkpoint(tmp_path / "second" / "straight" / "model")
    assert model.model.layers[0].mlp.c_proj.weight.any()
    log = json.loads((tmp_path / "second" / "straight" / "model" / "training_log.json").read_text())
    exits = [log["log_history"][0][f"cosine_loss_exit_{exit_layer}"] for exit_layer in (0, 1, 2)]
    assert exits == pytest.approx([exits[0]] * 3, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["contrastive", "distillation"])
def test_a_run_that_signals_end_at_random_moments_is_continued_to_the_same_weights(checkpoint, tmp_path, kind):
    settings = finetuning_settings(checkpoint, write_triplets(tmp_path)) | {"max_steps": 60, "save_steps": 20}
    settings |= {"config": {"residual_dropout": 0.1}, "ema_decay": 0.9, "eval_steps": 100}
    if kind == "distillation":
        settings["distillation"] = {"teacher": str(checkpoint), "cache": str(tmp_path / "cache")}
    recipe = write_recipe(tmp_path / "recipe.yaml", settings)
    end_by_signals("finetune", recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["teacher", "texts"])
def test_neither_a_run_nor_an_ablation_is_continued_with_another_teacher_or_other_texts(
    checkpoint, tmp_path, monkeypatch, changed
):
    teacher, texts = save_tiny_checkpoint(tmp_path / "teacher"), tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a text of its own"}')
    distillation = {"teacher": str(teacher), "texts": str(texts), "cache": str(tmp_path / "cache")}
    settings = finetuning_settings(checkpoint, write_triplets(tmp_path)) | {"distillation": distillation}
    file = write_recipe(tmp_path / "recipe.yaml", settings)
    with interrupt(monkeypatch, 3):
        run(file, tmp_path / "run")
    monkeypatch.setattr(Results, "gate", lambda *_: {"passed": False})
    cells = AblationRecipe(finetuning=settings | {"max_steps": 1}, seeds=(0,))
    ablate(cells, tmp_path / "ablation", progress=False)
    if changed == "teacher":
        tiny_model(initializer_range=0.5).save_pretrained(teacher)
    else:
        texts.write_text('{"text": "another text"}')
    with raises("training.run.other_settings", f"other values of {changed}_checksum;"):
        run(file, tmp_path / "run")
    with raises("training.run.other_settings", f"other values of {changed}_checksum;"):
        ablate(cells, tmp_path / "ablation", progress=False)


@pytest.mark.slow
def test_a_teacher_of_another_size_and_adapters_of_a_new_table_are_refused(checkpoint, tmp_path):
    settings = finetuning_settings(checkpoint, write_triplets(tmp_path))
    settings["distillation"] = {"teacher": str(checkpoint), "cache": str(tmp_path / "cache")}
    file = write_recipe(tmp_path / "recipe.yaml", settings)
    with raises("training.lora", "start_from_teacher"):
        load_recipe(FinetuningRecipe, file, ["lora={}", "distillation.start_from_teacher=true"])
    tiny_config(projection_size=8).save_pretrained(tmp_path / "narrow")
    recipe = load_recipe(FinetuningRecipe, file, [f"tokenizer={checkpoint}", f"model={tmp_path / 'narrow'}"])
    with raises("distillation.size", "16", "8"):
        finetune(recipe, tmp_path / "run", progress=False, announce=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_the_two_recipes_of_mose_code_fit_each_other_and_read_pairs_with_one_snippet(tmp_path):
    folder = hub_config_folder("mose-code")
    first, second = (load_recipe(FinetuningRecipe, folder / f"{name}.yaml") for name in ("exit-0", "recipe"))
    assert (first.exit_layer, second.exit_layer) == (0, None)
    assert (first.data, first.distillation.teacher) == (second.data, second.distillation.teacher)
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"description": "add", "code": "a + b", "language": "go", "package": "sums"}')
    pairs = list(open_triplets(**{**first.data["triplets"], "source": str(file)}))
    assert pairs == [RetrievalExample("add", (Snippet("go", "a + b"),), "sums")]
