"""Write a retrieval checkpoint: one folder for `AutoModel` and `SentenceTransformer`."""

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modular_star_encoder.data.files import staged_folder
from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.hub.sentence_transformer_files import write_sentence_transformer_files
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval


def save_retrieval_checkpoint(
    model: ModularStarEncoderForRetrieval, tokenizer: PreTrainedTokenizerBase, out: str | os.PathLike
) -> Path:
    """Write model, code, tokenizer, and the prompts and modules of a SentenceTransformer.

    Args:
        out: folder to write; it must not exist, or be empty. It appears whole or not at all.

    Raises:
        ValueError: `out` is taken, or the model's embeddings are not what a SentenceTransformer's modules can make.
    """
    with staged_folder(out) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        prompts = sentence_transformer_prompts(instructions=model.config.instruction_prompts)
        write_sentence_transformer_files(staging, model.config, prompts)
    return Path(out)
