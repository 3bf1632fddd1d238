"""Load the model and tokenizer that training starts from, set weights, add layers or adapters, save the result."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from modular_star_encoder.data.tokenizer import adds_no_tokens, load_tokenizer, special_token_ids, with_template
from modular_star_encoder.inference.checkpoints import (
    clear_errors,
    keep_only_exit,
    load_checkpoint,
    note_parent,
    refuse_adapter,
    save_retrieval_checkpoint,
    save_tokenizer,
)
from modular_star_encoder.modeling import (
    ModularStarEncoderConfig,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderPreTrainedModel,
)
from modular_star_encoder.training import starting_source
from modular_star_encoder.training.recipes import StartingRecipe, check_length
from modular_star_encoder.training.runs import ADAPTER, MODEL
from modular_star_encoder.training.trainer import MultiExitTrainer, write_serving_files
from modular_star_encoder.utils.errors import UserError, naming_extra
from modular_star_encoder.utils.files import staged_folder

logger = logging.get_logger(__name__)
_HEADS = re.compile(r"(heads|projection_heads|logit_scale|classifier)\.")  # tensors of all our models outside the trunk

Model = TypeVar("Model", bound=ModularStarEncoderPreTrainedModel)


class StartingPoint(Generic[Model]):
    """The model and the tokenizer that a fine-tuning recipe starts from; only `load` reads weights and tokenizer.

    `config` is the model's configuration with the changes in the recipe's `config`. If the recipe has an `exit_layer`,
    the layers after this exit are left out.
    """

    def __init__(self, model_class: type[Model], recipe: StartingRecipe) -> None:
        self._class, self._recipe = model_class, recipe
        self.source, self.has_weights = starting_source(recipe.model)
        try:
            config = ModularStarEncoderConfig.from_pretrained(self.source, **{**recipe.config, "dtype": torch.float32})
            in_training = copy.deepcopy(config)
            in_training.unpad_inputs = recipe.unpad_inputs
            # `from_pretrained` validates the configuration before it sets the values in `recipe.config`.
            in_training.validate()
        except StrictDataclassError as error:
            message = f"The configuration of {recipe.model}, with the recipe's `config` and `unpad_inputs`, is invalid"
            raise UserError("training.model.config", f"{message}: {' '.join(str(error).split())}") from error
        except OSError as error:
            message = f"The config.json of {recipe.model} can't be read. Set `model` to a folder or a Hub id owner/name"
            raise OSError(f"{message}. {' '.join(str(error).split())}") from error
        if recipe.exit_layer is not None:
            config = config.cut(recipe.exit_layer)
            config.exit_layers = [recipe.exit_layer]
        self.config = config
        check_length(config, **recipe.lengths())
        with torch.device("meta"):
            model_class(copy.deepcopy(config)).set_attn_implementation(recipe.attn_implementation)

    def load(self) -> tuple[Model, PreTrainedTokenizerFast]:
        """Load the model, in float32, and its tokenizer; every call draws the same new weights, by the recipe's seed.

        The tokenizer encodes a text as `<sep> text <cls>` (see `with_template`). For retrieval, a tokenizer for which
        `adds_no_tokens` is true, such as that of mose-code, is not changed, and adds no special tokens.
        """
        recipe, exit_layer = self._recipe, self._recipe.exit_layer
        if recipe.tokenizer is None and not self.has_weights:
            message = f"{recipe.model} has no weights and no tokenizer; set `tokenizer` in the recipe."
            raise UserError("training.tokenizer.missing", message)
        tokenizer = load_tokenizer(recipe.tokenizer or self.source)
        if recipe.task == "classification" or not adds_no_tokens(tokenizer):
            tokenizer = with_template(tokenizer)
        torch.manual_seed(recipe.seed)
        if self.has_weights:
            cut = {} if exit_layer is None else {"exit_layer": exit_layer}
            options = {**recipe.config, **cut, "dtype": torch.float32, "output_loading_info": True}
            refuse_adapter(self.source)
            with clear_errors(os.fspath(self.source)) as records:
                model, info = self._class.from_pretrained(self.source, **options)
                heads = {name for name in model.state_dict() if not name.startswith("model.")}
                others = [name for name in info["unexpected_keys"] if not _HEADS.match(name)]
                if heads <= set(info["missing_keys"]) and not others:  # the report of transformers reads like an error
                    records.clear()
                    message = f"{recipe.model} has no heads for {recipe.task}: new heads begin with random weights."
                    logger.warning_once(message)
            note_parent(model.config, self.source)
            if exit_layer is not None:
                keep_only_exit(model, exit_layer)
        else:
            config = copy.deepcopy(self.config)
            config.vocab_size = max(len(tokenizer), config.vocab_size)
            model = self._class(config)
        check_vocabulary(len(tokenizer), model.config.vocab_size)
        model.set_attn_implementation(recipe.attn_implementation)
        model.config.unpad_inputs = recipe.unpad_inputs
        return model, tokenizer

    def save(self, trainer: MultiExitTrainer, out: Path) -> None:
        """Write the trained model, with LoRA adapters merged, and its tokenizer; call it in every process."""
        lora = self._recipe.lora is not None
        network: Any = trainer.model
        network.config.unpad_inputs = self.config.unpad_inputs
        trainer.save_model(os.fspath(out / (ADAPTER if lora else MODEL)))
        if not lora or (out / MODEL).exists() or not trainer.is_world_process_zero():
            return
        from peft import PeftModel

        with staged_folder(out / MODEL) as staging:
            start, tokenizer = self.load()
            merged = PeftModel.from_pretrained(start, os.fspath(out / ADAPTER)).merge_and_unload()
            merged.config.unpad_inputs = self.config.unpad_inputs
            merged.save_pretrained(staging)
            save_tokenizer(tokenizer, merged.config, staging)
            write_serving_files(merged, staging)


def check_vocabulary(tokens: int, vocab_size: int) -> None:
    if tokens > vocab_size:
        message = f"The tokenizer has {tokens} tokens, but the model's vocabulary has only {vocab_size}; leave out the "
        message += "recipe's `tokenizer`."
        raise UserError("training.tokenizer.too_large", message)


@torch.no_grad()
def start_from_unigrams(decoder: nn.Linear, token_counts: torch.Tensor) -> None:
    """Set the bias of the MLM decoder to log token frequencies, from `token_counts`, shape (V tokens,), plus one."""
    counts = token_counts.to(decoder.bias) + 1
    decoder.bias.copy_((counts / counts.sum()).log())


@torch.no_grad()
def start_from_spellings(embedding: nn.Embedding, spellings: Sequence[str], *, seed: int) -> None:
    """Set `embedding` to random vectors that are similar for tokens with equal `spellings` (see `token_spellings`).

    Two tokens with the same spelling, such as "parse" and " Parse", have vectors with a correlation of 0.8; all vectors
    have a standard deviation of 0.3. After 100 fine-tuning steps, a model of 1.5 million parameters has an MRR of 0.36
    with these vectors, 0.33 if their standard deviation is 0.1, and 0.23 with independent vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = {spelling: group for group, spelling in enumerate(dict.fromkeys(spellings))}
    common = torch.randn(len(groups), embedding.embedding_dim, generator=generator)
    own = torch.randn(len(spellings), embedding.embedding_dim, generator=generator)
    members = torch.tensor([groups[spelling] for spelling in spellings])
    vectors = 0.3 * (0.8**0.5 * common[members] + 0.2**0.5 * own)
    if embedding.padding_idx is not None:
        vectors[embedding.padding_idx] = embedding.weight[embedding.padding_idx].cpu()
    embedding.weight.copy_(vectors)


@torch.no_grad()
def start_from_teacher(
    model: ModularStarEncoderForRetrieval,
    tokenizer: PreTrainedTokenizerFast,
    vectors: np.ndarray,  # the teacher's vectors of `token_texts`, shape (V tokens, D)
    token_counts: np.ndarray,  # how often each token is in the training texts, shape (V tokens,)
    *,
    a: float = 1e-3,
) -> None:
    """Set the token embeddings, token weights and projection head so that exit 0 embeds like the teacher.

    A token's embedding is the teacher's vector of the token minus the mean vector, and the head is the identity. If the
    hidden size is below D (the size of the teacher's vectors), embeddings are projected to their principal components,
    and the head maps them back to size D. A token's weight in pooling is a / (a + frequency), as in "A Simple but
    Tough-to-Beat Baseline for Sentence Embeddings" (Arora et al., 2017). Special tokens get a zero vector and weight 0.
    """
    config, size = model.config, vectors.shape[1]
    needed = {"projection_head": "linear", "token_weights": True, "projection_size": size}
    wrong = [f"{name}={wanted!r}" for name, wanted in needed.items() if getattr(config, name) != wanted]
    if wrong or 0 not in config.exit_layers:
        message = f"start_from_teacher needs a model with {', '.join(wrong) or 'an exit 0'}: set this in the recipe's "
        message += "`config`."
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
    """Return a copy, with new layers and exits, of a model that has only exit 0 and no exit norm.

    Before training, every exit gives the embeddings of exit 0: the new layers' output projections are zero, and all
    heads equal the head of exit 0. Token embeddings are scaled to a standard deviation of 1. Otherwise the output of
    the new layers would outweigh the embeddings after the first training steps.
    """
    config, exits = {**model.config.to_dict(), "exit_layers": list(model.config.exit_layers)}, list(exit_layers)
    for name, needed in (("projection_head", "linear"), ("exit_norm", "none"), ("exit_layers", [0])):
        if (found := config[name]) != needed:
            fault = f"New layers need a model with {name}={needed!r}; this model has {name}={found!r}."
            fault += " Cut it first: mose slice CHECKPOINT --exit-layer 0 OUT." if needed == [0] and 0 in found else ""
            raise UserError("training.grow", fault)
    if exits != sorted({0, *exits}) or len(exits) < 2:
        raise UserError("training.grow", f"The new exits must begin with 0 and ascend, such as [0, 2, 4], not {exits}.")
    changes: dict[str, Any] = dict.fromkeys(("exit_layers", "parent_exit_layers"), exits)
    changes |= dict.fromkeys(("num_hidden_layers", "parent_num_hidden_layers"), exits[-1])
    try:
        config = type(model.config).from_dict({**config, **changes, "exit_embedding_rows": len(exits)})
    except StrictDataclassError as error:
        message = f"The model can't have the exits {exits}: {' '.join(str(error.__cause__ or error).split())}"
        raise UserError("training.grow", message) from error
    grown = type(model)(config)
    grown.load_state_dict(model.state_dict(), strict=False)
    for layer in grown.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.c_proj):
            for parameter in projection.parameters():
                parameter.zero_()
    table, head = grown.model.embed_tokens.weight, grown.projection_heads["0"].dense
    scale = 1 / table[table.any(dim=1)].std()
    table.mul_(scale)
    head.bias.mul_(scale)  # hidden states and bias are scaled alike, which changes no normalised embedding
    for other in grown.projection_heads.values():
        other.dense.load_state_dict(head.state_dict())
    grown.set_attn_implementation(model.config._attn_implementation)
    return grown


def grow_checkpoint(
    checkpoint: str | os.PathLike[str], exit_layers: Sequence[int], out: str | os.PathLike[str], *, seed: int = 0
) -> Path:
    """Add layers and exits (see `grow`) to a checkpoint with exit 0 only; return `out`, the folder of the result."""
    model, tokenizer = load_checkpoint(checkpoint)
    torch.manual_seed(seed)
    return save_retrieval_checkpoint(grow(model, exit_layers), tokenizer, out, parent=checkpoint)


def add_adapters(model: ModularStarEncoderPreTrainedModel, settings: Mapping[str, Any] | None) -> nn.Module:
    """Freeze a model's trunk, add LoRA adapters, and return the `PeftModel`; if `settings` is None, return `model`."""
    if settings is None:
        return model
    with naming_extra():
        from peft import LoraConfig, get_peft_model
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]
    # Projection heads are named one by one, because peft takes no `ModuleDict`.
    heads = [f"projection_heads.{exit_layer}" for exit_layer in getattr(model, "projection_heads", ())]
    heads += [name for name, _ in model.named_children() if name not in ("model", "projection_heads")]
    defaults = {"modules_to_save": heads, "r": 16, "lora_alpha": 32, "target_modules": linear}
    try:
        return get_peft_model(model, LoraConfig(**{**defaults, **settings}))
    except (TypeError, ValueError, LookupError, AttributeError, ImportError) as error:
        message = f"peft.LoraConfig rejects the settings in `lora`: {' '.join(str(error).split())}."
        raise UserError("training.lora", message) from error
