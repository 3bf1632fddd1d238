import io
import os
import stat
import struct
import tarfile
import zipfile

import pytest

from modular_star_encoder.data.sources import FileFilters
from modular_star_encoder.data.sources.repositories import ArchiveLimits, archive_repositories
from tests.errors import raises

TAR_MODES = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path, files, mode="w:gz"):
    """`files` maps a name to bytes or text, or to a function that changes its header."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if callable(content):
                content(info)
                archive.addfile(info)
            else:
                data = content.encode() if isinstance(content, str) else content
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def contents(reader):
    return [(file.repository, file.path, file.language, file.text) for file in reader]


def paths(reader):
    return [file.path for file in reader]


@pytest.mark.parametrize("suffix", [*TAR_MODES, ".zip", ".jar"])
def test_every_kind_of_archive_is_one_repository_in_the_order_of_its_members(tmp_path, suffix):
    files = {"b/x.go": "package x", "a/y.py": "y = 1", "README.md": "no"}
    path = tmp_path / f"project{suffix}"
    make_tar(path, files, TAR_MODES[suffix]) if suffix in TAR_MODES else make_zip(path, files)
    reader = archive_repositories(path)
    expected = [("project", "b/x.go", "go", "package x"), ("project", "a/y.py", "python", "y = 1")]
    assert contents(reader) == expected
    assert contents(reader) == expected
    assert reader.repositories == ("project",)
    assert reader.skipped == {}


def test_a_folder_of_archives_holds_one_repository_each_named_by_its_path(tmp_path):
    (tmp_path / "in").mkdir()
    make_zip(tmp_path / "in" / "b.zip", {"x.py": "1"})
    make_tar(tmp_path / "a.tar.gz", {"x.py": "2"})
    make_zip(tmp_path / "a.zip", {"x.py": "3"})
    (tmp_path / "link.zip").symlink_to(tmp_path / "a.zip")
    (tmp_path / "notes.txt").write_text("x")
    reader = archive_repositories(tmp_path)
    assert [(file.repository, file.text) for file in reader] == [("a.tar.gz", "2"), ("a.zip", "3"), ("in/b", "1")]
    assert reader.repositories == ("a.tar.gz", "a.zip", "in/b")


def test_nothing_is_written_to_disk(tmp_path, monkeypatch):
    make_tar(tmp_path / "a.tar.gz", {"x.py": "1"})
    make_zip(tmp_path / "b.zip", {"x.py": "1"})
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.mkstemp", None)
    assert len(contents(archive_repositories(tmp_path))) == 2
    assert sorted(tmp_path.rglob("*")) == before


OUTSIDE = ["/etc/x.py", "../x.py", "a/../../x.py", "C:/x.py", "..\\x.py", "C:\\x.py"]


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_members_whose_path_leads_outside_are_counted_and_not_read(tmp_path, make):
    suffix = ".zip" if make is make_zip else ".tar.gz"
    make(tmp_path / f"a{suffix}", {**dict.fromkeys(OUTSIDE, "secret"), "ok.py": "x"})
    reader = archive_repositories(tmp_path)
    assert paths(reader) == ["ok.py"]
    assert reader.skipped == {"unsafe path": len(OUTSIDE)}


def test_links_and_devices_of_a_tar_are_counted_and_never_followed(tmp_path):
    secret = tmp_path / "secret.py"
    secret.write_text("secret")

    def link(kind, target=""):
        def change(info):
            info.type, info.linkname = kind, target

        return change

    make_tar(
        tmp_path / "a.tar",
        {
            "ok.py": "x",
            "soft.py": link(tarfile.SYMTYPE, str(secret)),
            "hard.py": link(tarfile.LNKTYPE, "ok.py"),
            "device.py": link(tarfile.CHRTYPE),
            "pipe.py": link(tarfile.FIFOTYPE),
            "folder.py": link(tarfile.DIRTYPE),
        },
        "w",
    )
    reader = archive_repositories(tmp_path / "a.tar")
    assert paths(reader) == ["ok.py"]
    assert reader.skipped == {"link or device": 4}


def test_links_of_a_zip_are_counted_and_never_followed(tmp_path):
    info = zipfile.ZipInfo("link.py")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    make_zip(tmp_path / "a.zip", {"ok.py": "x", info: "/etc/passwd"})
    reader = archive_repositories(tmp_path)
    assert paths(reader) == ["ok.py"]
    assert reader.skipped == {"link or device": 1}


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_large_members_are_counted_without_being_unpacked(tmp_path, make, monkeypatch):
    suffix = ".zip" if make is make_zip else ".tar.gz"
    make(tmp_path / f"a{suffix}", {"big.py": "x\n" * 10_000, "ok.py": "x"})
    reads = []
    for kind in (zipfile.ZipExtFile, tarfile.ExFileObject):
        monkeypatch.setattr(kind, "read", lambda self, *size, old=kind.read: reads.append(size) or old(self, *size))
    reader = archive_repositories(tmp_path, filters=FileFilters(max_bytes=100))
    assert paths(reader) == ["ok.py"]
    assert reader.skipped == {"too large": 1}
    assert reads == [(101,)]


def test_a_zip_that_declares_too_small_a_size_is_not_unpacked_beyond_it(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"bomb.py": "x" * 5_000_000, "ok.py": "x"})
    data = path.read_bytes().replace(struct.pack("<I", 5_000_000), struct.pack("<I", 50))
    path.write_bytes(data)
    reader = archive_repositories(path)
    assert paths(reader) == ["ok.py"]
    assert reader.skipped == {"unreadable": 1}


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_reading_stops_at_the_largest_number_of_members(tmp_path, make):
    suffix = ".zip" if make is make_zip else ".tar.gz"
    make(tmp_path / f"a{suffix}", {f"{number}.py": "x" for number in range(9)})
    make(tmp_path / f"b{suffix}", {"0.py": "x"})
    reader = archive_repositories(tmp_path, limits=ArchiveLimits(max_members=5))
    assert len(paths(reader)) == 6
    assert reader.skipped == {"rest of an archive with too many members": 1}


def test_a_zip_with_a_huge_directory_is_refused_before_it_is_read(tmp_path):
    make_zip(tmp_path / "a.zip", {f"{'x' * 900}{number}.py": "x" for number in range(9)})
    reader = archive_repositories(tmp_path, limits=ArchiveLimits(max_members=9))
    assert paths(reader) == []
    assert reader.skipped == {"rest of an archive with too many members": 1}


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_reading_stops_at_the_largest_number_of_unpacked_bytes(tmp_path, make):
    suffix = ".zip" if make is make_zip else ".tar.gz"
    text = "word\n" * 40_000
    make(tmp_path / f"a{suffix}", {f"{number}.py": text for number in range(9)})
    reader = archive_repositories(tmp_path, limits=ArchiveLimits(max_bytes=1_000_000))
    assert 3 <= len(paths(reader)) <= 5
    assert reader.skipped == {"rest of an archive that unpacks to too many bytes": 1}


def test_bytes_of_other_members_of_a_compressed_tar_count_too(tmp_path):
    make_tar(tmp_path / "a.tar.gz", {"zeros.bin": b"\0" * 5_000_000, "x.py": "x"})
    reader = archive_repositories(tmp_path, limits=ArchiveLimits(max_bytes=1_000_000))
    assert paths(reader) == []
    assert reader.skipped == {"rest of an archive that unpacks to too many bytes": 1}


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_of_a_huge_size_is_refused_before_it_is_read(tmp_path, kind):
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 3_000_000
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.fileobj.write(header.tobuf() + b"x" * 3_000_320 + b"\0" * 10240)
    reader = archive_repositories(tmp_path)
    assert paths(reader) == []
    assert reader.skipped == {"rest of an archive with huge headers": 1}


def test_headers_are_not_kept_in_memory(tmp_path):
    make_tar(tmp_path / "a.tar", {f"{number}.py": "x" for number in range(50)}, "w")
    kept = []
    original = tarfile.TarFile.next

    class Watched(tarfile.TarFile):
        def next(self):
            kept.append(len(self.members))
            return original(self)

    tarfile.TarFile.next, patched = Watched.next, original
    try:
        assert len(paths(archive_repositories(tmp_path))) == 50
    finally:
        tarfile.TarFile.next = patched
    assert max(kept) <= 1


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz"])
def test_damaged_archives_are_counted_and_the_next_is_read(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"no archive at all" * 100)
    make_zip(tmp_path / "b.zip", {"ok.py": "x"})
    reader = archive_repositories(tmp_path)
    assert paths(reader) == ["ok.py"]
    assert reader.skipped == {"rest of a damaged archive": 1}


def test_a_truncated_archive_yields_what_comes_before_the_damage(tmp_path):
    path = make_tar(tmp_path / "a.tar.gz", {"ok.py": "x", "big.bin": os.urandom(200_000), "late.py": "x"})
    path.write_bytes(path.read_bytes()[:100_000])
    reader = archive_repositories(path)
    assert paths(reader) == ["ok.py"]
    assert reader.skipped == {"rest of a damaged archive": 1}


def test_an_encrypted_member_is_counted_and_the_others_are_read(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a.py": "x", "b.py": "x"})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(signature) + offset] |= 1
    path.write_bytes(data)
    reader = archive_repositories(path)
    assert paths(reader) == ["b.py"]
    assert reader.skipped == {"unreadable": 1}


def test_filters_languages_and_closed_folders_hold_inside_archives(tmp_path):
    files = ["p/a.py", "p/b.go", "p/tests/c.go", "p/vendor/d.go", "p/.hidden/e.go", "p/node_modules/f.go"]
    make_tar(tmp_path / "a.tar.gz", dict.fromkeys(files, "x"))
    reader = archive_repositories(tmp_path, languages=["go"])
    assert paths(reader) == ["p/b.go"]
    assert reader.skipped == {"test code": 1, "vendored code": 1}


def test_shards_of_a_folder_of_archives_share_out_every_archive_once(tmp_path):
    for name in "abcde":
        make_zip(tmp_path / f"{name}.zip", {"x.py": name})
    reader = archive_repositories(tmp_path)
    shards = [reader.shard(index, 2) for index in range(2)]
    assert [shard.repositories for shard in shards] == [("a", "c", "e"), ("b", "d")]
    assert [[file.text for file in shard] for shard in shards] == [["a", "c", "e"], ["b", "d"]]
    assert [file.text for file in shards[0].skip(1)] == ["c", "e"]


def test_what_is_no_archive_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "x.py").write_text("x")
    with raises("data.source.missing", "missing.zip"):
        archive_repositories(tmp_path / "missing.zip")
    for source in (tmp_path, tmp_path / "x.py"):
        with raises("data.source.no_files", source, ".zip"):
            archive_repositories(source)
    make_zip(tmp_path / "a.zip", {"x.py": "x"})
    with raises("data.language.unknown", "cobol"):
        archive_repositories(tmp_path, languages=["cobol"])
    with raises("data.archive.limits", "max_members=0"):
        ArchiveLimits(max_members=0)
