import io
import tarfile

from tests.common import prepare
from tests.common.structure import DECLINED, findings

ARCHIVE = "transformers-1.tar.gz"
GOOD = "transformers-1/tests/test_modeling_common.py"


def write_archive(path, *names, links=()):
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        for name in links:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "../../outside.py"
            archive.addfile(link)
    return path


def test_only_top_level_test_files_are_extracted_and_nothing_outside_the_folder(tmp_path):
    refused = ("transformers-1/tests/../../../escaped.py", "transformers-1/tests/deeper/test_more.py")
    refused += ("transformers-1/setup.py", "/tests/absolute.py", "../tests/above.py")
    archive = write_archive(tmp_path / ARCHIVE, GOOD, *refused, links=["transformers-1/tests/link.py"])
    prepare.lay_out(archive, tmp_path / "a" / "suite")
    package = tmp_path / "a" / "suite" / prepare.PACKAGE
    assert {path.name for path in package.glob("*.py")} == {"__init__.py", "test_modeling_common.py"}
    assert [path for path in tmp_path.rglob("*.py") if not path.is_relative_to(package)] == []


def test_model_files_follow_every_structural_rule_of_transformers_but_the_declined_ones():
    # Equal, not a subset: a rule that is followed after all leaves the list.
    assert {finding["rule"] for finding in findings()} == set(DECLINED)
