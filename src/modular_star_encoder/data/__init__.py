"""Turns source code into rows of training data, and rows into batches. Only modules that make tensors import torch."""
