from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import entropy

from modular_star_encoder.objectives import contrastive as contrastive_losses
from modular_star_encoder.objectives.contrastive import ContrastiveObjective, losses_from_embeddings
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from tests.errors import raises
from tests.objectives.contrastive_batches import every_option, every_side
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model


def stacks(*sides, exits=3, rows=4, size=16):
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(len(sides), exits, rows, size, generator=generator)
    found = torch.nn.functional.normalize(draw, dim=-1).unbind(0)
    return {side: stack.clone().requires_grad_() for side, stack in zip(sides, found, strict=True)}


def pair(**changes):
    return stacks("query", "document", **changes)


def literal_cross_entropy(rows, columns, scale, left_out=()):
    """Mean over rows, the candidate of row i being column i, in numpy and float64."""
    scores = scale * np.array(rows) @ np.array(columns).T
    own = np.diag(scores).copy()
    for place in left_out:
        scores[place] = -np.inf
    return (logsumexp(scores, axis=1) - own).mean()


def literal_clip_loss(queries, documents, scale, negatives=(), left_out=(), back=()):
    by_query = literal_cross_entropy(queries, [*documents, *negatives], scale, left_out)
    return (by_query + literal_cross_entropy(documents, queries, scale, back)) / 2


def test_the_loss_equals_the_formula_written_out_at_every_exit():
    sides = pair()
    output = losses_from_embeddings(sides, EXIT_LAYERS)
    lists = zip(sides["query"].tolist(), sides["document"].tolist(), strict=True)
    expected = [literal_clip_loss(queries, documents, 10.0) for queries, documents in lists]
    assert output.losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert output.losses.requires_grad
    assert output.metrics["clip_loss"].tolist() == output.losses.tolist()
    assert max(expected) - min(expected) > 1e-2
    sides = {"query": torch.eye(4)[None], "document": torch.eye(4)[[0, 1, 3, 2]][None]}
    assert losses_from_embeddings(sides, (1,)).metrics["clip_accuracy"].tolist() == [0.5]


def test_hard_negatives_are_candidates_of_every_query_and_never_rows():
    sides = stacks("query", "document", "first", "second")
    settings = ContrastiveSettings(pairs=[["query", "document", "first", "second"]], logit_scale=3.0)
    losses = losses_from_embeddings(sides, EXIT_LAYERS, settings).losses
    for exit_losses, *of_exit in zip(losses.tolist(), *(stack.tolist() for stack in sides.values()), strict=True):
        queries, documents, first, second = of_exit
        assert exit_losses == pytest.approx(literal_clip_loss(queries, documents, 3.0, first + second), rel=1e-5)


def test_several_sets_of_pairs_count_by_their_rows_and_keep_their_candidates_apart():
    sides = stacks("description", "code") | stacks("code_a", "code_b", rows=2)
    settings = ContrastiveSettings(pairs=(("description", "code"), ("code_a", "code_b")))
    output = losses_from_embeddings(sides, EXIT_LAYERS, settings)

    def alone(names):
        own = {side: sides[side] for side in names}
        return losses_from_embeddings(own, EXIT_LAYERS, ContrastiveSettings(pairs=(names,))).losses

    parts = [alone(names) for names in settings.pairs]
    torch.testing.assert_close(output.losses, (4 * parts[0] + 2 * parts[1]) / 6)
    assert {"clip_accuracy_description_code", "clip_accuracy_code_a_code_b"} <= set(output.metrics)


def test_embedding_sizes_are_trained_on_cut_and_normalised_embeddings():
    sides = pair()
    output = losses_from_embeddings(sides, EXIT_LAYERS, ContrastiveSettings(dimensions={1: [4], 4: [8, 16]}))

    def at(size):
        cut = {side: torch.nn.functional.normalize(stack[..., :size], dim=-1) for side, stack in sides.items()}
        return losses_from_embeddings(cut, EXIT_LAYERS)

    expected = torch.stack([at(4).losses[0], at(16).losses[1], (at(8).losses[2] + at(16).losses[2]) / 2])
    torch.testing.assert_close(output.losses, expected)
    accuracies = [at(size).metrics["clip_accuracy"] for size in (4, 8, 16)]
    whole = torch.stack([accuracies[0][0], accuracies[2][1], accuracies[2][2]])
    smallest = torch.stack([accuracies[0][0], accuracies[2][1], accuracies[1][2]])
    assert torch.equal(output.metrics["clip_accuracy"], whole)
    assert torch.equal(output.metrics["clip_accuracy_smallest"], smallest)


def literal_distillation(scores, teacher, pupil, scale):
    """Both directions' mean KL divergence, from (E, B, B) similarities; `teacher` makes one matrix of them."""
    directions = []
    for matrices in (scores, scores.transpose(1, 2)):
        wanted, found = (softmax(scale * one.double().numpy(), axis=1) for one in (teacher(matrices), matrices[pupil]))
        directions.append(entropy(wanted, found, axis=1).mean())
    return np.mean(directions)


@pytest.mark.parametrize(
    ("teacher", "teachers"),
    [
        ("deepest", (lambda s: s[2], lambda s: s[2], None)),
        ("next_deeper", (lambda s: s[1], lambda s: s[2], None)),
        ("ensemble", (lambda s: s.mean(dim=0),) * 3),
        (2, (lambda s: s[1], None, lambda s: s[1])),
    ],
)
def test_distillation_equals_its_formula_and_leaves_the_teacher_alone(teacher, teachers):
    sides = pair()
    settings = ContrastiveSettings(teacher=teacher, distillation_weight=0.5, distillation_temperature=2.0)
    output = losses_from_embeddings(sides, EXIT_LAYERS, settings)
    scores = torch.einsum("eqd,ecd->eqc", *(stack.detach() for stack in sides.values()))
    expected = [
        4 * literal_distillation(scores, make, pupil, 10.0 / 2.0) if make else 0.0
        for pupil, make in enumerate(teachers)
    ]
    assert output.metrics["distillation_loss"].tolist() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(output.terms["distillation"], 0.5 * output.metrics["distillation_loss"])
    for pupil, make in enumerate(teachers):
        # What one exit's term does to the embeddings of each.
        gradients = torch.autograd.grad(output.terms["distillation"][pupil], list(sides.values()), retain_graph=True)
        touched = torch.stack([gradient.abs().amax(dim=(1, 2)) for gradient in gradients]).amax(dim=0)
        assert [bool(value > 0) for value in touched] == [place == pupil and make is not None for place in range(3)]


@pytest.mark.parametrize(("target", "places"), [("deepest", (2, 2, 2)), ("next_deeper", (1, 2, 2)), (1, (0, 0, 0))])
def test_alignment_is_one_minus_the_cosine_to_the_target_which_it_leaves_alone(target, places):
    sides = pair()
    settings = ContrastiveSettings(alignment_weight=2.0, alignment_target=target)
    output = losses_from_embeddings(sides, EXIT_LAYERS, settings)
    joint = torch.cat(list(sides.values()), dim=1).detach().numpy()
    expected = [np.mean(1 - (joint[place] * joint[other]).sum(axis=1)) for place, other in enumerate(places)]
    assert output.metrics["alignment_loss"].tolist() == pytest.approx(expected, abs=1e-6)
    output.terms["alignment"].sum().backward()
    touched = [stack.grad.abs().amax(dim=(1, 2)) > 0 for stack in sides.values()]
    assert torch.stack(touched).any(dim=0).tolist() == [place != other for place, other in enumerate(places)]


LIMITS = [({"false_negative_margin": 0.1}, lambda s: s - 0.1), ({"false_negative_factor": 0.9}, lambda s: 0.9 * s)]


@pytest.mark.parametrize(("option", "limit"), LIMITS)
def test_negatives_that_the_deepest_exit_finds_as_similar_as_the_pair_are_left_out(option, limit):
    sides = {side: stack.detach() for side, stack in pair().items()}
    # One document repeats another almost; all pairs are similar, so that few negatives are left out.
    sides["document"] = torch.nn.functional.normalize(sides["query"] + 0.5 * sides["document"], dim=-1)
    sides["document"][:, 1] = sides["document"][:, 0]
    guide = torch.einsum("qd,cd->qc", sides["query"][-1], sides["document"][-1])
    others = list(permutations(range(4), 2))
    left_out = {(i, j) for i, j in others if guide[i, j] > limit(guide[i, i])}
    back = {(i, j) for i, j in others if guide[j, i] > limit(guide[i, i])}
    assert 0 < len(left_out) < 12
    output = losses_from_embeddings(sides, EXIT_LAYERS, ContrastiveSettings(**option))
    lists = (stack.tolist() for stack in (output.losses, sides["query"], sides["document"]))
    for exit_loss, queries, documents in zip(*lists, strict=True):
        expected = literal_clip_loss(queries, documents, 10.0, left_out=left_out, back=back)
        assert exit_loss == pytest.approx(expected, rel=1e-5)
    assert output.metrics["masked_negatives"].item() == pytest.approx((len(left_out) + len(back)) / 24)


@pytest.mark.parametrize("scores_per_chunk", [1, 150])
def test_chunks_of_scores_change_neither_losses_nor_gradients(monkeypatch, scores_per_chunk):
    def run():
        sides = stacks("query", "document", "negative", "translation", rows=7)
        scale = torch.tensor([12.0], requires_grad=True)
        output = losses_from_embeddings(sides, EXIT_LAYERS, every_option(), scale)
        output.losses.sum().backward()
        return output, torch.cat([scale.grad, *(stack.grad.flatten() for stack in sides.values())])

    whole, expected = run()
    monkeypatch.setattr(contrastive_losses, "SCORES_PER_CHUNK", scores_per_chunk)
    cut, found = run()
    torch.testing.assert_close(cut.losses, whole.losses)
    torch.testing.assert_close(found, expected)
    assert cut.metrics.keys() == whole.metrics.keys()
    for name, values in whole.metrics.items():
        torch.testing.assert_close(cut.metrics[name], values, msg=name)


def test_scores_of_chunks_are_not_kept(monkeypatch):
    def largest_kept(scores_per_chunk):
        monkeypatch.setattr(contrastive_losses, "SCORES_PER_CHUNK", scores_per_chunk)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda _: None):
            losses_from_embeddings(pair(rows=64), EXIT_LAYERS)
        return max(sizes)

    assert largest_kept(3 * 64 * 64) == 3 * 64 * 64
    assert largest_kept(3 * 64 * 8) < 3 * 64 * 64 / 2


def test_similarities_are_computed_in_float32_under_autocast():
    sides = {side: stack.detach().bfloat16() for side, stack in pair().items()}
    expected = losses_from_embeddings({side: stack.float() for side, stack in sides.items()}, EXIT_LAYERS).losses
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_from_embeddings(sides, EXIT_LAYERS).losses
    assert losses.dtype == torch.float32
    assert torch.equal(losses, expected)


def test_a_learned_scale_has_a_gradient_but_none_of_distillation_and_is_reported():
    scale, settings = torch.tensor([5.0], requires_grad=True), ContrastiveSettings(distillation_weight=1.0)
    output = losses_from_embeddings(pair(), EXIT_LAYERS, settings, scale)
    fixed = losses_from_embeddings(pair(), EXIT_LAYERS, ContrastiveSettings(logit_scale=5.0, distillation_weight=1.0))
    torch.testing.assert_close(output.losses, fixed.losses)
    assert torch.autograd.grad(output.terms["distillation"].sum(), scale, allow_unused=True) == (None,)
    output.losses.sum().backward()
    assert scale.grad.abs() > 1e-3
    assert output.metrics["logit_scale"].item() == 5.0


def test_sides_that_do_not_fit_are_refused():
    with raises("contrastive.sides", "document, negative, query,", "use document, query"):
        losses_from_embeddings(stacks("query", "document", "negative"), EXIT_LAYERS)
    with raises("contrastive.sides", "document, negative, query, translation"):  # before anything is embedded
        ContrastiveObjective()(None, every_side(), EXIT_LAYERS)
    ids = torch.ones(4, 2, dtype=torch.long)
    with raises("contrastive.sides", "attention_mask, input_ids"):  # a batch of one side
        ContrastiveObjective()(None, {"input_ids": ids, "attention_mask": ids}, EXIT_LAYERS)
    for side in ("text", ["text"], {"input_ids": ids.tolist()}):
        with raises("contrastive.rows", "query, document have [4, 0] rows"):
            ContrastiveObjective()(None, {"query": {"input_ids": ids}, "document": side}, EXIT_LAYERS)
    sides = pair()
    with raises("contrastive.rows", "query, document have [4, 3] rows"):
        losses_from_embeddings(sides | {"document": sides["document"][:, :3]}, EXIT_LAYERS)

    class Halves(torch.nn.Module):
        def forward(self, **inputs):
            output = tiny_model()(**inputs)
            output.exit_embeddings = output.exit_embeddings.repeat(2, 1, 1)  # as nn.DataParallel gathers them
            return output

    with raises("contrastive.data_parallel"):
        ContrastiveObjective()(Halves(), {"query": tiny_batch(), "document": tiny_batch()}, EXIT_LAYERS)


def test_every_side_is_embedded_at_every_exit_and_every_option_reports_its_term():
    model, batch = tiny_model(logit_scale_init_value=7.0).eval(), every_side()
    output = ContrastiveObjective(every_option())(model, batch, EXIT_LAYERS)
    found = {side: model(**batch[side], exit_layers=EXIT_LAYERS).exit_embeddings for side in batch}
    expected = losses_from_embeddings(found, EXIT_LAYERS, every_option(), model.logit_scale())
    torch.testing.assert_close(output.losses, expected.losses)
    terms = {"clip_loss", "clip_accuracy", "clip_accuracy_smallest", "distillation_loss", "alignment_loss"}
    pairs = {"clip_accuracy_query_document", "clip_accuracy_document_translation"}
    assert set(output.metrics) == terms | pairs | {"masked_negatives", "logit_scale"}
    assert all(output.metrics[name].shape == (3,) for name in terms | pairs)
    assert not any(value.requires_grad for value in output.metrics.values())
    parts = output.metrics["clip_loss"] + 0.7 * output.metrics["distillation_loss"]
    torch.testing.assert_close(output.losses.detach(), parts + 0.5 * output.metrics["alignment_loss"])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("logit_scale", (0, float("nan"), "ten")),
        ("alignment_weight", (True, -0.5)),
        ("mini_batch_tokens", (0, 8.5)),
        ("alignment_target", ("ensemble",)),
        ("dimensions", ([], [64, 64], [[8], [16]], {4: None}, {"four": [64]})),
        ("false_negative_margin", (3.0,)),
        ("pairs", ((), ("query", "document"), [["query"]], [["query", "query"]], [["query", "document"]] * 2)),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence_that_names_the_setting(name, values):
    for value in values:
        with raises("settings.value", name) as error:
            ContrastiveSettings(**{name: value})
        assert "\n" not in str(error.value)
    with raises("settings.value", "false_negative_factor"):
        ContrastiveSettings(false_negative_margin=0.0, false_negative_factor=0.95)


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"teacher": 9, "distillation_weight": 1.0}, "contrastive.exit", "exit 9, but the trained exits are 4, 18, 36"),
        ({"alignment_target": 27, "alignment_weight": 1.0}, "contrastive.exit", "`alignment_target` names exit 27"),
        ({"dimensions": {9: [64]}}, "contrastive.exit", "`dimensions` names exit 9"),
        ({"dimensions": [64, 2048]}, "contrastive.dimensions", "1024, not 2048"),
        ({"dimensions": {18: [2048]}}, "contrastive.dimensions", 1024),
    ],
)
def test_exits_and_sizes_that_the_model_does_not_have_are_refused(changes, key, value):
    with raises(key, value):
        ContrastiveSettings(**changes).check((4, 18, 36), 1024)
    ContrastiveSettings(teacher=9, alignment_target=9).check((4, 18, 36), 1024)
    settings = {"teacher": 0, "alignment_target": 0, "dimensions": {0: [64]}}  # exit 0 is named as every other exit
    ContrastiveSettings(**settings, distillation_weight=1.0, alignment_weight=1.0).check((0, 2), 1024)


@pytest.mark.parametrize("name", ["teacher", "alignment_target"])
def test_exits_that_are_trained_in_turn_learn_from_the_deepest_alone(name):
    weight = {"teacher": "distillation_weight", "alignment_target": "alignment_weight"}[name]
    for chosen in (9, "next_deeper"):
        settings = ContrastiveSettings(**{name: chosen, weight: 1.0})
        settings.check((9,), 64, rotates=True)
        with raises("contrastive.rotation", f"{name}={chosen!r}"):
            settings.check((4, 9, 36), 64, rotates=True)
    for values in ({name: 36, weight: 1.0}, {name: "deepest", weight: 1.0}, {name: 9}):
        ContrastiveSettings(**values).check((4, 9, 36), 64, rotates=True)
