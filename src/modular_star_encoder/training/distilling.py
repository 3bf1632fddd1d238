"""Distillation: add a teacher's vectors to batches, start a model from its teacher, and add layers to a model."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.finetuning_rows import RetrievalBatches, RetrievalTexts
from modular_star_encoder.data.pairs import RetrievalExample
from modular_star_encoder.data.sources.dataset_rows import open_texts
from modular_star_encoder.data.tokenizer import special_token_ids
from modular_star_encoder.inference.checkpoints import load_checkpoint, save_retrieval_checkpoint
from modular_star_encoder.inference.encoders import Encoder, load_encoder
from modular_star_encoder.inference.teacher_vectors import TeacherTargets, compute_teacher_vectors
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.objectives.distillation import DistillationSettings
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.settings import Count, Switch, settings_class

PAIRS_PER_TEXT = 2
_UNPAIRED = 12  # random stream besides the streams of `RetrievalBatches`


@settings_class
class TeacherSettings(DistillationSettings):
    """Settings of a recipe's `distillation`: the teacher, and how the exits learn its vectors.

    Args:
        teacher: the model to learn from; any name that `load_encoder` takes, such as a folder, a Hub id or an endpoint.
        query_prompt, document_prompt: texts put before each description and before each snippet for the teacher.
        max_characters: largest number of characters of a text for the teacher; the rest is cut off.
        centre_by_kind: subtract the mean vector of all descriptions from each description's vector, and that of all
            snippets from each snippet's, and normalise the results.
        texts: file of texts without a pair to learn from, too: JSON Lines or Parquet with a column `text`. A batch has
            one of them for every two pairs.
        start_from_teacher: before training, set exit 0 to the teacher's vectors of single tokens. See the function
            `start_from_teacher`.
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
    """The rows of `RetrievalBatches` with the teacher's vector of each text, such as `query_teacher`, float32 (D,).

    A snippet with renamed words has the vector of the original snippet. If there are `unpaired` texts, every second row
    also has one of them, as `text_ids` and `text_teacher`; the seed and the row's number determine which one.
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
            found["text_ids"] = self._unpaired.tokens(row, None)
            found["text_teacher"] = torch.from_numpy(self._targets.of(self._unpaired.text(row, None)))
        return found


def load_teacher(settings: TeacherSettings, projection_size: int) -> Encoder:
    """Load the teacher; UserError (`distillation.size`) if its vectors do not have `projection_size` components."""
    teacher = load_encoder(settings.teacher)
    exit_layer = teacher.exit_layers[-1]
    size = teacher.encode([("", "size")], [exit_layer], progress=False)[exit_layer].shape[-1]
    if size != projection_size:
        message = f"The vectors of {settings.teacher} have size {size}, so the model needs projection_size={size}."
        raise UserError("distillation.size", f"{message} Its projection_size is {projection_size}.")
    return teacher


def teach(
    settings: TeacherSettings,
    teacher: Encoder,
    model: ModularStarEncoderForRetrieval,
    tokenizer: PreTrainedTokenizerFast,
    train: RetrievalBatches,
    held_out: RetrievalBatches,
    max_tokens: int,
    progress: bool = True,
) -> tuple[TaughtBatches, TaughtBatches, dict[str, Any]]:
    """Add the teacher's vectors to the training batches (`train`) and the evaluation batches (`held_out`).

    If `settings.start_from_teacher` is set, also initialise the model's exit 0. The texts of `settings.texts` are cut
    to `max_tokens` tokens.

    Returns:
        The training batches and the evaluation batches with the teacher's vectors, and entries for the training log.
        If vectors are centred, the entry `teacher_means` has the mean vector of the training texts of each kind
        (`query`, `document`), as a list of D numbers; otherwise there is no entry.
    """
    options: dict[str, Any] = {"max_characters": settings.max_characters, "progress": progress}
    unpaired = list(open_texts(settings.texts, "text")) if settings.texts else []
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
    """Return all descriptions (`query`) and all snippets (`document`), hard negatives included."""
    codes = [[*one.snippets, *([one.negative] if one.negative else [])] for one in examples]
    return {
        "query": [one.description for one in examples if one.description],
        "document": [snippet.code for of_example in codes for snippet in of_example],
    }


def token_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the text of each token, by id, without the spaces around it and without WordPiece's `##`."""
    texts = (str(tokenizer.decode([index])).strip() for index in range(len(tokenizer)))
    return [text.removeprefix("##") if len(text) > 2 else text for text in texts]


@torch.no_grad()
def start_from_teacher(
    model: ModularStarEncoderForRetrieval,
    tokenizer: PreTrainedTokenizerFast,
    vectors: np.ndarray,
    token_counts: np.ndarray,
    *,
    a: float = 1e-3,
) -> None:
    """Set the token embeddings, token weights and projection head so that exit 0 embeds like the teacher.

    A token's embedding is the teacher's vector of this token minus the mean of all tokens, and the head is the
    identity. If the model's hidden size is below D, the principal components of these vectors are the embeddings, and
    the head maps them back. A token's weight is a / (a + frequency), as in "A Simple but Tough-to-Beat Baseline for
    Sentence Embeddings" (Arora et al., 2017). Special tokens get zeros and weight 0, so that they affect no mean.

    Args:
        model: has an exit 0, a linear projection head, token weights, and the teacher's D as `projection_size`.
        tokenizer: the model's tokenizer, of V tokens.
        vectors: (V, D), the teacher's vectors of `token_texts`.
        token_counts: (V,), number of occurrences of each token in the training texts.
        a: relative frequency of a token that gets half the weight of the rarest tokens.

    Raises:
        UserError: the model does not fit (`training.start_from_teacher`).
    """
    config, size = model.config, vectors.shape[1]
    needed = {"projection_head": "linear", "token_weights": True, "projection_size": size}
    wrong = [f"{name}={wanted!r}" for name, wanted in needed.items() if getattr(config, name) != wanted]
    if wrong or 0 not in config.exit_layers:
        message = f"start_from_teacher needs a model with {', '.join(wrong) or 'an exit 0'}; set it in `config`."
        raise UserError("training.start_from_teacher", message)
    table = torch.from_numpy(vectors).float()
    special = special_token_ids(tokenizer)
    real = torch.ones(len(table), dtype=torch.bool)
    real[special] = False
    table = (table - table[real].mean(dim=0)) * real[:, None]
    width = min(config.hidden_size, size)
    basis = torch.eye(size)
    if width < size:
        basis = torch.linalg.svd(table, full_matrices=False).Vh[:width].T
    counts = torch.from_numpy(token_counts).double()
    weights = (a / (a + counts / counts.sum().clamp(min=1))).float() * real
    head = model.projection_heads["0"].dense
    for parameter in (model.model.embed_tokens.weight, model.model.token_weights.weight, head.weight, head.bias):
        parameter.zero_()
    model.model.embed_tokens.weight[: len(table), :width] = table @ basis
    model.model.token_weights.weight[: len(table), 0] = weights
    head.weight[:, :width] = basis


@torch.no_grad()
def grow(model: ModularStarEncoderForRetrieval, exit_layers: Sequence[int]) -> ModularStarEncoderForRetrieval:
    """Return a copy of `model`, which has only exit 0, with new layers and exits.

    At first every exit gives the embeddings of exit 0: the new layers' output projections are zero, and all heads equal
    the head of exit 0. Token embeddings are scaled to a standard deviation of 1. Otherwise the output of the new layers
    would outweigh them after the first training steps.

    Args:
        model: has exit 0 alone, and no exit norm.
        exit_layers: the exits of the new model, ascending: the first is 0, the last is the number of layers.

    Raises:
        UserError: the model or the exits do not fit (`training.grow`).
    """
    config, exits = model.config, list(exit_layers)
    for name, needed in (("exit_layers", [0]), ("exit_norm", "none"), ("projection_head", "linear")):
        found = getattr(config, name)
        if (list(found) if needed == [0] else found) != needed:
            message = f"Only a model with {name}={needed!r} can grow; this one has {name}={found!r}."
            how = " Cut it first: mose slice CHECKPOINT --exit-layer 0 OUT." if needed == [0] and 0 in found else ""
            raise UserError("training.grow", message + how)
    if exits != sorted({0, *exits}) or len(exits) < 2:
        raise UserError("training.grow", f"The new exits must be 0 and at least one more, ascending, not {exits}.")
    changes: dict[str, Any] = dict.fromkeys(("exit_layers", "parent_exit_layers"), exits)
    changes |= dict.fromkeys(("num_hidden_layers", "parent_num_hidden_layers"), exits[-1])
    config = type(config).from_dict({**config.to_dict(), **changes, "exit_embedding_rows": len(exits)})
    grown = type(model)(config)
    grown.load_state_dict(model.state_dict(), strict=False)
    for layer in grown.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.c_proj):
            for parameter in projection.parameters():
                parameter.zero_()
    table, head = grown.model.embed_tokens.weight, grown.projection_heads["0"].dense
    scale = 1 / table[table.any(dim=1)].std()
    table.mul_(scale)
    head.bias.mul_(scale)  # embeddings are normalised: scaling states and bias alike changes nothing
    for other in grown.projection_heads.values():
        other.dense.load_state_dict(head.state_dict())
    grown.set_attn_implementation(model.config._attn_implementation)
    return grown


def grow_checkpoint(
    checkpoint: str | os.PathLike[str], exit_layers: Sequence[int], out: str | os.PathLike[str], *, seed: int = 0
) -> Path:
    """Add layers (see `grow`) to a checkpoint that has only exit 0, write the result to `out`, and return `out`.

    The folder `out` must be empty or not exist; it is written atomically. `seed` determines the new layers' random
    weights.

    Raises:
        UserError: the model or the exits do not fit (`training.grow`), or `out` is not empty.
    """
    model, tokenizer = load_checkpoint(checkpoint)
    torch.manual_seed(seed)
    return save_retrieval_checkpoint(grow(model, exit_layers), tokenizer, out)
