"""What the page asks of an index: one question at one exit, timed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from modular_star_encoder.search.cascade import Cascade
from modular_star_encoder.search.hits import Answer, Hit
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.vector_store import readable_path

TOP_K = 5
CANDIDATES = 50
LONGEST_QUESTION = 2000
EXPECTED_ERRORS = (ValueError, OSError, ImportError)
"""What a user can mend: shown in one sentence, never as a traceback."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer and what it took.

    Attributes:
        answer: the hits.
        exit_layer: the exit that was asked.
        milliseconds: to embed the question and to rank, with nothing remembered of questions before; wall-clock time,
            on the machine that serves the page.
    """

    answer: Answer
    exit_layer: int
    milliseconds: float


class SearchSession:
    """An open index, its exits, and the exits of its checkpoint that can re-rank.

    Attributes:
        index: the index.
        checkpoint: folder or Hub id of its checkpoint.
        exit_layers: exits that can be asked, ascending.
        rerank_exit_layers: exits of the checkpoint deeper than the shallowest of the index; none where the checkpoint
            can't be used.
        problem: one sentence that says why the checkpoint can't be used, such as that it isn't the one that the index
            was built with; None if it can.

    Args:
        index: as `CodeIndex.open` gives it; its checkpoint is opened here.
        checkpoint: where that is now, if not where it was.
    """

    def __init__(self, index: CodeIndex, checkpoint: str | None = None) -> None:
        self.index = index
        self.checkpoint = checkpoint or index.settings.checkpoint
        self.exit_layers = index.settings.exit_layers
        self.rerank_exit_layers: tuple[int, ...] = ()
        self.problem: str | None = None
        try:
            if checkpoint is not None:
                self.index = CodeIndex.open(index.store, checkpoint=checkpoint)
            exits = self.index.embedder.config.exit_layers
            # Loads the layers of the deepest exit, so that no question's time is that of loading.
            self.index.search(["warm up"], top_k=1, exit_layer=self.exit_layers[-1])
        except EXPECTED_ERRORS as error:
            self.problem = one_sentence(error)
        else:
            self.rerank_exit_layers = tuple(one for one in exits if one > self.exit_layers[0])

    def ask(
        self,
        question: str,
        exit_layer: int,
        *,
        languages: Sequence[str] = (),
        path: str = "",
        rerank_exit_layer: int | None = None,
    ) -> Reply:
        """Answer a question at an exit.

        Args:
            question: in prose.
            exit_layer: one of `exit_layers`.
            languages: count only rows in these; all if empty.
            path: count only files of this pattern; all if blank.
            rerank_exit_layer: a deeper exit that ranks the best again; passed over where it isn't deeper.

        Raises:
            ValueError: a blank or overlong question, an exit that there isn't, a pattern that is none, or another
                checkpoint than the index was built with.
            OSError, ImportError: as `CodeIndex.search`.
        """
        if not question.strip():
            raise ValueError("Type a question first: say in a few words what the code should do.")
        if len(question) > LONGEST_QUESTION:
            raise ValueError(f"A question has {LONGEST_QUESTION:,} characters at most, not {len(question):,}.")
        if self.problem:
            raise ValueError(self.problem)
        cascade = None
        if rerank_exit_layer is not None and rerank_exit_layer > exit_layer:
            cascade = Cascade(rerank_exit_layer, CANDIDATES)
        self.index.embedder.forget()  # else re-ranking would take whoever asks second no time
        start = time.perf_counter()
        (answer,) = self.index.search(
            [question],
            top_k=TOP_K,
            exit_layer=exit_layer,
            cascade=cascade,
            languages=languages or None,
            path=path if path.strip() else None,
        )
        return Reply(answer, exit_layer, 1000 * (time.perf_counter() - start))

    def path_of(self, hit: Hit) -> str:
        """The path of a hit from the folder that is indexed, with forward slashes."""
        return os.path.relpath(hit.path, readable_path(self.index.folder)).replace(os.sep, "/")


def one_sentence(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
