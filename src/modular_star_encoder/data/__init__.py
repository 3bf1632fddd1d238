"""Turns source code into rows, and rows into batches; only the modules that make tensors import torch."""
