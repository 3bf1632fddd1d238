"""A script for a process of its own, where no library remembers another Hub: a Trainer pushes a checkpoint."""

import sys

from transformers import Trainer, TrainingArguments

from modular_star_encoder.inference.checkpoints import load_checkpoint

if __name__ == "__main__":
    source, folder, repository = sys.argv[1:]
    model, tokenizer = load_checkpoint(source)
    arguments = TrainingArguments(folder, hub_model_id=repository, report_to="none", use_cpu=True)
    Trainer(model, arguments, processing_class=tokenizer).push_to_hub(tags=["code"])
