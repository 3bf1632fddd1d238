import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments, pipeline
from transformers.models.starcoder2 import Starcoder2Config

from modular_star_encoder import modeling
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining, ModularStarEncoderForRetrieval
from tests.tiny import EXIT_LAYERS, NO_DROPOUT, PROJECTION_SIZE, run, tiny_batch, tiny_model

pytestmark = pytest.mark.slow

# Padding on either side, none, and another size.
BATCHES = (tiny_batch("left"), tiny_batch("right"), tiny_batch(lengths=(12, 12, 12)), tiny_batch(lengths=(9, 5)))


def per_exit(output):
    """The states or embeddings of each exit."""
    return output.exit_embeddings if "exit_embeddings" in output else torch.stack(output.exit_hidden_states)


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("exits", [{"exit_layer": 2}, {"exit_layers": EXIT_LAYERS}])
@pytest.mark.parametrize("model_class", [modeling.ModularStarEncoderModel, ModularStarEncoderForRetrieval])
def test_a_forward_compiles_to_one_graph_with_equal_outputs(model_class, exits):
    model, graphs = tiny_model(model_class).eval(), []
    assert model.config._attn_implementation == "sdpa"

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in BATCHES:
        got, expected = (per_exit(run(one, **batch, **exits)) for one in (compiled, model))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert 1 <= len(graphs) <= len(BATCHES)


def gradients(model, call):
    """Gradient of every parameter after `call()` is differentiated, with the same dropout each time."""
    model.zero_grad()
    torch.manual_seed(3)
    call().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_compiled_model_trains_with_equal_gradients():
    model = tiny_model(**NO_DROPOUT)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def loss_of(callable_model):
        return lambda: callable_model(**tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings.sum()

    torch.testing.assert_close(gradients(model, loss_of(compiled)), gradients(model, loss_of(model)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("exits", [*((exit_layer,) for exit_layer in EXIT_LAYERS), EXIT_LAYERS])
@pytest.mark.parametrize("model_class", [ModularStarEncoderForPreTraining, ModularStarEncoderForRetrieval])
def test_gradient_checkpointing_recomputes_layers_and_changes_no_gradient(model_class, exits):
    model, calls, batch = tiny_model(model_class).train(), [], tiny_batch()
    labels = {}
    if model_class is ModularStarEncoderForPreTraining:
        labels["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
        labels["icc_labels"] = torch.tensor([1, 0, 1])

    def loss():
        output = model(**batch, **labels, exit_layers=exits)
        return output.loss if labels else output.exit_embeddings.square().cumsum(-1).sum()

    for layer in model.model.layers:
        # Before the MLP: recomputation ends where nothing more is needed, inside it.
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradients(model, loss)
    executed = len(calls)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, loss)
    assert executed == exits[-1]
    assert len(calls) - executed == 2 * executed
    torch.testing.assert_close(checkpointed, plain)
    assert any(gradient.any() for gradient in plain.values())


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
@pytest.mark.parametrize("model_class", [modeling.ModularStarEncoderModel, ModularStarEncoderForRetrieval])
def test_a_cut_model_exports_for_any_batch_and_length(model_class, pooling):
    cut = tiny_model(model_class, exit_layer=2, pooling=pooling).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=128)}
    with torch.no_grad():
        shapes = {"input_ids": sizes, "attention_mask": sizes}
        program = torch.export.export(cut, (), tiny_batch(), dynamic_shapes=shapes)
        for batch in (*BATCHES, tiny_batch(lengths=(20, 5, 1, 3, 3)), tiny_batch(lengths=(6,))):
            got, expected = per_exit(program.module()(**batch)), per_exit(cut(**batch))
            assert got.shape[1] == len(batch["input_ids"])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_tensor_parallel_plan_is_starcoder2s_and_names_every_linear_layer_of_a_block():
    model = tiny_model(modeling.ModularStarEncoderModel)
    plan = model.config.base_model_tp_plan
    assert plan == Starcoder2Config.base_model_tp_plan
    linear = {name for name, module in model.layers[0].named_modules() if isinstance(module, nn.Linear)}
    assert set(plan) == {f"layers.*.{name}" for name in linear}
    assert {f"model.{name}": style for name, style in plan.items()}.items() <= tiny_model().tp_plan.items()


TEXT = "def add(first, second):\n    return first"


@pytest.fixture
def serve(tmp_path, tokenizer):
    """Save a model with a tokenizer; return its pipeline and a function that runs the model on a text or a pair."""

    def save(task, model_class, **changes):
        model = tiny_model(model_class, **changes)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        served = pipeline(task, model=str(tmp_path), tokenizer=str(tmp_path), device="cpu")
        return served, lambda *texts: run(model, **tokenizer(*texts, return_tensors="pt"))

    return save


def test_fill_mask_names_the_most_likely_tokens_at_the_mask(serve, tokenizer):
    served, direct = serve("fill-mask", ModularStarEncoderForPreTraining)
    text = f"def add(first, {tokenizer.mask_token}):"
    answers = served(text, top_k=3)
    place = tokenizer(text)["input_ids"].index(tokenizer.mask_token_id)
    expected = direct(text).logits[0, place].softmax(-1).topk(3)
    assert [answer["token"] for answer in answers] == expected.indices.tolist()
    assert [answer["score"] for answer in answers] == pytest.approx(expected.values.tolist())


def test_text_classification_gives_every_label_its_probability_for_a_pair(serve):
    names = {0: "different", 1: "clone", 2: "unsure"}
    served, direct = serve("text-classification", modeling.ModularStarEncoderForSequenceClassification, id2label=names)
    answers = served({"text": TEXT, "text_pair": "x = 1"}, top_k=None)
    expected = direct(TEXT, "x = 1").logits[0].softmax(-1)
    scores = {answer["label"]: answer["score"] for answer in answers}
    assert scores == pytest.approx({name: expected[index].item() for index, name in names.items()})


def stock_trainer(model, folder, rows, collator=None, **settings):
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    arguments = TrainingArguments(str(folder), **options | settings)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)


def unequal_rows(kind):
    """Eight rows, in which 1 to 8 tokens are masked."""
    ids = torch.randint(4, 300, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    masked = [[token if place <= row else -100 for place, token in enumerate(ids[row])] for row in range(8)]
    labels = {"labels": masked} if kind != "classes" else {"labels": [row % 2 for row in range(8)]}
    labels |= {"icc_labels": [row % 2 for row in range(8)]} if kind == "both" else {}
    return [{"input_ids": ids[row]} | {name: values[row] for name, values in labels.items()} for row in range(8)]


@pytest.mark.parametrize(
    ("model_class", "kind", "exact"),
    [
        (modeling.ModularStarEncoderForMaskedLM, "tokens", True),
        (ModularStarEncoderForPreTraining, "both", False),
        (modeling.ModularStarEncoderForSequenceClassification, "classes", True),
    ],
)
def test_accumulated_batches_train_the_stock_trainer_like_one(tmp_path, model_class, kind, exact):
    def step(batch, accumulated):
        model = tiny_model(model_class, **NO_DROPOUT, classifier_dropout=0)
        start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        step = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        trainer = stock_trainer(model, tmp_path, unequal_rows(kind), **size, **step)
        trainer.train()
        return nn.utils.parameters_to_vector(model.parameters()) - start, trainer.state.log_history[0]["loss"]

    (one, one_loss), (four, four_loss) = step(8, 1), step(2, 4)
    # Pre-training losses are means of each batch, in which the rows here have different numbers of masked tokens.
    torch.testing.assert_close(four, one, **{"rtol": 1e-4, "atol": 1e-6} if exact else {"rtol": 0, "atol": 1.0})
    assert four_loss == pytest.approx(one_loss, rel=1e-3 if exact else 0.3)


def test_scripts_for_masked_lm_evaluate_predict_and_keep_the_best_model(tmp_path, tokenizer):
    tiny_model(ModularStarEncoderForPreTraining).save_pretrained(tmp_path / "start")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "start")
    rows = [dict(tokenizer(f"def f{i}(first):\n    return first + {i}")) for i in range(6)]
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "per_device_eval_batch_size": 4}
    trainer = stock_trainer(model, tmp_path / "run", rows, DataCollatorForLanguageModeling(tokenizer), **options)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.state.best_metric == pytest.approx(min(losses))
    assert trainer.predict(rows).predictions.shape[::2] == (6, 300)


@pytest.mark.parametrize(
    ("model_class", "shapes"),
    [
        (ModularStarEncoderForPreTraining, [(6, 12, 300)]),
        (modeling.ModularStarEncoderForSequenceClassification, [(6, 2)]),
        (ModularStarEncoderForRetrieval, [(6, 12, PROJECTION_SIZE), (6, PROJECTION_SIZE)]),
    ],
)
def test_predictions_have_one_row_for_each_text(tmp_path, model_class, shapes):
    model = tiny_model(model_class, **{"logit_scale_init_value": 20.0, "output_all_exits": True})
    rows = [{"input_ids": row["input_ids"]} for row in unequal_rows("tokens")[:6]]
    predictions = stock_trainer(model, tmp_path, rows, per_device_eval_batch_size=4).predict(rows).predictions
    assert [one.shape for one in (predictions if isinstance(predictions, tuple) else (predictions,))] == shapes
