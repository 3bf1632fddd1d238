"""SynthCoNL: documented functions, translated, near-deduplicated, split, described and published."""
