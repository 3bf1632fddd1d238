"""Build a dataset like SynthCoNL: functions are extracted, translated, near-deduplicated, split and published."""
