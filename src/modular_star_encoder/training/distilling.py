"""Distillation in a recipe: the settings, and batches with the teacher's vector of each text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.finetuning_rows import RetrievalBatches, RetrievalTexts
from modular_star_encoder.data.pairs import RetrievalExample
from modular_star_encoder.data.sources.dataset_rows import open_texts
from modular_star_encoder.inference.encoders import load_encoder
from modular_star_encoder.inference.teacher_vectors import TeacherTargets, compute_teacher_vectors
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.objectives.distillation import DistillationSettings
from modular_star_encoder.training.growing import start_from_teacher, token_texts
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.settings import Count, Switch, settings_class

PAIRS_PER_TEXT = 2
_UNPAIRED = 12  # random stream besides the streams of `RetrievalBatches`


@settings_class
class TeacherSettings(DistillationSettings):
    """Settings of a recipe to learn from a teacher. The recipe's `objective` has the settings of the contrastive loss.

    Args:
        teacher: the model to learn from; any name that `load_encoder` takes, such as a folder, a Hub id or an endpoint.
        query_prompt, document_prompt: prefix of descriptions and of code for the teacher.
        max_characters: longer texts are cut to this length before the teacher reads them.
        centre_by_kind: subtract from each vector the mean vector of descriptions or of code, and normalise again.
        texts: unpaired texts to learn from too, one for every two pairs of a batch: a JSON Lines or Parquet file with
            the column `text`.
        start_from_teacher: begin with the teacher's vectors of single tokens; see `start_from_teacher` of `growing.py`.
        cache: folder of the teacher's vectors; by default in the user's cache.
    """

    teacher: str
    query_prompt: str = ""
    document_prompt: str = ""
    max_characters: Count = 1200
    centre_by_kind: Switch = True
    texts: str | None = None
    start_from_teacher: Switch = False
    cache: str | None = None


class TaughtBatches(Dataset[dict[str, torch.Tensor]]):
    """The rows of `RetrievalBatches`, with the teacher's vector of each text added as `{side}_teacher`, float32 (D,).

    A snippet with renamed words keeps the vector of the original. With unpaired texts, every second row also has
    `text_ids` and `text_teacher`, drawn by the seed and the row's number alone.
    """

    def __init__(
        self, batches: RetrievalBatches, targets: TeacherTargets, unpaired: RetrievalTexts | None = None
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
            found["text_ids"] = self._unpaired.description(row)
            found["text_teacher"] = torch.from_numpy(self._targets.of(self._unpaired.text(row, None)))
        return found


def teach(
    settings: TeacherSettings,
    model: ModularStarEncoderForRetrieval,
    tokenizer: PreTrainedTokenizerFast,
    train: RetrievalBatches,
    held_out: RetrievalBatches,
    progress: bool = True,
    *,
    max_tokens: int,
) -> tuple[TaughtBatches, TaughtBatches, dict[str, Any]]:
    """Add the teacher's vectors to the batches; if `settings.start_from_teacher`, also initialise the model's exit 0.

    Returns:
        The training and evaluation batches with the teacher's vectors, and, if they are centred, `teacher_means`: kind
        (`query`, `document`) → mean vector (D,) of its training texts, as a list. `max_tokens` limits unpaired texts.

    Raises:
        UserError: the teacher's vectors have another size than the model's (`distillation.size`).
    """
    teacher = load_encoder(settings.teacher)
    exit_layer = teacher.exit_layers[-1]
    size = teacher.encode([("", "size")], [exit_layer], progress=False)[exit_layer].shape[-1]
    if size != model.config.projection_size:
        message = f"The vectors of {settings.teacher} have size {size}, so the model needs projection_size={size}."
        raise UserError("distillation.size", f"{message} It has {model.config.projection_size}.")
    options: dict[str, Any] = {"max_characters": settings.max_characters, "progress": progress}
    unpaired = list(open_texts(settings.texts, "text")) if settings.texts else []
    learned, others = (_texts_by_kind(batches.rows.texts) for batches in (train, held_out))
    others["document"] += unpaired
    vectors = {
        kind: compute_teacher_vectors(
            teacher, [*learned[kind], *others[kind]], settings.cache, prompt=prompt, **options
        )
        for kind, prompt in (("query", settings.query_prompt), ("document", settings.document_prompt))
    }
    means = {kind: vectors[kind].mean(texts) for kind, texts in learned.items() if texts and settings.centre_by_kind}
    if settings.start_from_teacher:
        texts = token_texts(tokenizer)
        found = compute_teacher_vectors(teacher, texts, settings.cache, prompt=settings.document_prompt, **options)
        counts = train.rows.token_counts(len(tokenizer))
        start_from_teacher(model, tokenizer, found.rows(found.places(texts)), counts)
    alone = None
    if unpaired:
        examples, prompts = [RetrievalExample(text, ()) for text in unpaired], model.config.instruction_prompts
        alone = RetrievalTexts(examples, tokenizer, max_text_tokens=max_tokens, prompts=prompts, progress=progress)
    targets = TeacherTargets(vectors, means)
    rounded = {kind: [round(float(number), 6) for number in mean] for kind, mean in means.items()}
    entries = {"teacher_means": rounded} if rounded else {}
    return TaughtBatches(train, targets, alone), TaughtBatches(held_out, targets), entries


def _texts_by_kind(examples: Sequence[RetrievalExample]) -> dict[str, list[str]]:
    """Return the descriptions (`query`) and the code (`document`) of all rows, hard negatives included."""
    codes = [[*one.snippets, *([one.negative] if one.negative else [])] for one in examples]
    return {
        "query": [one.description for one in examples if one.description],
        "document": [snippet.code for of_example in codes for snippet in of_example],
    }
