"""Load the published repositories (huggingface.co/modularStarEncoder) unmodified, without their remote code.

The configuration of a published model does not say whether the model is fine-tuned, and may lack the number of layers.
`read_published_layout` infers both from the tensor names in the header of the safetensors file. Repositories that this
package writes already have our tensor names, so they do not need this module.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file, logging

from .configuration_modular_star_encoder import ModularStarEncoderConfig
from .modeling_modular_star_encoder import (
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderModel,
    ModularStarEncoderPreTrainedModel,
)

logger = logging.get_logger(__name__)

PUBLISHED_ARCHITECTURE = "ModularStarEncoder"

Shapes = dict[str, tuple[int, ...]]

_TRUNK = r"^starEncoder2\.(?:module\.)?"
_HEADS = r"^(?:cls|head|heads)\."
# Pattern of a published tensor name → our name; the first match counts. All shapes follow from the sizes of the
# published files, but not the names in the pre-training heads, so every plausible spelling is accepted.
_RENAMINGS = {
    rf"{_TRUNK}(?=embed_tokens\.|layers\.|norm\.)": "model.",
    rf"{_HEADS}predictions\.transform\.dense\.": "heads.transform.",
    rf"{_HEADS}predictions\.transform\.(?:LayerNorm|layer_norm)\.": "heads.layer_norm.",
    rf"{_HEADS}predictions\.decoder\.": "heads.decoder.",
    rf"{_HEADS}predictions\.bias$": "heads.decoder.bias",
    rf"{_HEADS}seq_relationship\.": "heads.icc_classifier.",
    rf"{_HEADS}conditional_embeddings\.": "heads.exit_embedding.",
    r"^(?:cls\.|head\.|heads\.)?pooler\.dense\.": "heads.pooler.dense.",
}
_PROJECTION = re.compile(rf"{_TRUNK}projection_heads\.(\d+)\.")
_LAYER = re.compile(rf"{_TRUNK}layers\.(\d+)\.")

# Arguments of `from_pretrained` that stay in `kwargs`, although a configuration has attributes of these names.
_NOT_FIELDS = ("dtype", "torch_dtype", "attn_implementation")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def read_published_layout(
    model_class: type[ModularStarEncoderPreTrainedModel], path: str | os.PathLike | None, kwargs: Mapping[str, Any]
) -> tuple[type[ModularStarEncoderPreTrainedModel], dict[str, Any]]:
    """Return the class that loads a checkpoint, and the keyword arguments for the `from_pretrained` of this class.

    For a published checkpoint, the arguments have a complete `config` and a `key_mapping` of its tensor names to ours.
    If `model_class` is our base class, the tensors in the file choose the class. So they do if it is the class of the
    trunk, which `AutoModel` takes for class names that it does not know. ValueError if the tensors are not those of a
    published checkpoint.
    """
    kwargs = dict(kwargs)
    if path is None:
        return model_class, kwargs
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
    from_auto_class = isinstance(kwargs.get("config"), PreTrainedConfig)
    config = kwargs["config"] if from_auto_class else _published_config(kwargs.get("config") or path, hub, kwargs)
    if config is None or config.architectures != [PUBLISHED_ARCHITECTURE]:
        return model_class, kwargs
    file = cached_file(path, SAFE_WEIGHTS_NAME, **hub, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return model_class, kwargs
    with safe_open(file, "pt") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    checkpoint_class, complete, renamings = describe(shapes, config)
    check_layout(shapes, checkpoint_class, complete, renamings)
    complete.exit_layer = config.exit_layer
    by_default = from_auto_class and model_class is ModularStarEncoderModel
    retrieval = checkpoint_class is ModularStarEncoderForRetrieval
    if model_class is ModularStarEncoderPreTrainedModel or (by_default and retrieval):
        model_class = checkpoint_class
    return model_class, {**kwargs, "config": complete, "key_mapping": renamings}


def _published_config(
    path: str | os.PathLike, hub: Mapping[str, Any], kwargs: dict[str, Any]
) -> ModularStarEncoderConfig | None:
    """Return a published checkpoint's configuration, changed by fields in `kwargs` (popped); None for others."""
    config_dict, _ = PreTrainedConfig.get_config_dict(path, **hub)
    if config_dict.get("architectures") != [PUBLISHED_ARCHITECTURE]:
        return None
    config = ModularStarEncoderConfig.from_pretrained(path, **hub)
    own = {name: kwargs.pop(name) for name in list(kwargs) if name not in _NOT_FIELDS and hasattr(config, name)}
    return ModularStarEncoderConfig.from_pretrained(path, **hub, **own)


def describe(
    shapes: Shapes, config: ModularStarEncoderConfig
) -> tuple[type[ModularStarEncoderPreTrainedModel], ModularStarEncoderConfig, dict[str, str]]:
    """Return the model class, complete configuration and {regular expression: our tensor name} for a published file.

    `shapes` maps the names of the file's tensors to their shapes. `config` may lack the number of layers. ValueError if
    no published file has this number of layers or of projection heads.
    """
    layers = {int(match[1]) for name in shapes if (match := _LAYER.match(name))}
    heads = sorted({int(match[1]) for name in shapes if (match := _PROJECTION.match(name))})
    parent_exits, parent_depth = list(config.parent_exit_layers), config.parent_exit_layers[-1]
    depth = max(layers, default=-1) + 1
    exits = [exit_layer for exit_layer in parent_exits if exit_layer <= depth]
    if depth not in parent_exits or len(heads) not in (0, 1, len(exits)):
        raise ValueError(
            f"The checkpoint has {depth} layers and {len(heads)} projection heads. A published checkpoint "
            f"has one of {parent_exits} as number of layers, and 0, 1 or {len(exits)} heads. Download the files again."
        )
    complete = ModularStarEncoderConfig.from_dict(config.to_dict() | {"exit_layer": None})
    complete._attn_implementation = config._attn_implementation
    complete.num_hidden_layers, complete.parent_num_hidden_layers = depth, parent_depth
    complete.exit_layers = exits[-1:] if len(heads) == 1 else exits
    if complete.output_all_exits is None:
        complete.output_all_exits = True
    if depth < parent_depth and config.exit_norm != "all":
        complete.exit_norm = "none"
        if any(re.match(rf"{_TRUNK}norm\.", name) for name in shapes):
            logger.warning_once(
                f"The final norm of this checkpoint of {depth} layers is not applied. The uncut model applies it only "
                f'after layer {parent_depth}. To apply it after layer {depth}, load with exit_norm="all".'
            )
    checkpoint_class: type[ModularStarEncoderPreTrainedModel] = ModularStarEncoderModel
    if heads:
        checkpoint_class = ModularStarEncoderForRetrieval
    elif any(re.match(_HEADS, name) for name in shapes):
        checkpoint_class = ModularStarEncoderForPreTraining
        # The published files have five exits; by their sizes, the exit embedding may have four or five rows.
        rows = [shape[0] for name, shape in shapes.items() if name.endswith("conditional_embeddings.weight")]
        if rows == [len(parent_exits) - 1]:
            complete.exit_embedding_rows = rows[0]
            logger.warning_once(
                f"The checkpoint has learned vectors of {rows[0]} of {len(parent_exits)} exits. At exit {parent_depth} "
                f"the pre-training heads get a vector of zeros. The layers and their states are not affected."
            )
    complete.architectures = [checkpoint_class.__name__]
    renamings = dict(_RENAMINGS)
    for index, exit_layer in zip(heads, complete.exit_layers, strict=False):
        for place, ours in (("0", "dense"), ("2", "out_proj")):
            pattern = rf"{_TRUNK}projection_heads\.{index}\.{place}\."
            renamings[pattern] = f"projection_heads.{exit_layer}.{ours}."
    return checkpoint_class, complete, renamings


def check_layout(
    shapes: Shapes,
    checkpoint_class: type[ModularStarEncoderPreTrainedModel],
    config: ModularStarEncoderConfig,
    renamings: Mapping[str, str],
) -> None:
    """Raise ValueError if a tensor of a published file is missing, unexpected, stored twice or has a wrong shape."""
    with torch.device("meta"):
        model = checkpoint_class(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if checkpoint_class is ModularStarEncoderModel:
        expected = {f"model.{name}": shape for name, shape in expected.items()}
    found = set()
    problems = []
    for name, shape in shapes.items():
        ours = _rename(name, renamings)
        if ours in found:
            problems.append(f"{name} is stored under two names")
        elif ours not in expected and not (config.exit_norm == "none" and ours.startswith("model.norm.")):
            problems.append(f"{name} is unexpected")
        elif ours in expected and shape != expected[ours]:
            problems.append(f"{name} has shape {list(shape)} instead of {list(expected[ours])}")
        found.add(ours)
    # The first version of the published pre-trained model has no vocabulary bias; it loads with a bias of zero.
    problems += [f"{name} (our name) is missing" for name in expected if name not in found | {"heads.decoder.bias"}]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"Tensors differ from a published ModularStarEncoder: {'; '.join(problems[:8])}{more}.")


def _rename(name: str, renamings: Mapping[str, str]) -> str:
    for pattern, replacement in renamings.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name
