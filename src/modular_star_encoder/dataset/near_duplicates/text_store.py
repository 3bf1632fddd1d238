"""The texts of one shard and their fingerprints on disk, for each column four flat files that only grow.

    0.text       UTF-8, one text after the other
    0.bounds     int64 (rows + 1,): text i is bytes bounds[i] to bounds[i + 1]
    0.digests    uint64 (rows, 2)
    0.keys       uint64 (rows, bands)

Blank texts and nulls are stored as they come, an empty text for a null.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modular_star_encoder.dataset.near_duplicates.files import flat_array
from modular_star_encoder.dataset.near_duplicates.fingerprints import fingerprint
from modular_star_encoder.dataset.near_duplicates.search import SearchColumn
from modular_star_encoder.dataset.near_duplicates.settings import Banding
from modular_star_encoder.dataset.near_duplicates.verification import TextColumn

_BOUND, _WORD = "<i8", "<u8"


def write_texts(
    folder: Path, batches: Iterable[Sequence[Sequence[str | None]]], columns: int, banding: Banding
) -> None:
    """Write a new folder; `batches` yields, for some rows, the texts of each column."""
    folder.mkdir()
    with ExitStack() as stack:
        outputs = [
            {name: stack.enter_context((folder / f"{column}.{name}").open("wb")) for name in ColumnFiles.NAMES}
            for column in range(columns)
        ]
        ends = [0] * columns
        for files in outputs:
            files["bounds"].write(np.zeros(1, _BOUND).tobytes())
        for batch in batches:
            for column, texts in enumerate(batch):
                prints = fingerprint(texts, banding)
                content = [(text or "").encode("utf-8", "surrogatepass") for text in texts]
                bounds = ends[column] + np.cumsum([len(one) for one in content], dtype=_BOUND)
                ends[column] = int(bounds[-1]) if len(bounds) else ends[column]
                outputs[column]["text"].writelines(content)
                outputs[column]["bounds"].write(bounds.tobytes())
                outputs[column]["digests"].write(prints.digests.astype(_WORD).tobytes())
                outputs[column]["keys"].write(prints.keys.astype(_WORD).tobytes())


@dataclass(frozen=True, slots=True)
class ColumnFiles:
    """One column of one folder, memory-mapped: see the module."""

    text: np.ndarray
    bounds: np.ndarray
    digests: np.ndarray
    keys: np.ndarray

    NAMES = ("text", "bounds", "digests", "keys")

    @classmethod
    def opened(cls, folder: Path, column: int, banding: Banding) -> "ColumnFiles":
        """Map the files."""
        return cls(
            flat_array(folder / f"{column}.text", "u1"),
            flat_array(folder / f"{column}.bounds", _BOUND),
            flat_array(folder / f"{column}.digests", _WORD, 2),
            flat_array(folder / f"{column}.keys", _WORD, banding.bands),
        )

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, row: int) -> str:
        start, stop = self.bounds[row : row + 2]
        return self.text[start:stop].tobytes().decode("utf-8", "surrogatepass")


def stored_column(shards: Sequence[ColumnFiles], rows: np.ndarray) -> SearchColumn:
    """What is searched of a column: its different rows, numbered through all shards."""
    starts = np.cumsum([0, *map(len, shards)])

    def lookup(numbers: np.ndarray) -> list[str]:
        chosen = rows[numbers]
        shard = np.searchsorted(starts, chosen, side="right") - 1
        places = (chosen - starts[shard]).tolist()
        return [shards[one][place] for one, place in zip(shard.tolist(), places, strict=True)]

    digests = np.concatenate([one.digests for one in shards])[rows]
    lengths = np.concatenate([np.diff(one.bounds) for one in shards])[rows]
    return SearchColumn([one.keys for one in shards], rows, TextColumn(lookup, digests, lengths))
