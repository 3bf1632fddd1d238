"""The dataset SynthCoNL: documented functions, translated, near-deduplicated, split, described and published.

The modules are imported one by one; none of them loads torch by itself.
"""
