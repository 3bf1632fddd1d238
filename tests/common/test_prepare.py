import io
import tarfile

import pytest

from tests.common import prepare


def write_archive(path, *names, links=()):
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        for name in links:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "../../outside.py"
            archive.addfile(link)
    return path


ARCHIVE = "transformers-1.tar.gz"
GOOD = "transformers-1/tests/test_modeling_common.py"


def test_only_top_level_test_files_are_extracted_and_nothing_lands_outside(tmp_path):
    archive = write_archive(
        tmp_path / ARCHIVE,
        GOOD,
        "transformers-1/tests/../../../escaped.py",
        "transformers-1/tests/deeper/test_more.py",
        "transformers-1/setup.py",
        "/tests/absolute.py",
        "../tests/above.py",
        links=["transformers-1/tests/link.py"],
    )
    prepare.lay_out(archive, tmp_path / "a" / "suite")
    package = tmp_path / "a" / "suite" / prepare.PACKAGE
    assert {path.name for path in package.glob("*.py")} == {"__init__.py", "test_modeling_common.py"}
    assert [path for path in tmp_path.rglob("*.py") if not path.is_relative_to(package)] == []


def test_an_interrupted_fetch_is_repeated(tmp_path, monkeypatch):
    def broken(folder, wanted):
        archive = write_archive(folder / ARCHIVE, *(f"transformers-1/tests/test_{n}.py" for n in range(99)), GOOD)
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
        return archive

    monkeypatch.setattr(prepare, "download", broken)
    with pytest.raises(EOFError):
        prepare.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(prepare, "download", lambda folder, wanted: write_archive(folder / ARCHIVE, GOOD))
    folder = prepare.prepare(tmp_path)
    assert folder == prepare.suite_folder(tmp_path)
    assert (folder / prepare.PACKAGE / "test_modeling_common.py").is_file()


def test_what_is_already_here_is_not_fetched_again(tmp_path, monkeypatch):
    prepare.suite_folder(tmp_path).mkdir()
    monkeypatch.setattr(prepare, "download", None)
    assert prepare.prepare(tmp_path) == prepare.suite_folder(tmp_path)
