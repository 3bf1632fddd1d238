import json
import logging
import math
import re
import shutil

import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from modular_star_encoder.data.tokenizer import load_tokenizer
from modular_star_encoder.evaluation.report import TABLES
from modular_star_encoder.inference.checkpoints import load_checkpoint, stored_license
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.training import runs, starting_points
from modular_star_encoder.training.finetuning import finetune, load_finetuning
from modular_star_encoder.training.recipes import FinetuningRecipe, hub_config_folder, load_config, load_recipe
from modular_star_encoder.training.starting_points import StartingPoint
from tests.errors import raises
from tests.processes import run_processes
from tests.published.stand_in import write_stand_in
from tests.tiny import EXIT_LAYERS, REPOSITORY, cache_repository, tiny_batch, tiny_config
from tests.training.retrieval_runs import finetuning_settings, interrupt, write_checkpoint, write_recipe, write_triplets

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), residual_dropout=0.1)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder / "recipe.yaml", finetuning_settings(checkpoint, write_triplets(folder)))


def run(recipe_file, out, *overrides):
    estimates = []
    recipe, function = load_finetuning(recipe_file, overrides)
    return function(recipe, out, progress=False, announce=estimates.append), estimates[0]


def embed(model):
    with torch.inference_mode():
        return model.eval()(**tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings


def test_a_recipe_makes_a_checkpoint_for_both_libraries_and_a_log_of_every_exit(recipe_file, tmp_path):
    log, estimate = run(recipe_file, tmp_path / "run", "max_steps=20", "objective.mini_batch_tokens=400")
    model = AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert type(model) is ModularStarEncoderForRetrieval
    assert not list((tmp_path / "run" / "model").glob("*.bin")), "Trainer's settings are a pickle"
    assert estimate.parameters == estimate.trained_parameters == model.num_parameters()
    assert estimate.groups == {"text → code": 45, "code → code": 45}
    training = [entry for entry in log["log_history"] if "loss" in entry]
    assert len(training) == 20
    assert {entry["learning_rate"] for entry in training} == {3e-3}
    for exit_layer in EXIT_LAYERS:
        assert f"clip_accuracy_exit_{exit_layer}" in training[0]
        assert 0 <= log["evaluation"][f"eval_clip_accuracy_exit_{exit_layer}"] <= 1
    first, last = (sum(entry["clip_loss_exit_4"] for entry in part) / 5 for part in (training[:5], training[-5:]))
    assert last < 0.9 * first
    assert log["data"]["held_out"] == 15
    text_to_code, code_to_code = TABLES.validate_python(log["retrieval"]["tables"])
    assert (text_to_code.title, code_to_code.title) == ("held-out, text → code", "held-out, code → code")
    assert text_to_code.size.startswith("8 queries")
    mrr = {(row.retriever, row.exit_layer): row.mean.value for row in text_to_code.rows}
    assert list(mrr) == [*((name, k) for name in ("trained", "before training") for k in EXIT_LAYERS), ("BM25", None)]
    assert mrr["before training", 4] < mrr["trained", 4]
    gains = {row.exit_layer: row.difference.value for row in text_to_code.rows if row.difference}
    assert gains == pytest.approx({k: mrr["trained", k] - mrr["before training", k] for k in EXIT_LAYERS})
    assert mrr["BM25", None] > 0.9
    assert not model.config.unpad_inputs
    folders = [tmp_path / "run" / name for name in ("model", "checkpoints/checkpoint-20")]
    encoders = [SentenceTransformer(str(folder), device="cpu") for folder in folders]
    embeddings, of_checkpoint = (encoder.encode("open the file", exit_layer=2) for encoder in encoders)
    assert embeddings.shape == (16,)
    assert of_checkpoint == pytest.approx(embeddings, abs=1e-6)
    assert type(AutoModel.from_pretrained(folders[1])) is ModularStarEncoderForRetrieval


@pytest.mark.parametrize("damage", [False, True])
def test_new_heads_are_one_line_and_other_odd_tensors_are_reported_by_transformers(
    recipe_file, checkpoint, tmp_path, monkeypatch, damage
):
    copy, lines = shutil.copytree(checkpoint, tmp_path / "copy"), []
    weights = load_file(copy / "model.safetensors")
    odd = {"odd": torch.ones(2)} if damage else {}
    save_file(weights | odd, copy / "model.safetensors", metadata={"format": "pt"})
    recipe, _ = load_finetuning(recipe_file, [f"model={copy}"])
    show = lambda record: lines.append(record.getMessage())  # noqa: E731
    for name in ("transformers.modeling_utils", starting_points.logger.name):
        monkeypatch.setattr(logging.getLogger(name), "callHandlers", show)
    for _ in range(2):  # a run loads its model again at the end
        StartingPoint(ModularStarEncoderForRetrieval, recipe).load()
    if damage:
        assert all("odd" in line for line in lines)
    else:
        assert lines == [f"{copy} has no heads for retrieval: new heads begin with random weights."]
    assert bool(lines)


def test_training_starts_from_no_checkpoint_with_an_adapter(recipe_file, checkpoint, tmp_path, monkeypatch):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "adapter_config.json").write_text("[1]")
    with pytest.raises(FileNotFoundError, match="merge the adapter first"):
        run(recipe_file, tmp_path / "run", f"model={copy}")
    cache_repository(copy, tmp_path / "hub", monkeypatch)
    with raises("checkpoint.adapter", REPOSITORY):
        run(recipe_file, tmp_path / "run", f"model={REPOSITORY}", f"tokenizer={checkpoint}")


def test_a_fine_tuned_model_keeps_the_licence_of_its_parent(recipe_file, checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "README.md").write_text("---\nlicense: mit\n---\n")
    for model, license in ((copy, "mit"), (checkpoint, None)):
        run(recipe_file, tmp_path / str(license), "max_steps=1", f"model={model}")
        assert stored_license(tmp_path / str(license) / "model") == license


def test_a_model_that_sentence_transformers_cannot_express_is_trained_and_saved_for_transformers(recipe_file, tmp_path):
    log, _ = run(recipe_file, tmp_path / "run", "config.projection_order=pool_then_project")
    assert AutoModel.from_pretrained(tmp_path / "run" / "model").config.projection_order == "pool_then_project"
    assert log["retrieval"]["tables"][0]["rows"][0]["mean"]["value"] > 0
    assert not (tmp_path / "run" / "model" / "modules.json").exists()


def test_a_column_of_hard_negatives_gives_every_pair_one_more_candidate(recipe_file, checkpoint, tmp_path):
    file = write_triplets(tmp_path)
    rows = [json.loads(line) for line in file.open()]
    rows = [row | {"worse": rows[(i + 1) % len(rows)]["func2"], "kind": "c"} for i, row in enumerate(rows)]
    file.write_text("\n".join(map(json.dumps, rows)))
    columns = "data.triplets.columns={negative: worse, negative_language: kind}"
    with_negatives, estimate = run(recipe_file, tmp_path / "run", f"data.triplets={{source: {file}}}", columns)
    plain, plain_estimate = run(recipe_file, tmp_path / "plain")
    assert estimate.tokens_per_row > 1.4 * plain_estimate.tokens_per_row
    # Untrained, a batch of 8 has a loss of about ln 8; half of it counts 16 candidates.
    first, plain_first = (log["log_history"][0]["clip_loss_exit_4"] for log in (with_negatives, plain))
    assert first - plain_first == pytest.approx(math.log(2) / 2, abs=0.15)
    assert with_negatives["evaluation"]["eval_clip_loss_exit_4"] > plain["evaluation"]["eval_clip_loss_exit_4"]
    assert len(with_negatives["retrieval"]["tables"]) == 2


def straight_and_interrupted(recipe_file, folder, monkeypatch, *overrides, resumed_with=()):
    """Logs of a run that goes through and of one that Ctrl-C interrupts after step 5, one step after a checkpoint."""
    straight, _ = run(recipe_file, folder / "straight", *overrides)
    with interrupt(monkeypatch, 5):
        run(recipe_file, folder / "interrupted", *overrides)
    resumed, estimate = run(recipe_file, folder / "interrupted", *overrides, *resumed_with)
    assert (straight["resumed_from"], resumed["resumed_from"]) == (None, 4)
    losses = [[entry["loss"] for entry in log["log_history"] if "loss" in entry] for log in (straight, resumed)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6
    expected, found = (load_file(folder / name / "model" / "model.safetensors") for name in ("straight", "interrupted"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    return estimate


def test_an_interrupted_run_of_all_weights_equals_one_that_goes_through(recipe_file, tmp_path, monkeypatch):
    straight_and_interrupted(recipe_file, tmp_path, monkeypatch)


def test_settings_may_change_until_there_is_a_checkpoint(recipe_file, tmp_path, monkeypatch):
    for step, overrides in ((1, ()), (3, ("objective.mini_batch_tokens=400",))):
        with interrupt(monkeypatch, step):
            run(recipe_file, tmp_path / "run", *overrides)
        assert (tmp_path / "run" / "checkpoints").is_dir()
    with raises("training.run.other_settings", "other values of objective;"):
        run(recipe_file, tmp_path / "run")


def test_a_folder_with_other_things_in_it_is_left_alone(recipe_file, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with raises("training.run.not_a_run", tmp_path):
        run(recipe_file, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_in_which_another_process_trains_is_refused(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("modular_star_encoder.utils.files.LOCK_SECONDS", 0.0)
    with FileLock(tmp_path / ".lock"):
        with raises("files.locked", tmp_path):
            run(recipe_file, tmp_path)
        (tmp_path / "recipe.json").write_text("{}")
        monkeypatch.setattr(StartingPoint, "load", None)  # a begun run is refused at once
        with raises("files.locked", tmp_path):
            run(recipe_file, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "recipe.json"}


def test_data_that_could_not_be_read_may_be_replaced_in_the_same_folder(recipe_file, tmp_path):
    with pytest.raises(ValueError, match=r"missing\.jsonl"):
        run(recipe_file, tmp_path / "run", "max_steps=1", "data.triplets=missing.jsonl")
    log, _ = run(recipe_file, tmp_path / "run", "max_steps=1")
    assert log["steps"] == 1
    with raises("training.run.other_settings", "other values of data;"):
        run(recipe_file, tmp_path / "run", "max_steps=1", "data.triplets=missing.jsonl")
    # A finished run is not trained again.
    again = finetune(load_recipe(FinetuningRecipe, recipe_file, ["max_steps=1"]), tmp_path / "run", progress=False)
    assert (again["seconds"], again["log_history"]) == (log["seconds"], json.loads(json.dumps(log["log_history"])))


def test_lora_trains_adapters_and_heads_resumes_with_other_workers_and_saves_both_ways(
    recipe_file, checkpoint, tmp_path, monkeypatch
):
    settings, free = ("lora={}", "config.logit_scale_init_value=10"), ("dataloader_num_workers=1", "save_total_limit=1")
    estimate = straight_and_interrupted(recipe_file, tmp_path, monkeypatch, *settings, resumed_with=free)
    assert json.loads((tmp_path / "interrupted" / "recipe.json").read_text())["dataloader_num_workers"] == 1
    (tmp_path / "interrupted").rename(tmp_path / "run")
    assert estimate.trained_parameters < 0.7 * estimate.parameters
    merged = AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert not merged.config.unpad_inputs
    base = ModularStarEncoderForRetrieval.from_pretrained(checkpoint, logit_scale_init_value=10)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    torch.testing.assert_close(embed(adapted), embed(merged), rtol=0, atol=1e-5)
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {f"projection_heads.{exit_layer}.dense.weight" for exit_layer in EXIT_LAYERS} <= changed
    assert {"model.layers.0.mlp.c_fc.weight", "logit_scale.log_scale"} <= changed
    assert "model.embed_tokens.weight" not in changed
    assert (tmp_path / "run" / "model" / "modules.json").is_file()


def test_two_processes_train_as_one(recipe_file, tmp_path):
    settings = ["max_steps=2", "bf16=false", "config={residual_dropout: 0, attention_dropout: 0, embedding_dropout: 0}"]
    straight, _ = run(recipe_file, tmp_path / "one", *settings)
    run_processes("modular_star_encoder.cli.main", "finetune", recipe_file, *settings, "--out", tmp_path / "two")
    log = json.loads((tmp_path / "two" / "model" / "training_log.json").read_text())
    assert log["preflight"]["processes"] == 2
    losses = [[entry["loss"] for entry in one["log_history"] if "loss" in entry] for one in (straight, log)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert log["evaluation"]["eval_loss"] == pytest.approx(straight["evaluation"]["eval_loss"], rel=1e-2)


@pytest.mark.parametrize("kind", ["pretrained", "finetuned"])
def test_published_layouts_are_started_from_and_their_tokenizer_gets_the_template(recipe_file, tmp_path, kind):
    published = write_stand_in(tmp_path / kind, kind)
    settings = ("max_steps=1", "learning_rate=1.0e-30", "lora={r: 1}")
    log, _ = run(recipe_file, tmp_path / "run", f"model={published}", *settings)
    model, tokenizer = load_checkpoint(tmp_path / "run" / "model")
    assert list(model.config.exit_layers) == [1, 2, 3, 5, 6]
    assert set(log["recipe"]["lora"]) == {"r"}
    before = ModularStarEncoderForRetrieval.from_pretrained(published).state_dict()
    kept = [name for name in before if name.startswith("model.") or kind == "finetuned"]
    assert all(torch.allclose(before[name].float(), model.state_dict()[name]) for name in kept)
    assert tokenizer("")["input_ids"] == [tokenizer.sep_token_id, tokenizer.cls_token_id]
    assert (tokenizer.sep_token, tokenizer.pad_token) == ("<sep>", "<|endoftext|>")


def test_random_weights_need_a_tokenizer(recipe_file, checkpoint, tmp_path):
    tiny_config().save_pretrained(tmp_path / "config")
    with raises("training.tokenizer.missing", "config"):
        run(recipe_file, tmp_path / "run", f"model={tmp_path / 'config'}")
    run(recipe_file, tmp_path / "run", f"model={tmp_path / 'config'}", f"tokenizer={checkpoint}", "max_steps=1")
    tokens = [load_tokenizer(folder).get_vocab() for folder in (checkpoint, tmp_path / "run" / "model")]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("max_code_tokens=512", "training.length.too_long", "max_code_tokens=512"),
        ("batch_size=7", "training.batch_size.multiple", "batch_size=7"),
        ("seed=-1", "settings.value", "seed must be greater than or equal to 0, not -1"),
        ("attn_implementation=owner/kernel", "settings.value", "owner/kernel"),
        ("lr_scheduler_type=falling", "training.arguments.value", "falling"),
        ("eval_fraction=0.5", "settings.value", "0.2, not 0.5"),
        ("exit_weights=heavy", "exit_weights", "paper, uniform, linear"),
        ("objective={teacher: 3, distillation_weight: 1}", "contrastive.exit", "`teacher` names exit 3"),
        ("objective.pairs=[[query, document, negative]]", "training.objective.pairs", "objective.pairs"),
        ("config.layers=3", "settings.unknown", "config: unknown setting layers"),
        ("config.residual_dropout=high", "training.model.config", "residual_dropout"),
        ("config.pooling=legacy", "training.model.config", "unpad_inputs"),
        ("model=nowhere", "config.unknown", "nowhere with a config.json"),
        ("train_sampling_strategy=random", "training.arguments.decided", "train_sampling_strategy"),
        ("push_to_hub=true", "training.arguments.upload", "mose publish"),
        ("hub_model_id=a/b", "training.arguments.upload", "hub_model_id"),
        ("accelerator_config=/dev/zero", "training.arguments.mapping", "/dev/zero"),
        ("deepspeed=/dev/zero", "training.arguments.mapping", "/dev/zero"),
        ("fsdp_config=/dev/zero", "training.arguments.mapping", "/dev/zero"),
        ("lr_scheduler_kwargs=5", "training.arguments.mapping", "lr_scheduler_kwargs"),
        ("lr_scheduler_kwargs={num_cycles: b} lr_scheduler_type=cosine", "training.arguments.value", "'b'"),
        ("optim=adamw_torch optim_args=a", "training.arguments.value", "unpack"),
        ("accelerator_config={a: 1}", "training.arguments.value", "'a'"),
        ("accelerator_config.gradient_accumulation_kwargs={a: 1}", "training.arguments.value", "'a'"),
        ("activation_checkpointing=true activation_checkpointing_kwargs={a: 1}", "training.arguments.value", ": a"),
        ("report_to=nowhere", "training.arguments.value", "nowhere"),
        ("parallelism_config=5", "training.arguments.decided", "parallelism_config"),
        ("deepspeed.stage=1", "training.arguments.value", "deepspeed"),
        ("lora.r=1000000000", "settings.value", "lora.r"),
        ("lora.rank_pattern.q_proj=1000000000", "settings.value", "lora.rank_pattern.q_proj"),
        ("lora.target_modules=[nowhere]", "training.lora", "target"),
        ("lora.speed=3", "training.lora", "speed"),
        ("config.intermediate_size=65", "checkpoint.shapes", "do not fit"),
        ("data.rows=x", "settings.unknown", "command line: data: unknown setting rows; available: functions, pairs, "),
        ("batch_size=96", "data.batch_size", "from 2 to 44 pairs"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(recipe_file, tmp_path, override, key, value):
    with raises(key, value):
        run(recipe_file, tmp_path / "run", *re.split(r" (?=\w+=)", override))
    assert not (tmp_path / "run").exists()
    assert not is_deepspeed_zero3_enabled()  # raises if a rejected setting is still in force


@pytest.mark.parametrize(
    ("override", "value"),
    [("exit_layer=3", "1, 2, 4"), ("attn_implementation=fast", "fast"), ("model=runs/small", "runs/small")],
)
def test_what_the_model_or_the_hub_refuses_stops_before_training(recipe_file, tmp_path, monkeypatch, override, value):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ValueError, OSError), match=value):
        run(recipe_file, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_killed_while_it_saved_its_model_leaves_nothing_when_it_is_repeated(recipe_file, tmp_path):
    run(recipe_file, tmp_path / "run", "max_steps=1")
    whole = sorted((tmp_path / "run" / "model").iterdir())
    (tmp_path / "run" / "model" / "training_log.json").unlink()
    (tmp_path / "run" / "model" / ".saving-1234").mkdir()
    run(recipe_file, tmp_path / "run", "max_steps=1")
    assert sorted((tmp_path / "run" / "model").iterdir()) == whole


def test_a_run_that_lacks_newer_settings_is_continued(recipe_file, tmp_path):
    recipe = load_recipe(FinetuningRecipe, recipe_file, ["max_steps=1"])
    finetune(recipe, tmp_path / "run", progress=False, announce=lambda _: None)
    written = tmp_path / "run" / "recipe.json"
    settings = json.loads(written.read_text())
    written.write_text(json.dumps({name: settings[name] for name in settings if name not in ("ema_decay", "lora")}))
    assert finetune(recipe, tmp_path / "run", progress=False)["steps"] == 1


def test_our_small_recipe_fits_its_model_and_each_kind_of_pairs_is_counted():
    recipe = load_recipe(FinetuningRecipe, hub_config_folder("small") / "finetune.yaml", ["model=small"])
    with torch.device("meta"):
        model = ModularStarEncoderForRetrieval(load_config("small"))
    text, code, both = (
        runs.finetuning_preflight(model, recipe, 1, dict.fromkeys(kinds, 20_000), (40.0, 120.0))
        for kinds in (("text → code",), ("code → code",), ("text → code", "code → code"))
    )
    assert text.epochs == {"text → code": recipe.max_steps * recipe.batch_size / 20_000}
    assert text.memory_bytes < 4 * 2**30
    assert (text.tokens_per_row, code.tokens_per_row, both.tokens_per_row) == (160, 240, 200)
    assert both.flops_per_row == pytest.approx((text.flops_per_row + code.flops_per_row) / 2)
    assert code.flops_per_row > 1.5 * text.flops_per_row
    assert "text → code           no such pairs in this data" in str(code)
    assert "code → code           20,000 pairs" in str(code)
    assert "no such pairs in this data" not in str(both)
