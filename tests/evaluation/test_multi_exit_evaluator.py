import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense, Pooling
from transformers import TrainerCallback, TrainingArguments

from modular_star_encoder.data.collators import RetrievalCollator
from modular_star_encoder.data.finetuning_rows import RetrievalTexts
from modular_star_encoder.data.pairs import RetrievalExample, Snippet
from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.evaluation.multi_exit_evaluator import MultiExitEvaluator
from modular_star_encoder.inference import shipped_model
from modular_star_encoder.inference.checkpoints import load_checkpoint
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.training.trainer import MultiExitTrainer
from tests.errors import raises
from tests.evaluation.samples import code_rows, reciprocal_ranks
from tests.tiny import EXIT_LAYERS, tiny_model

LANGUAGES = {"file": "python", "socket": "python", "user": "ruby", "header": "sql"}
ROWS = code_rows(("add", "remove", "find", "print"), LANGUAGES)
EXAMPLES = [RetrievalExample(description, (Snippet(language, code),)) for description, code, language in ROWS]
TRAINING = {"max_steps": 2, "per_device_train_batch_size": len(ROWS), "learning_rate": 3e-3, "use_cpu": True}
TRAINING |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "disable_tqdm": True, "report_to": "none"}
TRAINING |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_mrr_mean"}


class SpoilLastStep(TrainerCallback):
    """Leaves a model after the second step that embeds every text alike."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == TRAINING["max_steps"]:
            for name, parameter in model.named_parameters():
                if "out_proj.weight" in name:
                    parameter.data.zero_()


@pytest.fixture
def sentence_transformer(checkpoint):
    return SentenceTransformer(str(checkpoint), device="cpu")


def scores(model, **options):
    return MultiExitEvaluator.from_pairs(ROWS, **options)(model)


def trainer(folder, tokenizer, **changes):
    arguments, model = TrainingArguments(str(folder), **TRAINING), tiny_model(instruction_prompts=False)
    options = {"evaluator": MultiExitEvaluator.from_pairs(ROWS, tokenizer=tokenizer), "callbacks": [SpoilLastStep()]}
    options |= {"train_dataset": RetrievalTexts(EXAMPLES, tokenizer, prompts=False, progress=False)} | changes
    return MultiExitTrainer(
        model, arguments, ContrastiveObjective(), data_collator=RetrievalCollator(tokenizer), **options
    )


def evaluations(trainer):
    return {log["step"]: log for log in trainer.state.log_history if "eval_mrr_mean" in log}


def check_best_checkpoint(trainer):
    """The first step's checkpoint is the best, not the last one, and is the model that is left."""
    logged = evaluations(trainer)
    assert list(logged) == [1, 2]
    assert logged[1]["eval_mrr_mean"] > 2 * logged[2]["eval_mrr_mean"]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert trainer.state.best_metric == logged[1]["eval_mrr_mean"]
    assert trainer.evaluate()["eval_mrr_mean"] == pytest.approx(logged[1]["eval_mrr_mean"], abs=1e-9)


def test_multi_exit_trainer_keeps_the_checkpoint_whose_exits_are_best_on_average(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer)
    run.train()
    log = evaluations(run)[1]
    for metric in ("mrr", "ndcg_at_10", "recall_at_1", "recall_at_10"):
        values = [log[f"eval_{metric}_exit_{exit_layer}"] for exit_layer in EXIT_LAYERS]
        assert log[f"eval_{metric}_mean"] == pytest.approx(np.mean(values))
        assert log[f"eval_{metric}_worst"] == min(values)
    check_best_checkpoint(run)


def test_with_several_eval_datasets_the_evaluator_runs_once_beside_their_losses(tmp_path, tokenizer):
    rows, calls = RetrievalTexts(EXAMPLES, tokenizer, prompts=False, progress=False), []
    counted = {"evaluator": lambda *_, **__: calls.append(1) or {"mrr_mean": 0.5}}
    run = trainer(tmp_path, tokenizer, eval_dataset={"a": rows, "b": rows}, **counted)
    metrics = run.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_mrr_mean"} <= set(metrics)
    assert "eval_mrr_mean" not in run.evaluate(rows, metric_key_prefix="test")
    assert len(calls) == 1


@pytest.mark.slow
def test_sentence_transformer_trainer_keeps_the_best_checkpoint_too(tmp_path, sentence_transformer):
    evaluator = MultiExitEvaluator.from_pairs(ROWS, candidates=8)
    run = SentenceTransformerTrainer(
        sentence_transformer,
        SentenceTransformerTrainingArguments(str(tmp_path), **TRAINING),
        Dataset.from_dict({"anchor": [row[0] for row in ROWS], "positive": [row[1] for row in ROWS]}),
        loss=MultipleNegativesRankingLoss(sentence_transformer),
        evaluator=evaluator,
        callbacks=[SpoilLastStep()],
    )
    run.train()
    assert evaluator.primary_metric in evaluator(run.model)
    check_best_checkpoint(run)


def test_metrics_are_those_of_encode_at_each_exit_with_the_published_prompts(sentence_transformer):
    found = scores(sentence_transformer, candidates=8, seed=1)
    languages = {"python": "python", "ruby": "ruby", "sql": None}  # the published prompts don't know SQL
    codes = [code_prompt(languages[language]) + code for _, code, language in ROWS]
    texts = ([text_prompt() + row[0] for row in ROWS], codes)
    for k in EXIT_LAYERS:
        queries, documents = (sentence_transformer.encode(part, prompt="", exit_layer=k) for part in texts)
        expected = reciprocal_ranks(queries, documents, size=8, seed=1)
        assert found[f"mrr_exit_{k}"] == pytest.approx(expected.mean(), abs=1e-6)


def test_a_model_alone_scores_as_the_sentence_transformer_around_it(sentence_transformer, tokenizer):
    alone = scores(sentence_transformer[0].auto_model, exit_layers=(2,), tokenizer=tokenizer)
    assert scores(sentence_transformer, exit_layers=(2,)) == alone
    assert {name for name in alone if name.startswith("mrr")} == {"mrr_exit_2", "mrr_mean", "mrr_worst"}


def test_the_example_of_the_documentation_scores_every_exit_of_the_shipped_model():
    wrapped, (model, tokenizer) = scores(SentenceTransformer(shipped_model())), load_checkpoint(shipped_model())
    assert wrapped == pytest.approx(scores(model, tokenizer=tokenizer), abs=1e-6)
    assert {f"mrr_exit_{k}" for k in (0, 1, 2, 4, 6)} < wrapped.keys()


def test_prompts_can_be_given_and_a_name_tells_evaluators_apart(sentence_transformer):
    plain, bare = scores(sentence_transformer), scores(sentence_transformer, prompts={})
    sentence_transformer.prompts = {}
    assert scores(sentence_transformer) == bare != plain
    texts = ({"q": "add"}, {"a": "def add", "b": "def find"}, {"q": ["a"]})
    evaluator = MultiExitEvaluator.from_mappings(*texts, name="small")
    assert evaluator.primary_metric == "small_mrr_mean"
    assert evaluator.primary_metric in evaluator(sentence_transformer)


def test_other_models_and_embeddings_are_an_error(sentence_transformer, model):
    with raises("evaluator.tokenizer.missing"):
        scores(model)
    with raises("evaluator.model.other", "Dense"):
        scores(SentenceTransformer(modules=[*sentence_transformer, Dense(16, 4)]))
    with raises("evaluator.model.other"):
        scores(SentenceTransformer(modules=[sentence_transformer[0], Pooling(16, pooling_mode="max")]))
    with pytest.raises(ValueError, match="its exits are 1, 2, 4"):
        scores(sentence_transformer, exit_layers=(3,))
    with raises("evaluation.candidates.too_few", 1):
        MultiExitEvaluator.from_pairs(ROWS, candidates=1)
