"""Held-out rows of fine-tuning as tasks: find the code of a description, and the same code in another language.

Protocol: at most 1000 candidates, those of the batches of `distractors`; of rows that share a text one is taken, so
that no candidate but the relevant one is right. With several programming languages, those of others are easy ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modular_star_encoder.data.batch_plan import CODE_TO_CODE, TEXT_TO_CODE, PairGroups
from modular_star_encoder.data.parallel_texts import ParallelText
from modular_star_encoder.evaluation.distractors import distractor_batches
from modular_star_encoder.evaluation.tasks import Judgements, Pool, RetrievalTask, Text

POOL = 1000
BENCHMARKS = {TEXT_TO_CODE: "held-out, text → code", CODE_TO_CODE: "held-out, code → code"}


def held_out_tasks(texts: Sequence[ParallelText], *, limit: int = 1000, seed: int = 0) -> list[RetrievalTask]:
    """A task for each kind of pairs of which there are two at least.

    Args:
        texts: the rows.
        limit: queries of a task, drawn at random; above 1000 whole thousands of them, each ranked in its own.
        seed: of the draw.
    """
    groups = PairGroups(texts)
    tasks = []
    for kind, rows_of_groups in groups.rows.items():
        generator = np.random.default_rng((seed, len(tasks)))
        drawn = generator.permutation(len(rows_of_groups))[:limit]
        if len(drawn) > POOL:
            drawn = drawn[: len(drawn) // POOL * POOL]  # batches drop what is left over
        if len(drawn) > 1:
            tasks.append(_task(kind, [texts[rows_of_groups[group][0]] for group in drawn], generator))
    return tasks


def _task(kind: str, texts: Sequence[ParallelText], generator: np.random.Generator) -> RetrievalTask:
    queries, documents = [], []
    for text in texts:
        if kind == TEXT_TO_CODE:
            (query, language), answer = (text.description, None), text.snippets[0]
        else:
            places = generator.choice(len(text.snippets), size=2, replace=False)
            first, answer = (text.snippets[place] for place in places)
            query, language = first.code, first.language
        queries.append(Text(query, language))
        documents.append(Text(answer.code, answer.language))
    return RetrievalTask(
        benchmark=BENCHMARKS[kind],
        name="all languages",
        queries=queries,
        documents=documents,
        query_ids=[str(number) for number in range(len(texts))],
        judgements=Judgements.one_each(range(len(texts))),
        pools=tuple(Pool(batch, batch) for batch in distractor_batches(len(texts), POOL)),
    )
