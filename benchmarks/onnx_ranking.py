"""Do the ONNX files of every exit rank as torch does, and what do 8-bit weights cost? On rows of CodeSearchNet.

    MOSE_DATA=~/data python benchmarks/onnx_ranking.py runs/quickstart/model

Each description is ranked against all functions of the language. A file is written by `export_for_serving`, which
compares it with torch at several shapes too; figures are about rankings, not about speed.
"""

import argparse
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from report import write

from modular_star_encoder.evaluation.benchmarks.codesearchnet import language_patterns, read_functions
from modular_star_encoder.evaluation.benchmarks.rows import require_files
from modular_star_encoder.evaluation.tasks import RetrievalTask, pairs_task
from modular_star_encoder.hub.onnx_export import ONNX_FILE, QUANTIZED_FILE, SETTINGS, export_onnx_folder
from modular_star_encoder.modeling import ModularStarEncoderConfig
from modular_star_encoder.utils.reports import library_versions


def main() -> None:
    """Parse, export and measure every exit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a retrieval checkpoint")
    parser.add_argument("--languages", nargs="+", default=["ruby"], help="default: ruby")
    parser.add_argument("--name", default="onnx_ranking_quickstart", help="of the results (default: %(default)s)")
    arguments = parser.parse_args()
    if "MOSE_DATA" not in os.environ:
        parser.error("set MOSE_DATA to a folder that holds codesearchnet/ruby_test.jsonl.gz")
    folder = Path(os.environ["MOSE_DATA"], "codesearchnet")
    tasks = [full_pool_task(folder, language) for language in arguments.languages]
    exits = [measure(arguments.checkpoint, exit_layer, tasks) for exit_layer in exits_of(arguments.checkpoint)]
    figures = {"onnx_versions": library_versions(("onnx", "onnxruntime", "onnxscript")), "int8": SETTINGS}
    print(f"\n{write(arguments.name, {**figures, 'exits': exits})}")


def full_pool_task(folder: Path, language: str) -> RetrievalTask:
    """All documented functions of a language as one pool."""
    rows = read_functions(require_files(folder, language_patterns("test", language)), language)
    return pairs_task("codesearchnet", language, list(rows.values()), ids=list(rows), size=len(rows))


def exits_of(checkpoint: str) -> list[int]:
    """The exits of a checkpoint."""
    return list(ModularStarEncoderConfig.from_pretrained(checkpoint).exit_layers)


def measure(checkpoint: str, exit_layer: int, tasks: list[RetrievalTask]) -> dict[str, Any]:
    """One exit: sizes of its files, and how they rank beside torch."""
    with tempfile.TemporaryDirectory() as out:
        written = export_onnx_folder(checkpoint, exit_layer, Path(out, "onnx"), int8=True, tasks=tasks)
        sizes = {file: (written.folder / file).stat().st_size for file in (ONNX_FILE, QUANTIZED_FILE)}
    report: Any = written.report
    print(f"exit {exit_layer}\n{report.to_markdown()}\n")
    return {"exit_layer": exit_layer, "bytes": sizes, "tables": list(map(asdict, report.tables))}


if __name__ == "__main__":
    main()
