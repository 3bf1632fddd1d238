"""Splits rows into training and evaluation rows, and chooses the rows of each batch.

In contrastive learning, each row of a batch takes the other rows as negatives, texts that must not match. So rows that
share a description or code, directly or through other rows, form a *group*, and a batch has at most one row of a group.
"""

import hashlib
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from modular_star_encoder.data.functions import code_key, description_key
from modular_star_encoder.data.pairs import RetrievalExample, Snippet, SourceExamples, read_retrieval_examples
from modular_star_encoder.data.sources.dataset_rows import parquet_rows
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import read_record, staged_folder, write_json

MAX_TEST_SHARE = 0.2
REPORT = "report.json"
FEW_HELD_OUT = 100  # with fewer, the interval of an MRR of 0.8 is more than about 0.07 on each side
TEXT_TO_CODE, CODE_TO_CODE = "text → code", "code → code"

_REPLACEMENTS, _NEGATIVES = 2, 3  # numbers of random streams; the two kinds of pairs have 0 and 1


def hashed_order(names: Iterable[str], seed: int) -> list[str]:
    """Return the names sorted by a hash of the seed and the name, so that a new name does not reorder the others."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())


def check_enough(names: Collection[str]) -> None:
    """Raise UserError if `names` has fewer than two repositories: training and held-out rows need one each."""
    if len(names) < 2:
        message = f"Training and held-out data need at least two repositories, not {len(names)}."
        advice = "A row without a repository counts as a repository."
        raise UserError("data.split.too_few_repositories", f"{message} {advice}")


def draw_repositories(
    sizes: Mapping[str, int], *, seed: int, min_test: int = 2000, max_repository_share: float = 0.05
) -> set[str]:
    """Return the names of the repositories to hold out; `sizes` maps each repository to its number of rows.

    Repositories are drawn until they have `min_test` rows, or a fifth of all rows if that is less. Repositories with
    more than the share `max_repository_share` of all rows are drawn last.
    """
    check_enough(sizes)
    total = sum(sizes.values())
    target = min(min_test, max(1, round(MAX_TEST_SHARE * total)))
    allowed = {name for name in sizes if sizes[name] <= max_repository_share * total}
    order = hashed_order(allowed, seed) + sorted(sizes.keys() - allowed, key=lambda name: (sizes[name], name))
    before = accumulate((sizes[name] for name in order), initial=0)  # functions in the repositories drawn earlier
    return {name for name, count in zip(order[:-1], before, strict=False) if count < target}


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """Rows to fine-tune a retrieval model on, and held-out rows to evaluate it, both in the order of the sources."""

    train: list[RetrievalExample]
    held_out: list[RetrievalExample]  # none of their repositories, descriptions or codes is in `train`
    report: dict[str, Any]  # what was read, skipped, held out, and left out because it overlaps with held-out rows


def prepare_retrieval_data(
    settings: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    eval_fraction: float,
    seed: int,
    max_train_samples: int | None = None,
    progress: bool = True,
    store: bool = True,
) -> RetrievalData:
    """Return the training and held-out rows of a recipe, from `folder` or, if `folder` has no rows, from the sources.

    If `store`, rows from the sources are written to `folder`. `settings` is the recipe's `data`, with the sources.
    Whole repositories are held out, with about the share `eval_fraction` (at most 0.2) of each source's rows. Rows
    without a repository are held out one by one. `seed` decides which rows are held out.
    """
    folder = Path(folder)
    arguments = {"eval_fraction": eval_fraction, "seed": seed, "max_train_samples": max_train_samples}
    requested = json.loads(json.dumps({"data": dict(settings), **arguments}, default=str))
    if (folder / REPORT).is_file():
        counts: dict[str, Any] = dict.fromkeys(("shared_with_held_out", "train", "held_out"), int)
        report = read_record(folder / REPORT, "data.split.damaged", settings=dict, sources=dict, **counts)
        if report["settings"] != requested:
            other = ", ".join(name for name in requested if report["settings"].get(name) != requested[name])
            message = f"The rows in {folder} were made with other values of the keys {other}: name another folder."
            raise UserError("data.split.other_settings", message)
        data = RetrievalData(_rows(folder / "train.parquet"), _rows(folder / "held_out.parquet"), report)
    else:
        data = _split_sources(read_retrieval_examples(settings, progress=progress), requested)
        if store:
            store_retrieval_data(data, folder)
    if progress:
        _print_counts(data.report)
        _warn_of_copies(data.held_out)
    return data


def _warn_of_copies(held_out: Sequence[RetrievalExample]) -> None:
    """Print a warning if most held-out descriptions occur in their own code, as docstrings do."""
    described = [row for row in held_out if row.description]
    texts = ((_words(row.description), _words(row.snippets[0].code)) for row in described)
    if (copies := sum(len(one.split()) > 2 and one in code for one, code in texts)) > len(described) / 2:
        print(
            f"warning: {copies:,} of {len(described):,} held-out descriptions occur word for word in their code, so\n"
            "the scores measure how well copied words are found. Remove docstrings and comments from the code."
        )


def _words(text: str) -> str:
    return " ".join(["", *re.findall(r"\w+", text), ""])  # compared without comment marks and punctuation


def _print_counts(report: Mapping[str, Any]) -> None:
    for name, source in report["sources"].items():
        print(f"{name}: {source['rows']:,} rows")
        if name == "pairs":
            named = report["settings"]["data"][name]["columns"]
            columns = [f"{role}: {column}" for role, column in named.items() if column]
            print(f'  columns {", ".join(columns)}; to change them: "data.columns={{query: NAME, positive: NAME}}"')
        for reason, count in source["skipped"].items():
            print(f"  skipped {count:,}: {reason}")
            for example in source["examples"].get(reason, ()):
                print(f"    {example}")
    parts = [f"{report['train']:,} rows to train on", f"{report['held_out']:,} held out"]
    if report["held_out"] < FEW_HELD_OUT and report["settings"]["eval_fraction"] < MAX_TEST_SHARE:
        parts[1] += f" (too few for exact scores: eval_fraction={MAX_TEST_SHARE} and another --out hold out more)"
    left_out = {
        "share a text or a repository with a held-out row": report["shared_with_held_out"],
        f"beyond max_train_samples={report['settings']['max_train_samples']}": report.get("not_drawn", 0),
    }
    print(", ".join(parts + [f"{count:,} left out ({reason})" for reason, count in left_out.items() if count]))


def store_retrieval_data(data: RetrievalData, folder: Path) -> None:
    """Write the rows and the report of `data` to `folder`, all files at once, unless `folder` already has a report."""
    if not (folder / REPORT).is_file():
        with staged_folder(folder) as staging:
            for name in ("train", "held_out"):
                pyarrow.parquet.write_table(_table(getattr(data, name)), staging / f"{name}.parquet")
            write_json(staging / REPORT, data.report)


def _split_sources(sources: Mapping[str, SourceExamples], requested: dict[str, Any]) -> RetrievalData:
    seed, limit = requested["seed"], requested["max_train_samples"]
    texts = [text for found in sources.values() for text in found.texts]
    drawn_rows: list[bool] = []
    for found in sources.values():
        # A row without a repository is drawn by itself.
        names = [text.repository or f"row {row}" for row, text in enumerate(found.texts)]
        least = max(2, round(requested["eval_fraction"] * len(names)))
        drawn = draw_repositories(Counter(names), seed=seed, min_test=least)
        drawn_rows += [name in drawn for name in names]
    held_out = np.array(drawn_rows, dtype=bool)
    unseen, groups = np.flatnonzero(held_out), same_content_groups(texts)
    # Each source draws its own repositories to hold out, so one that is held out in one source may be in another.
    repositories = {texts[row].repository for row in unseen} - {""}
    leaked = np.isin(groups, groups[unseen]) | np.array([text.repository in repositories for text in texts])
    if (negatives := groups_of_negatives(texts, groups)) is not None:
        leaked |= np.isin(negatives, groups[unseen])
    leaked &= ~held_out
    train = np.flatnonzero(~held_out & ~leaked)
    if len(train) < (limit or 1):
        key = "max_train_samples" if limit else "nothing_to_train"
        message = f"Training needs {limit or 1} or more rows that share no text or repository with held-out rows."
        raise UserError(f"data.split.{key}", f"{message} There are {len(train)}. Add data or lower max_train_samples.")
    if limit is not None:
        train = np.sort(np.random.default_rng(seed).permutation(train)[:limit])
    report = {
        "settings": requested,
        "sources": {
            name: {"rows": len(found.texts), "skipped": dict(found.skipped), "examples": found.examples}
            for name, found in sources.items()
        },
        "shared_with_held_out": int(leaked.sum()),
        "not_drawn": len(texts) - len(unseen) - int(leaked.sum()) - len(train),
        "train": len(train),
        "held_out": len(unseen),
        "held_out_repositories": sorted(repositories),
    }
    return RetrievalData([texts[row] for row in train], [texts[row] for row in unseen], report)


def _table(texts: Sequence[RetrievalExample]) -> pyarrow.Table:
    columns = {
        "description": [text.description for text in texts],
        "languages": [[snippet.language for snippet in text.snippets] for text in texts],
        "codes": [[snippet.code for snippet in text.snippets] for text in texts],
        "repository": [text.repository for text in texts],
        "negative_language": [text.negative and text.negative.language for text in texts],
        "negative_code": [text.negative and text.negative.code for text in texts],
    }
    text = pyarrow.large_string()  # a column of `string` holds at most 2 GiB
    kinds = (text, pyarrow.large_list(text), pyarrow.large_list(text), text, text, text)
    return pyarrow.table(columns, schema=pyarrow.schema(list(zip(columns, kinds, strict=True))))


def _rows(path: Path) -> list[RetrievalExample]:
    rows = []
    for row in parquet_rows(path):
        snippets = tuple(map(Snippet, row["languages"], row["codes"]))
        negative = Snippet(row["negative_language"], row["negative_code"]) if row["negative_code"] else None
        rows.append(RetrievalExample(row["description"], snippets, row["repository"], negative))
    return rows


class Draw(NamedTuple):
    """One pair of a batch, made from one row of the data."""

    row: int  # index of this row
    kind: str  # text → code or code → code
    negative: int | None = None  # index of the row that gives the hard negative; None if not every row has one


def same_content_groups(texts: Sequence[RetrievalExample]) -> np.ndarray:
    """Return the group of each row, int64 (rows,). Rows that share texts, also through other rows, form a group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first_with: dict[bytes, int] = {}
    links: list[int] = []
    for row, text in enumerate(texts):
        for key in [description_key(text.description), *(code_key(snippet.code) for snippet in text.snippets)]:
            if key and (first := first_with.setdefault(_digest(key), row)) < row:
                links += [first, row]
    ends = np.array(links, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(ends.shape[1], bool), tuple(ends)), shape=(len(texts), len(texts)))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def groups_of_negatives(texts: Sequence[RetrievalExample], groups: np.ndarray) -> np.ndarray | None:
    """Return, for each row, the group that its hard negative belongs to, or −1 if it is in no group: int64 (rows,).

    Return None if a row has no hard negative.
    """
    negatives = [text.negative for text in texts if text.negative is not None]
    if not texts or len(negatives) < len(texts):
        return None
    group_of = {
        _digest(code_key(snippet.code)): group
        for text, group in zip(texts, groups.tolist(), strict=True)
        for snippet in text.snippets
    }
    return np.array([group_of.get(_digest(code_key(one.code)), -1) for one in negatives], dtype=np.int64)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=12).digest()


class PairGroups:
    """Groups of rows that share texts, for each kind of pair that rows can give: `TEXT_TO_CODE` and `CODE_TO_CODE`.

    `of_rows` has the number of each row's group, int64 (rows,), from `same_content_groups`; `negatives` is what
    `groups_of_negatives` returns. Three dictionaries have the kinds of pairs as keys: `numbers` has the groups that
    give pairs of this kind, int64 (groups,); `rows` has, for each of these groups, a list of the rows that give such
    pairs; `counts` has the number of these groups.
    """

    def __init__(self, texts: Sequence[RetrievalExample]) -> None:
        """Rows with a description give text → code pairs; rows with several snippets give code → code pairs."""
        rows: dict[str, dict[int, list[int]]] = {TEXT_TO_CODE: defaultdict(list), CODE_TO_CODE: defaultdict(list)}
        groups = same_content_groups(texts)
        self.of_rows, self.negatives = groups, groups_of_negatives(texts, groups)
        for row, (text, group) in enumerate(zip(texts, groups.tolist(), strict=True)):
            if text.description:
                rows[TEXT_TO_CODE][group].append(row)
            if len(text.snippets) > 1:
                rows[CODE_TO_CODE][group].append(row)
        present = [kind for kind in rows if rows[kind]]
        self.numbers = {kind: np.array(list(rows[kind]), dtype=np.int64) for kind in present}
        self.rows = {kind: list(rows[kind].values()) for kind in present}
        self.counts = {kind: len(rows[kind]) for kind in present}

    @property
    def largest_batch(self) -> int:
        """The largest number of pairs that every batch can have, whichever rows are drawn."""
        if len(self.numbers) < 2:
            return min(sum(self.counts.values()), self.most_groups_with_negative)
        # Each kind fills half of the batch, with pairs from different groups; the two halves have no group in common.
        code, text = self.numbers[CODE_TO_CODE], self.numbers[TEXT_TO_CODE]
        common = len(np.intersect1d(code, text))
        apart = max(min(len(code) // 2, common), len(code) - common)
        return 2 * min(len(text), len(code), apart, self.most_groups_with_negative // 2)

    @property
    def most_groups_with_negative(self) -> int:
        """The most groups that a batch may have so that a group outside of it is left to give a hard negative."""
        if self.negatives is None or (self.negatives < 0).any():
            return sys.maxsize
        return len(np.unique(self.negatives)) - 1


class BatchPlan:
    """Chooses the pairs of each batch from the data, the seed and the step alone, so that resuming needs only the step.

    In each epoch, the groups of rows (see `PairGroups`) come in a new random order. Each group gives one pair; in
    each epoch it is the group's next row. Text → code and code → code pairs alternate if there are both. A batch has at
    most one pair of a group, because two would be false negatives of each other. So a random unused group replaces a
    group that would come twice, and the hard negative of a random other row replaces a hard negative whose group is in
    the batch.
    """

    def __init__(self, groups: PairGroups, batch_size: int, seed: int) -> None:
        """`batch_size`: pairs per step in all processes; an even number if `groups` has both kinds of pairs."""
        self.batch_size, self.seed, self._groups = batch_size, seed, groups
        self._kinds = tuple(groups.numbers)
        largest, outside = groups.largest_batch, groups.most_groups_with_negative
        if batch_size > largest or batch_size < 2 or batch_size % len(self._kinds):
            counted = [f"{n} group{'s' * (n != 1)} of {kind} pairs" for kind, n in groups.counts.items()]
            even = ", an even number" if len(self._kinds) > 1 else ""
            negatives = f", and hard negatives in {outside + 1} groups" if outside < batch_size else ""
            message = f"A batch must have from 2 to {largest} pairs{even}, not {batch_size}: change batch_size or add"
            if largest < 2:
                message = f"Rows to train on, held-out rows not counted: {len(groups.of_rows)}. At least 2 rows that"
                message += " share no text are needed: add"
            message += " rows. Rows that share a text form a group, which gives a batch at most one pair."
            there = " and ".join(counted) or "no pairs"
            raise UserError("data.batch_size", f"{message} The training data has {there}{negatives}.")
        self._latest: tuple[int, list[Draw]] = (-1, [])
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def batch(self, step: int) -> list[Draw]:
        """Return the pairs of batch number `step`, counted from 0, in order."""
        if self._latest[0] != step:
            self._latest = step, self._make_batch(step)
        return self._latest[1]

    def _with_negatives(self, draws: list[Draw], step: int, groups: np.ndarray) -> list[Draw]:
        used = set(self._groups.of_rows[[draw.row for draw in draws]].tolist())
        generator = np.random.default_rng((self.seed, _NEGATIVES, step))
        rows = [draw.row for draw in draws]
        for place, row in enumerate(rows):
            # `PairGroups.largest_batch` guarantees that some row's hard negative is in no used group.
            while int(groups[row]) in used:
                rows[place] = row = int(generator.integers(len(groups)))
        return [draw._replace(negative=row) for draw, row in zip(draws, rows, strict=True)]

    def _make_batch(self, step: int) -> list[Draw]:
        share = self.batch_size // len(self._kinds)
        chosen: dict[str, tuple[np.ndarray, int]] = {}
        for kind in self._kinds:
            epoch, turn = divmod(step, self._groups.counts[kind] // share)
            chosen[kind] = self._order(kind, epoch)[turn * share : (turn + 1) * share], epoch
        if len(self._kinds) > 1:
            places, epoch = chosen[CODE_TO_CODE]
            taken = self._groups.numbers[TEXT_TO_CODE][chosen[TEXT_TO_CODE][0]]
            chosen[CODE_TO_CODE] = self._replace_taken(places, taken, step), epoch
        by_kind = []
        for kind, (places, epoch) in chosen.items():
            groups = (self._groups.rows[kind][place] for place in places)
            by_kind.append([Draw(rows[epoch % len(rows)], kind) for rows in groups])
        draws = [draw for together in zip(*by_kind, strict=True) for draw in together]
        negatives = self._groups.negatives
        return draws if negatives is None else self._with_negatives(draws, step, negatives)

    def _order(self, kind: str, epoch: int) -> np.ndarray:
        """Return the indices of the groups with pairs of `kind` (such as text → code), in a new order each epoch."""
        if self._orders.get(kind, (-1,))[0] != epoch:
            generator = np.random.default_rng((self.seed, self._kinds.index(kind), epoch))
            self._orders[kind] = epoch, generator.permutation(self._groups.counts[kind])
        return self._orders[kind][1]

    def _replace_taken(self, places: np.ndarray, taken: np.ndarray, step: int) -> np.ndarray:
        """Return a copy of `places` (indices of groups) in which random unused groups replace those in `taken`."""
        numbers = self._groups.numbers[CODE_TO_CODE]
        meets = np.flatnonzero(np.isin(numbers[places], taken))
        if not len(meets):
            return places
        used = set(taken.tolist()).union(numbers[places].tolist())
        generator, places = np.random.default_rng((self.seed, _REPLACEMENTS, step)), places.copy()
        for index in meets:
            # `PairGroups.largest_batch` guarantees that an unused group exists.
            while int(numbers[place := generator.integers(len(numbers))]) in used:
                pass
            places[index] = place
            used.add(int(numbers[place]))
        return places


def evaluation_plan(
    groups: PairGroups, batch_size: int, pairs: int, processes: int, seed: int
) -> tuple[BatchPlan, int]:
    """Return (`BatchPlan`, number of batches for up to `pairs` different pairs); UserError if rows are too few."""
    step = 2 * processes
    if not (largest := groups.largest_batch // step * step):
        message = f"Too few rows are held out ({len(groups.of_rows)}); evaluation needs {step} that fit in one batch"
        raise UserError("training.held_out.too_few", f"{message}: add rows, or raise `eval_fraction` (at most 0.2).")
    size, there = min(batch_size, largest), min(groups.counts.values()) * len(groups.counts)
    return BatchPlan(groups, size, seed), max(1, min(pairs, there) // size)
