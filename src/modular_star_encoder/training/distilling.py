"""Distillation: store a teacher's vectors (embeddings) of many texts, and add them to the batches of a student model.

The vectors are stored in an `EmbeddingCache`, so a job that was killed embeds only the missing texts when restarted.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.finetuning_rows import RetrievalBatches, RetrievalTexts
from modular_star_encoder.data.pairs import RetrievalExample
from modular_star_encoder.data.sources.dataset_rows import open_texts
from modular_star_encoder.evaluation.retrievers import EmbeddingCache, EmbeddingRetriever
from modular_star_encoder.inference.encoders import Encoder, Prompted, load_encoder
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.training.recipes import TeacherSettings
from modular_star_encoder.training.starting_points import start_from_teacher
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import cache_folder, folder_checksum, user_path

TEXTS_PER_SUM = 4096
PAIRS_PER_TEXT = 2
_UNPAIRED = 12  # number of the random stream that draws unpaired texts; `RetrievalBatches` uses other numbers


class TaughtBatches(Dataset[dict[str, torch.Tensor]]):
    """Rows of `RetrievalBatches` plus the teacher's vector of each text, such as `query_teacher`, D numbers in float32.

    With `unpaired`, every second row also has a text drawn from `unpaired`: `text_ids` are the ids of its tokens, and
    `text_teacher` is the teacher's vector of this text.
    """

    def __init__(
        self, batches: RetrievalBatches, targets: "TeacherTargets", unpaired: RetrievalTexts | None = None
    ) -> None:
        self._batches, self._targets, self._unpaired = batches, targets, unpaired
        self.batch_size = batches.batch_size

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        found = self._batches[index]
        for side, (text, is_code) in self._batches.texts(index).items():
            found[f"{side}_teacher"] = torch.from_numpy(self._targets.of(text, "document" if is_code else "query"))
        if self._unpaired is not None and index % PAIRS_PER_TEXT == 0:
            drawing = np.random.default_rng((self._batches.seed, _UNPAIRED, index))
            row = int(drawing.integers(len(self._unpaired)))
            found["text_ids"] = self._unpaired.tokens(row, None)
            found["text_teacher"] = torch.from_numpy(self._targets.of(self._unpaired.text(row, None)))
        return found


def load_teacher(settings: TeacherSettings, projection_size: int) -> Encoder:
    """Load the teacher model; UserError (`distillation.size`) if its vectors are not of size `projection_size`."""
    teacher = load_encoder(settings.teacher)
    exit_layer = teacher.exit_layers[-1]
    size = teacher.encode([("", "size")], [exit_layer], progress=False)[exit_layer].shape[-1]
    if size != projection_size:
        message = f"The teacher {settings.teacher} has vectors of size {size}, but the model's have {projection_size}."
        raise UserError("distillation.size", f"{message} Set config.projection_size={size}, or use another teacher.")
    return teacher


def unpaired_texts(settings: TeacherSettings | None) -> list[str]:
    """Return the texts in the file that `texts` of the settings names; none without such a file."""
    return list(open_texts(settings.texts, "text")) if settings and settings.texts else []


def teaching_checksums(settings: TeacherSettings | None, unpaired: Sequence[str]) -> dict[str, str | None]:
    """Return checksums of the teacher's files, if it is a folder, and of unpaired texts, for a run's `start.json`."""
    folder, digest = user_path(settings.teacher) if settings else None, hashlib.sha256()
    for text in unpaired:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    files = ("**/config.json", "**/tokenizer.json", "**/*.safetensors")
    teacher = folder_checksum(folder, files) if folder and folder.is_dir() else None
    return {"teacher_checksum": teacher, "texts_checksum": digest.hexdigest() if unpaired else None}


def teach(
    settings: TeacherSettings,
    teacher: Encoder,
    model: ModularStarEncoderForRetrieval,
    tokenizer: PreTrainedTokenizerFast,
    train: RetrievalBatches,
    held_out: RetrievalBatches,
    unpaired: Sequence[str],
    max_tokens: int,  # of an unpaired text
    progress: bool = True,
) -> tuple[TaughtBatches, TaughtBatches, dict[str, Any]]:
    """Return training and evaluation batches with the teacher's vectors, and a dict for the training log.

    With `centre_by_kind`, the dict has `teacher_means`: the mean vectors of all training descriptions ("query") and of
    all training snippets ("document"), as lists of numbers; otherwise, the dict is empty.
    """
    options: dict[str, Any] = {"max_characters": settings.max_characters, "progress": progress}
    learned, others = (_texts_by_kind(batches.rows.texts) for batches in (train, held_out))
    others["document"] += unpaired
    vectors = {}
    for kind, prompt in (("query", settings.query_prompt), ("document", settings.document_prompt)):
        texts = [*learned[kind], *others[kind]]
        vectors[kind] = compute_teacher_vectors(teacher, texts, settings.cache, prompt=prompt, **options)
    means = {kind: vectors[kind].mean(texts) for kind, texts in learned.items() if texts and settings.centre_by_kind}
    if settings.start_from_teacher:
        texts = token_texts(tokenizer)
        found = compute_teacher_vectors(teacher, texts, settings.cache, prompt=settings.document_prompt, **options)
        counts = train.rows.token_counts(len(tokenizer))
        start_from_teacher(model, tokenizer, found.rows(texts), counts)
    alone = None
    if unpaired:
        examples, prompts = [RetrievalExample(text, ()) for text in unpaired], model.config.instruction_prompts
        alone = RetrievalTexts(examples, tokenizer, max_text_tokens=max_tokens, prompts=prompts, progress=progress)
    targets = TeacherTargets(vectors, means)
    rounded = {kind: [round(float(number), 6) for number in mean] for kind, mean in means.items()}
    entries = {"teacher_means": rounded} if rounded else {}
    return TaughtBatches(train, targets, alone), TaughtBatches(held_out, targets), entries


def _texts_by_kind(examples: Sequence[RetrievalExample]) -> dict[str, list[str]]:
    """Return {"query": all descriptions, "document": all code snippets} of `examples`, hard negatives included."""
    codes = [one.code for example in examples for one in (*example.snippets, example.negative) if one]
    return {"query": [one.description for one in examples if one.description], "document": codes}


def token_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the text of each token, ordered by token id, without surrounding spaces and without WordPiece's `##`."""
    texts = (str(tokenizer.decode([index])).strip() for index in range(len(tokenizer)))
    return [text.removeprefix("##") if len(text) > 2 else text for text in texts]


@dataclass(frozen=True)
class TeacherVectors:
    """Reads vectors of texts from a cache; one teacher model has computed all of them with one prompt."""

    cache: EmbeddingCache
    space: str  # the teacher and its exit
    prompt: str
    max_characters: int | None

    def prompted(self, texts: Iterable[str]) -> list[Prompted]:
        """Return the pair (prompt, text cut to `max_characters`) for each text."""
        return [(self.prompt, text[: self.max_characters]) for text in texts]

    def rows(self, texts: Iterable[str]) -> np.ndarray:
        """Return the vectors of N texts, scaled to length 1, float32 (N, size); KeyError if a vector isn't stored."""
        return _unit(self.cache.rows(self.space, self.prompted(texts))[:])

    def mean(self, texts: Iterable[str]) -> np.ndarray:
        """Return the mean vector of `texts`, float32 (size,). Equal texts count once; their order has no effect."""
        different = sorted(set(self.prompted(texts)))
        rows = self.cache.rows(self.space, different)
        starts = range(0, len(rows), TEXTS_PER_SUM)
        sums = [_unit(rows[start : start + TEXTS_PER_SUM]).sum(axis=0, dtype=np.float64) for start in starts]
        return (sum(sums) / len(rows)).astype(np.float32)


def compute_teacher_vectors(
    teacher: Encoder,
    texts: Iterable[str],
    cache: str | os.PathLike[str] | None = None,  # folder, by default in the user's cache folder
    *,
    prompt: str = "",
    max_characters: int | None = None,  # of a text, without the prompt
    progress: bool = True,
) -> TeacherVectors:
    """Return the vectors of `texts` at the teacher's deepest exit; only texts that are not in `cache` are embedded."""
    root = user_path(cache) if cache else cache_folder("teacher-vectors")
    folder = hashlib.blake2b(repr((prompt, max_characters)).encode(), digest_size=8).hexdigest()
    retriever = EmbeddingRetriever(teacher, EmbeddingCache(root and root / folder, "float16"))
    exit_layer = teacher.exit_layers[-1]
    vectors = TeacherVectors(retriever.cache, retriever.space(exit_layer), prompt, max_characters)
    retriever.embed(vectors.prompted(texts), [exit_layer], progress=progress)
    return vectors


class TeacherTargets:
    """The vectors that a student learns: a teacher's vectors of descriptions (`query`) and code snippets (`document`).

    If `means` has a mean vector for `query` or `document`, this mean is subtracted from all vectors of the same kind.
    All vectors are scaled to length 1. On held-out pairs, the vectors of bge-small reach an MRR × 100 of 75.8, and of
    81.5 after the subtraction.
    """

    def __init__(self, vectors: Mapping[str, TeacherVectors], means: Mapping[str, np.ndarray] | None = None) -> None:
        self._vectors, self.means = vectors, means or {}

    def of(self, text: str, kind: str | None = None) -> np.ndarray:
        """Return the vector to learn for a text, float32 (size,).

        `kind` (`query` or `document`) names the mean to subtract; if None, it is the mean nearest to the vector.
        """
        vector = self._vectors[kind or "document"].rows([text])[0]
        nearest = kind or min(self.means, key=lambda one: float(np.linalg.norm(vector - self.means[one])), default="")
        return _unit(vector - self.means.get(nearest, 0))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
