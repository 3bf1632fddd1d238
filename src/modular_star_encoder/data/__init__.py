"""From source code to rows to batches: repositories, documented functions, splits, prompts, tokens, datasets.

The modules are imported one by one (`from modular_star_encoder.data.functions import collect_functions`), so that
reading source files or asking for a prompt does not load torch.
"""
