"""From source code to rows to batches; importing one module does not load torch unless it makes tensors."""
