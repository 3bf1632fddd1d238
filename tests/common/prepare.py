"""Fetch transformers' own common tests for the installed version: `python -m tests.common.prepare`.

The wheel has no tests. The source distribution has the top-level ones, which import three modules from missing
sub-folders; those get stand-ins here. Git ignores the folder of these files, which has a sub-folder for each version.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from types import ModuleType

CACHE = Path(__file__).parents[2] / ".cache" / "transformers-tests"
PACKAGE = "transformers_common_tests"

# The mixins of generation, which an encoder has not, and of export are in files that are not distributed.
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    # Values that differ from every default, so that `ConfigTester` sees whether a configuration keeps them.
    "utils/test_configuration_utils.py": """config_common_kwargs = {
    "architectures": ["SomeModel"], "chunk_size_feed_forward": 7, "dtype": "float16", "is_encoder_decoder": True,
    "id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2},
    "name_or_path": "some/model", "output_attentions": True, "output_hidden_states": True,
    "problem_type": "regression", "return_dict": False,
}
""",
}


def suite_folder(cache: Path = CACHE) -> Path:
    """The folder for the tests of the installed transformers."""
    return cache / version("transformers")


def prepare(cache: Path = CACHE) -> Path:
    """Fetch the tests unless they are there, and return their folder."""
    folder = suite_folder(cache)
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # The folder gets its final name once it is complete.
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=cache) as temporary:
        lay_out(download(Path(temporary), version("transformers")), Path(temporary) / "suite")
        try:
            (Path(temporary) / "suite").rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    return folder


def download(folder: Path, wanted: str) -> Path:
    """Let pip fetch the source distribution of transformers, whose checksum it verifies."""
    # Without isolation pip reads the metadata with the setuptools that is installed and downloads nothing else.
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "transformers", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, f"transformers=={wanted}"], check=True)
    return folder / f"transformers-{wanted}.tar.gz"


def lay_out(archive: Path, folder: Path) -> None:
    """Make an importable package of the archive's top-level test files and the stand-ins."""
    package = folder / PACKAGE
    package.mkdir(parents=True)
    tests = PurePosixPath(archive.name.removesuffix(".tar.gz"), "tests")
    with tarfile.open(archive) as source:
        for member in source:
            place = PurePosixPath(member.name)
            if member.isfile() and place.parent == tests and place.suffix == ".py":
                member.name = place.name
                source.extract(member, package, filter="data")
    if not (package / "test_modeling_common.py").is_file():
        raise FileNotFoundError(f"{archive.name} has no tests/test_modeling_common.py")
    (package / "__init__.py").touch()
    for name, text in STAND_INS.items():
        path = package / name
        path.parent.mkdir()
        (path.parent / "__init__.py").touch()
        path.write_text(text, encoding="utf-8")


def import_suite(name: str) -> ModuleType:
    """Import one module of the tests that `prepare` fetched."""
    folder = str(suite_folder())
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(f"{PACKAGE}.{name}")


if __name__ == "__main__":
    prepare()
