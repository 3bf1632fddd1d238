import io
import lzma
import os
import stat
import struct
import tarfile
import time
import zipfile
import zlib

import pytest

from modular_star_encoder.data.sources import FileFilters, repositories
from modular_star_encoder.data.sources.repositories import archive_repositories
from tests.errors import raises

TAR_MODES = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path, files, mode="w:gz"):
    """`files` maps a name to bytes, text or, for a member without content, a mapping of header fields."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            fields = content if isinstance(content, dict) else {"size": len(content)}
            for field, value in fields.items():
                setattr(info, field, value)
            data = content.encode() if isinstance(content, str) else content
            archive.addfile(info, None if isinstance(data, dict) else io.BytesIO(data))
    return path


def make(path, files, suffix):
    path = path.with_name(path.name + suffix)
    return make_zip(path, files) if suffix in (".zip", ".jar") else make_tar(path, files, TAR_MODES[suffix])


BOTH = pytest.mark.parametrize("suffix", [".zip", ".tgz"])


def read(*arguments, **options):
    """(paths of the files, counts of what is left out)."""
    reader = archive_repositories(*arguments, **options)
    return [file.path for file in reader], reader.skipped


@pytest.mark.parametrize("suffix", [*TAR_MODES, ".zip", ".jar"])
def test_every_kind_of_archive_is_one_repository_in_the_order_of_its_members(tmp_path, suffix):
    files = {"b/x.go": "package x", "a/y.py": "y = 1", "README.md": "no"}
    path = make(tmp_path / "project", files, suffix)
    reader = archive_repositories(path)
    expected = [("project", "b/x.go", "go", "package x"), ("project", "a/y.py", "python", "y = 1")]
    for _ in range(2):
        assert [(file.repository, file.path, file.language, file.text) for file in reader] == expected
    assert reader.repositories == ("project",)
    assert reader.skipped == {}


def test_a_folder_of_archives_holds_one_repository_each_named_by_its_path_and_nothing_is_written(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    make_zip(tmp_path / "in" / "b.zip", {"x.py": "1"})
    make_tar(tmp_path / "a.tar.gz", {"x.py": "2"})
    make_zip(tmp_path / "a.zip", {"x.py": "3"})
    (tmp_path / "link.zip").symlink_to(tmp_path / "a.zip")
    (tmp_path / "notes.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.mkstemp", None)
    reader = archive_repositories(tmp_path)
    assert [(file.repository, file.text) for file in reader] == [("a.tar.gz", "2"), ("a.zip", "3"), ("in/b", "1")]
    assert reader.repositories == ("a.tar.gz", "a.zip", "in/b")
    assert sorted(tmp_path.rglob("*")) == before


OUTSIDE = ["/etc/x.py", "../x.py", "a/../../x.py", "C:/x.py", "..\\x.py", "C:\\x.py"]


@BOTH
def test_members_whose_path_leads_outside_are_counted_and_not_read(tmp_path, suffix):
    make(tmp_path / "a", {**dict.fromkeys(OUTSIDE, "secret"), "ok.py": "x"}, suffix)
    assert read(tmp_path) == (["ok.py"], {"unsafe path": len(OUTSIDE)})


def test_links_and_devices_are_counted_and_never_followed(tmp_path):
    secret = tmp_path / "secret.py"
    secret.write_text("secret")
    links = {
        "soft.py": {"type": tarfile.SYMTYPE, "linkname": str(secret)},
        "hard.py": {"type": tarfile.LNKTYPE, "linkname": "ok.py"},
        "device.py": {"type": tarfile.CHRTYPE},
        "pipe.py": {"type": tarfile.FIFOTYPE},
        "folder.py": {"type": tarfile.DIRTYPE},
    }
    make_tar(tmp_path / "a.tar", {"ok.py": "x"} | links, "w")
    info = zipfile.ZipInfo("link.py")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    make_zip(tmp_path / "b.zip", {"ok.py": "x", info: "/etc/passwd"})
    assert read(tmp_path) == (["ok.py", "ok.py"], {"link or device": 5})


@BOTH
def test_large_members_are_counted_without_being_unpacked(tmp_path, suffix, monkeypatch):
    make(tmp_path / "a", {"big.py": "x\n" * 10_000, "ok.py": "x"}, suffix)
    reads = []
    for kind in (zipfile.ZipExtFile, tarfile.ExFileObject):
        monkeypatch.setattr(kind, "read", lambda self, *size, old=kind.read: reads.append(size) or old(self, *size))
    assert read(tmp_path, filters=FileFilters(max_bytes=100)) == (["ok.py"], {"too large": 1})
    assert reads == [(101,)]


def test_a_zip_that_declares_too_small_a_size_is_not_unpacked_beyond_it(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"bomb.py": "x" * 5_000_000, "ok.py": "x"})
    data = path.read_bytes().replace(struct.pack("<I", 5_000_000), struct.pack("<I", 50))
    path.write_bytes(data)
    assert read(path) == (["ok.py"], {"unreadable": 1})


MANY, MUCH = "rest of an archive with too many members", "rest of an archive that unpacks to too many bytes"


@BOTH
def test_reading_stops_at_the_limits_of_members_and_of_unpacked_bytes(tmp_path, suffix, monkeypatch):
    make(tmp_path / "a", {f"{number}.py": "word\n" * 40_000 for number in range(9)}, suffix)
    make(tmp_path / "b", {"0.py": "x"}, suffix)
    with monkeypatch.context() as patched:
        patched.setattr(repositories, "MAX_ARCHIVE_MEMBERS", 5)
        paths, skipped = read(tmp_path)
    assert (len(paths), skipped) == (6 if suffix == ".tgz" else 1, {MANY: 1})
    monkeypatch.setattr(repositories, "MAX_ARCHIVE_BYTES", 1_000_000)
    paths, skipped = read(tmp_path)
    assert 4 <= len(paths) <= 6
    assert skipped == {MUCH: 1}
    make_tar(tmp_path / "zeros.tar.gz", {"zeros.bin": b"\0" * 5_000_000, "x.py": "x"})
    assert read(tmp_path / "zeros.tar.gz") == ([], {MUCH: 1})


@pytest.mark.parametrize("suffix", [".zip", ".tgz", ".tar.bz2", ".tar.xz"])
def test_an_archive_that_unpacks_to_many_times_its_size_is_left_at_a_part(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(repositories, "FREE_BYTES", 2**20)
    path = make(tmp_path / "bomb", {f"{number}.py": "word = 1\n" * 100_000 for number in range(30)}, suffix)
    paths, skipped = read(path)
    assert (len(paths) < 6, skipped) == (True, {MUCH: 1})


def test_a_huge_directory_or_header_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(repositories, "MAX_ARCHIVE_MEMBERS", 9)
    path = make_zip(tmp_path / "a.zip", {f"{'x' * 900}{number}.py": "x" for number in range(9)})
    assert read(path) == ([], {MANY: 1})
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        header = tarfile.TarInfo("x")
        header.type, header.size = kind, 3_000_000
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
            archive.fileobj.write(header.tobuf() + b"x" * 3_000_320 + b"\0" * 10240)
        assert read(tmp_path / "a.tar.gz") == ([], {"rest of an archive with huge headers": 1})


def record(key, value):
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, key, value)


def tar_of_headers(path, *headers):
    """Write a tar file of first.py, `headers` (type, data, name) as they are, and last.py."""
    with tarfile.open(path, "w") as archive:
        for kind, data, name in [(b"0", b"x", "first.py"), *headers, (b"0", b"x", "last.py")]:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, 0 if kind == b"S" else len(data)
            block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
            if kind == b"S":  # more of the map follows
                block[482], block[148:156] = 1, b" " * 8
                block[148:156] = b"%06o\0 " % sum(block)
            archive.fileobj.write(block + data + b"\0" * (-len(data) % 512))
    return path


SPARSE_10 = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0") + record(b"GNU.sparse.realsize", b"9")
ENDLESS = b"%d\n" % 10**9 + b"1\n" * 100
SPARSE_01 = record(b"GNU.sparse.map", b",".join([b"1"] * 9)) + record(b"GNU.sparse.size", b"9")


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x", SPARSE_10, "x"), (b"0", ENDLESS, "a.py")],
        [(b"x", SPARSE_01, "x"), (b"0", b"x", "a.py")],
        [(b"S", (b"%011o\0" % 1 * 42 + b"\1" + b"\0" * 7) * 9 + b"\0" * 512, "a.py")],
    ],
    ids=["1.0", "0.1", "old"],
)
def test_the_map_of_a_sparse_file_is_not_kept_and_the_next_member_is_read(tmp_path, headers, monkeypatch):
    maps, original = [], tarfile.TarFile.next
    monkeypatch.setattr(
        tarfile.TarFile, "next", lambda self: (info := original(self)) and (maps.append(info.sparse) or info)
    )
    path = tar_of_headers(tmp_path / "a.tar", *headers)
    assert read(path) == (["first.py", "last.py"], {"link or device": 1})
    assert [one for one in maps if one is not None] == [[]]


@pytest.mark.parametrize("keys", [b"1" * 100_000, b"2 " * 50_000 + b"a="], ids=["digits", "overlapping"])
def test_attributes_in_a_tar_are_read_in_linear_time(tmp_path, keys):
    path = tar_of_headers(tmp_path / "a.tar", (b"x", keys, "x"))
    start = time.process_time()
    read(path)
    assert time.process_time() - start < 2


def test_only_path_and_size_of_the_attributes_in_a_tar_are_kept(tmp_path, monkeypatch):
    kept, original = [], tarfile.TarFile.next
    monkeypatch.setattr(
        tarfile.TarFile, "next", lambda self: (info := original(self)) and (kept.append(info.pax_headers) or info)
    )
    own = record(b"path", "ä.py".encode()) + record(b"size", b"3") + record(b"comment", b"x")
    path = tar_of_headers(
        tmp_path / "a.tar", (b"g", record(b"path", b"no.py"), "g"), (b"x", own, "x"), (b"0", b"y=1", "b")
    )
    assert read(path) == (["first.py", "ä.py", "last.py"], {})
    assert not any(kept)
    data = tar_of_headers(tmp_path / "a.tar", (b"x", own, "x")).read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: 512 * 4] + b"no header" * 100)
    assert read(tmp_path / "a.tar") == (["first.py"], {"rest of a damaged archive": 1})


@BOTH
def test_a_path_of_more_than_4096_characters_ends_an_archive_and_a_repeated_path_is_left_out(tmp_path, suffix):
    path = make(tmp_path / "a", {"a.py": "x", "./a.py": "y", "A.py": "z", "d/" * 3000 + "a.py": "x"}, suffix)
    assert read(path) == (["a.py", "A.py"], {"repeated path": 1, "rest of an archive with huge headers": 1})


def test_a_zip_with_too_many_members_is_refused_whatever_number_it_declares(tmp_path, monkeypatch):
    monkeypatch.setattr(repositories, "MAX_ARCHIVE_MEMBERS", 50)
    path = make_zip(tmp_path / "a.zip", dict.fromkeys(map(str, range(51)), "x"))
    path.write_bytes(path.read_bytes().replace(struct.pack("<HH", 51, 51), struct.pack("<HH", 1, 1)))
    monkeypatch.setattr(zipfile, "ZipInfo", None)  # no member is built
    assert read(path) == ([], {MANY: 1})


def test_an_xz_file_may_have_several_streams_but_no_huge_dictionary(tmp_path):
    whole = make_tar(tmp_path / "a.tar", {"ok.py": "x = 1\n" * 1500, "b.py": "x"}, "w").read_bytes()
    path = tmp_path / "a.tar.xz"
    path.write_bytes(lzma.compress(whole[:5000]) + b"\0" * 40_000 + lzma.compress(whole[5000:]))
    assert read(path) == (["ok.py", "b.py"], {})
    data = bytearray(lzma.compress(whole))
    end = 12 + (data[12] + 1) * 4
    data[data.index(b"\x21\x01", 12) + 2] = 40  # 4 GiB
    data[end - 4 : end] = struct.pack("<I", zlib.crc32(data[12 : end - 4]))
    path.write_bytes(data)
    assert read(path) == ([], {"rest of a damaged archive": 1})


def test_headers_are_not_kept_in_memory(tmp_path, monkeypatch):
    make_tar(tmp_path / "a.tar", {f"{number}.py": "x" for number in range(50)}, "w")
    kept, original = [], tarfile.TarFile.next
    monkeypatch.setattr(tarfile.TarFile, "next", lambda self: kept.append(len(self.members)) or original(self))
    assert len(read(tmp_path)[0]) == 50
    assert max(kept) <= 1


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz"])
def test_damaged_archives_are_counted_and_the_next_is_read(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"no archive at all" * 100)
    make_zip(tmp_path / "b.zip", {"ok.py": "x"})
    assert read(tmp_path) == (["ok.py"], {"rest of a damaged archive": 1})
    path = make_tar(tmp_path / "cut.tar.gz", {"ok.py": "x", "big.bin": os.urandom(200_000), "late.py": "x"})
    path.write_bytes(path.read_bytes()[:100_000])
    assert read(path) == (["ok.py"], {"rest of a damaged archive": 1})


def test_members_that_are_encrypted_or_whose_unpacking_has_no_limit_are_counted_and_not_read(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.py", "x = 1")
        archive.writestr("b.py", "x = 1", zipfile.ZIP_DEFLATED)
    assert read(path) == (["b.py"], {"unreadable": 1})
    make_zip(path, {"a.py": "x", "b.py": "x"})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(signature) + offset] |= 1
    path.write_bytes(data)
    assert read(path) == (["b.py"], {"unreadable": 1})


def test_filters_languages_and_closed_folders_hold_inside_archives_and_a_source_must_have_one(tmp_path):
    (tmp_path / "x.py").write_text("x")
    for source in (tmp_path, tmp_path / "x.py", tmp_path / "missing.zip"):
        with raises("data.source.no_files", source, ".zip"):
            archive_repositories(source)
    files = ["p/a.py", "p/b.go", "p/tests/c.go", "p/vendor/d.go", "p/.hidden/e.go", "p/node_modules/f.go"]
    make_tar(tmp_path / "a.tar.gz", dict.fromkeys(files, "x"))
    assert read(tmp_path, languages=["go"]) == (["p/b.go"], {"test code": 1, "vendored code": 1})
