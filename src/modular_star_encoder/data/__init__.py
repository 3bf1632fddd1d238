"""From source code to rows to batches; only the modules that make tensors import torch."""
