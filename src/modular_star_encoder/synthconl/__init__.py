"""Build a dataset like SynthCoNL: extract functions, translate them, drop near-duplicates, split, publish."""
