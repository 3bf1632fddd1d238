"""Build a dataset like the paper's SynthCoNL: extract and translate functions, drop near-duplicates, publish."""
