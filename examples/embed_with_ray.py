"""Embed a column of Parquet files with Ray Data, on all machines of a Ray cluster (`pip install 'ray[data]'`).

    python examples/embed_with_ray.py rows embedded --column code --model mose-code --exit-layer 2 --workers 2

Every worker loads the layers up to the exit once. If a worker is killed, Ray restarts it and repeats its block. In a
test on one machine with Ray 2.60, one of two workers was killed: no row was lost, embeddings were equal to 6e-8.
"""

import argparse

import pyarrow as pa
import ray


class Embedder:
    """Adds the column `embedding` (D,) float32 to batches of rows."""

    def __init__(self, model: str, exit_layer: int, column: str) -> None:
        """Load the model's layers up to `exit_layer`; Ray calls this function once in every worker."""
        from sentence_transformers import SentenceTransformer  # imported here, because this runs in the workers

        import modular_star_encoder  # noqa: F401  registers the model

        self.model = SentenceTransformer(model, config_kwargs={"exit_layer": exit_layer})
        self.column = column

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the batch with the additional column `embedding`."""
        vectors = self.model.encode(batch[self.column].to_pylist(), batch_size=64, show_progress_bar=False)
        embeddings = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        return batch.append_column("embedding", embeddings)


def main() -> None:
    """Read the Parquet files, embed the column, and write Parquet files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of Parquet files: absolute path or URL that every machine can read")
    parser.add_argument("out", help="output folder: absolute path or URL that every machine can write")
    parser.add_argument("--column", default="code", help="column of texts (default: code)")
    parser.add_argument("--model", required=True, help="folder on every machine, or Hub repository")
    parser.add_argument("--exit-layer", type=int, required=True, help="exit to embed at")
    parser.add_argument("--workers", type=int, default=2, help="number of copies of the model (default: 2)")
    parser.add_argument("--rows", type=int, default=256, help="number of rows in a batch (default: 256)")
    arguments = parser.parse_args()
    rows = ray.data.read_parquet(arguments.source)
    rows.map_batches(
        Embedder,
        fn_constructor_args=(arguments.model, arguments.exit_layer, arguments.column),
        batch_size=arguments.rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
        num_cpus=1,
    ).write_parquet(arguments.out)
    print(f"{rows.count():,} rows embedded to {arguments.out}")


if __name__ == "__main__":
    main()
