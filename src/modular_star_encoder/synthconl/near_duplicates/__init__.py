"""Near-duplicates of texts: MinHash bands propose pairs, the true Jaccard similarity of their shingles decides.

- `in_memory.find_near_duplicates`: columns of texts in, what to keep and why out.
- `stage.drop_near_duplicates`: the same over parquet files, in bounded memory, restartable.
- `datatrove_steps`: the same stage as tasks of datatrove's executors, on many machines.

The unit is the row throughout: counts are of rows, and a cluster is a set of rows.
"""
