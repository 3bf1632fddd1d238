"""Turns source code into rows, and rows into batches. Only the modules that make tensors import torch."""
