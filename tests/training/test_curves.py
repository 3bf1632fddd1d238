"""The picture of a run."""

import pytest

from modular_star_encoder.training.pretraining import plot_curves
from tests.errors import raises

pytest.importorskip("matplotlib")


def log(exits=(1, 2)):
    history = [
        {
            "step": step,
            f"{prefix}mlm_loss_exit_{exit_layer}": 7.0 - step,
            f"{prefix}icc_accuracy_exit_{exit_layer}": 0.5,
        }
        for step in (1, 2, 3)
        for prefix in ("", "eval_")
        for exit_layer in exits
    ]
    return {"log_history": history, "unigram_entropy": 7.0, "identifier_overlap": {"accuracy": 0.6}}


def drawn_lines(monkeypatch, path, content):
    """The labelled lines of both panels."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (figures.append(self), save(self, *args, **options))
    )
    plot_curves(content, path)
    return [
        {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}
        for axes in figures[0].axes
    ]


def test_every_exit_has_its_held_out_curve_in_both_panels(tmp_path, monkeypatch):
    losses, accuracies = drawn_lines(monkeypatch, tmp_path / "curves.png", log())
    assert losses == {"exit 1": [6, 5, 4], "exit 2": [6, 5, 4]}
    assert set(accuracies) == {"exit 1", "exit 2"}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_log_without_training_is_refused_and_the_old_picture_stays(tmp_path):
    (tmp_path / "curves.png").write_text("old")
    with raises("training.log.empty"):
        plot_curves(log(exits=()), tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_text() == "old"
