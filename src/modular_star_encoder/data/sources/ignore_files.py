"""Finds the files that git ignores, without running git, because a repository's settings can make git run programs."""

import os
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path

from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import user_path

_IGNORE_FILES = (".gitignore", ".moseignore")
MOST_LINES = 10_000  # of an ignore file; a set such as `[a-z]` counts as a line
MOST_WORK = 6_000_000  # for all patterns: for each 50, the length of its regular expression, and 100 for each set
MAX_INDEX_BYTES = 256_000_000  # of a git index, and of the paths of its files and of their folders
_MAX_BYTES = 250_000  # of any other file
_LONGEST_PATH = 4096


class IgnoreFiles:
    """Decides which paths below a folder to ignore, by git's rules and by `.moseignore` files in git's syntax.

    The ignore files above `root` apply too, up to the top of the repository. A file that git tracks is ignored only if
    a `.moseignore` says so. Call `ignores` for a folder before you call it for the content of the folder.
    """

    def __init__(self, root: Path) -> None:
        above = [root, *root.parents]
        top = next((place for place, folder in enumerate(above) if (folder / ".git").exists()), 0)
        self._known: dict[str, _Folder] = {}
        self._work = 0
        folder = _Folder((), _Repository(above[top]))
        for path in reversed(above[: top + 1]):
            folder = self._known[str(path)] = self._enter(folder, str(path))

    def _enter(self, folder: "_Folder", path: str) -> "_Folder":
        inner = folder.inner(path)
        known = len(folder.rules) if inner.repository is folder.repository else len(_user_rules())
        added = (rule.expression.pattern for rule in inner.rules[known:])
        self._work += sum(50 + len(pattern) + 100 * pattern.count(b"[") for pattern in added)
        if self._work > MOST_WORK:
            message = "The ignore files have too many or too long patterns: shorten them, for example those in"
            raise UserError("data.ignore.too_large", f"{message} {path}.")
        return inner

    def ignores(self, path: str, *, is_folder: bool) -> bool:
        """Return whether a path is ignored: of all patterns that match, the last in the deepest ignore file decides."""
        parent = os.path.dirname(path)
        if (folder := self._known.get(parent)) is None:
            folder = self._known[parent] = self._enter(self._known[os.path.dirname(parent)], parent)
        name = os.fsencode(path)
        rule = folder.inherited or next((one for one in reversed(folder.rules) if one.fits(name, is_folder)), None)
        if rule is None or rule.is_negative:
            return False
        if rule.is_ours or name not in folder.repository.tracked:
            return True
        if is_folder:  # read the folder, but in it only the files that git tracks
            self._known[path] = self._enter(_Folder(folder.rules, folder.repository, rule), path)
        return False


@dataclass(frozen=True, slots=True)
class _Rule:
    base: bytes  # folder of the ignore file, with a slash at the end; patterns match paths below it
    expression: re.Pattern[bytes]
    by_name: bool  # whether it matches the last part of a path, at any depth
    folders_only: bool
    is_negative: bool  # whether it begins with `!`: paths that match are not ignored
    is_ours: bool  # whether it is from a `.moseignore`

    def fits(self, path: bytes, is_folder: bool) -> bool:
        text = os.path.basename(path) if self.by_name else path.removeprefix(self.base)
        return (is_folder or not self.folders_only) and self.expression.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class _Folder:
    """The ignore rules that apply to the files and folders directly in one folder."""

    rules: tuple[_Rule, ...]  # the last one that fits decides
    repository: "_Repository"
    inherited: _Rule | None = None  # the rule that ignores this folder, of which only files that git tracks are read

    def inner(self, path: str) -> "_Folder":
        """Return the rules for the content of the folder `path`, which is directly in this folder."""
        rules, repository, inherited = self.rules, self.repository, self.inherited
        if os.path.lexists(os.path.join(path, ".git")):
            repository, inherited = _Repository(Path(path)), None
            base = os.path.join(os.fsencode(path), b"")
            rules = (*(replace(rule, base=base) for rule in _user_rules()), *_rules(repository.exclude, path))
        for name in _IGNORE_FILES:
            file = os.path.join(path, name)
            rules += () if os.path.islink(file) else tuple(_rules(file, path))
        return _Folder(rules, repository, inherited)


class _Repository:
    """A git repository: its `info/exclude` file and the files that git tracks."""

    def __init__(self, top: Path) -> None:
        self._top, self._git, common = top, top / ".git", top / ".git"
        if link := os.fsdecode(_content(self._git)):  # a work tree or a submodule
            self._git = top / link.removeprefix("gitdir:").strip()
            common = self._git / os.fsdecode(_content(self._git / "commondir")).strip()
        self.exclude = os.fspath(common / "info" / "exclude")
        self._config = common / "config"

    @cached_property
    def tracked(self) -> set[bytes]:
        """The paths of the files that git tracks, and of the folders with such files; empty if the index is damaged."""
        found, top, left = set(), os.fsencode(self._top), MAX_INDEX_BYTES
        has_sha256 = re.search(rb"(?im)^[ \t]*+objectformat[ \t]*+=[ \t\"]*+sha256", _content(self._config))
        with suppress(ValueError, IndexError, struct.error):
            for name in _index_names(_content(self._git / "index", MAX_INDEX_BYTES), 32 if has_sha256 else 20):
                if len(name) > _LONGEST_PATH:  # version 4 can double its length with every entry
                    return set()
                while name and (path := os.path.join(top, name)) not in found:
                    found.add(path)
                    name = os.path.dirname(name)
                    if (left := left - len(path)) < 0:
                        return set()
            return found
        return set()


_FLAGS = struct.Struct(">H")
_HAS_MORE_FLAGS = 0x4000


def _index_names(content: bytes, hash_bytes: int) -> Iterator[bytes]:
    """Yield the paths in the content of a git index file of version 2, 3 or 4 (gitformat-index)."""
    magic, version, count = struct.unpack_from(">4sII", content)
    if magic != b"DIRC" or version not in (2, 3, 4):
        return
    at, name, entry_bytes = 12, b"", 42 + hash_bytes
    for _ in range(count):
        (flags,) = _FLAGS.unpack_from(content, at + entry_bytes - 2)
        start = at + entry_bytes + (2 if flags & _HAS_MORE_FLAGS else 0)
        kept = 0
        if version == 4:  # a number of variable length: how many bytes to cut off the previous name
            cut, start = content[start] & 127, start + 1
            while content[start - 1] & 128:
                cut, start = (cut + 1 << 7) + (content[start] & 127), start + 1
            kept = len(name) - cut
        end = content.index(b"\0", start)
        name = name[:kept] + content[start:end]
        yield name
        at = end + 1 if version == 4 else at + (end - at + 8) // 8 * 8


def beginning(file: str | os.PathLike[str], size: int, *, links: bool = True) -> bytes | None:
    """Return the first `size` bytes of a regular file; None if unreadable or, with `links=False`, behind a link."""

    def open_without_waiting(name: str, flags: int) -> int:
        flags |= 0 if links else getattr(os, "O_NOFOLLOW", 0)
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with suppress(OSError, ValueError), open(file, "rb", opener=open_without_waiting) as opened:
        status = os.fstat(opened.fileno())
        # A folder may be swapped for a link and back, so the opened file must also be the one at the path.
        is_in_place = os.path.realpath(file) == os.fspath(file) and os.path.samestat(status, os.lstat(file))
        if (links or is_in_place) and stat.S_ISREG(status.st_mode):
            return opened.read(size)
    return None


def _content(file: str | os.PathLike[str], most: int = _MAX_BYTES) -> bytes:
    content = beginning(file, most + 1) or b""
    return content if len(content) <= most else b""


def _user_rules() -> tuple[_Rule, ...]:
    """Return the rules of the user's own ignore file, for paths below any folder; read again only if it has changed."""
    file = os.fspath(user_path(os.environ.get("XDG_CONFIG_HOME") or "~/.config", "git", "ignore"))
    try:
        stamp = os.stat(file).st_mtime_ns
    except OSError:
        return ()
    return _rules_of(file, stamp)


@lru_cache(maxsize=1)
def _rules_of(file: str, stamp: int) -> tuple[_Rule, ...]:
    return tuple(_rules(file, ""))


def _rules(file: str, folder: str) -> list[_Rule]:
    """Return the rules of an ignore file for the paths below a folder; no rules if the file can't be read."""
    content = beginning(file, _MAX_BYTES + 1) or b""
    if len(content) > _MAX_BYTES or content.count(b"\n") + content.count(b"[") > MOST_LINES:
        message = f"{file} has over {MOST_LINES:,} lines and sets ([…]), or over {_MAX_BYTES:,} bytes: shorten it."
        raise UserError("data.ignore.too_large", message)
    rules = []
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        line = line.removesuffix(b"\r")
        glob = line.rstrip(b" ")
        if (len(glob) - len(glob.rstrip(b"\\"))) % 2:  # the last backslash escapes the space after it
            glob = line[: len(glob) + 1]
        if not glob or glob.startswith(b"#"):
            continue
        is_negative = glob.startswith(b"!")
        glob = glob[is_negative:]
        folders_only = glob.endswith(b"/")
        glob = glob[: len(glob) - folders_only]
        by_name = b"/" not in glob
        with suppress(re.error):  # git never matches it
            expression = re.compile(glob_expression(glob.removeprefix(b"/")), re.DOTALL)
            base = os.path.join(os.fsencode(folder), b"")
            rules.append(_Rule(base, expression, by_name, folders_only, is_negative, file.endswith(".moseignore")))
    return rules


_GLOB = re.compile(
    rb"(?P<folders>(?:^|(?<=/))\*\*+/)|(?P<all>(?:^|(?<=/))\*\*+(?=$|\\/))|(?P<some>\*+)|(?P<one>\?)|(?P<set>\[)"
    rb"|\\(?P<escaped>.)|(?P<plain>[^\\])",
    re.DOTALL,
)
_LITERAL = re.compile(rb"[^*?\[\\]*")
_SIMPLE = {"folders": b"(?:.*/)?", "all": b".*", "some": b"[^/]*", "one": b"[^/]"}
# Like `_SIMPLE`, for a wildcard that another one of its kind follows. What is between the two is matched only at its
# first place: the second wildcard reaches every later place, and trying them all would take exponential time.
_FIRST_MATCH = {"folders": b"(?>(?:.*?/)??", "all": b"(?>.*?", "some": b"(?>[^/]*?"}


def glob_expression(glob: bytes) -> bytes:
    """Return a regular expression that matches the paths of git's pattern `glob`; re.error if no path can match."""
    start = _LITERAL.findall(glob)[0]  # git compares this literal text first: `a**/b` is `a` and then `**/b`
    glob, parts, at = glob[len(start) :], [re.escape(start)], 0
    # Index in `parts` and kind of the previous wildcard that stays in a folder, and of the previous one that does not.
    star: tuple[int, str] | None = None
    wide: tuple[int, str] | None = None
    while at < len(glob):
        if (match := _GLOB.match(glob, at)) is None:
            raise re.error("a backslash at the end")
        kind, at = str(match.lastgroup), match.end()
        before = star if kind == "some" else wide if kind in ("folders", "all") else None
        if before is not None:
            parts[before[0]] = _FIRST_MATCH[before[1]]
            parts.append(b")")
        if kind == "some":
            star = len(parts), kind
        elif kind in ("folders", "all"):
            star, wide = None, (len(parts), kind)
        if kind == "set":
            values, at = _set(glob, at)
            parts.append(b"[%s]" % _ranges(values) if values else b"(?!)")
        else:
            parts.append(_SIMPLE.get(kind) or re.escape(match[kind]))
    return b"".join(parts)


_CLASSES = {
    b"alnum": b"[0-9A-Za-z]",
    b"alpha": b"[A-Za-z]",
    b"blank": b"[ \t]",
    b"cntrl": rb"[\0-\x1f\x7f]",
    b"digit": b"[0-9]",
    b"graph": b"[!-~]",
    b"lower": b"[a-z]",
    b"print": b"[ -~]",
    b"punct": rb"[!-/:-@\[-`{-~]",
    b"space": rb"[ \t-\r]",
    b"upper": b"[A-Z]",
    b"xdigit": b"[0-9A-Fa-f]",
}


@cache  # a hostile file may name thousands of classes
def _members(name: bytes) -> frozenset[int]:
    return frozenset(value for value in range(256) if re.match(_CLASSES[name], bytes([value])))


_SET_ITEM = re.compile(rb"(?P<first>\\.|[^\\])(?:-(?P<last>\\.|[^\\\]]))?", re.DOTALL)


def _set(glob: bytes, at: int) -> tuple[list[int], int]:
    """Parse a set such as `[a-z]` at index `at`, after its `[`; return (matching byte values, index after its `]`)."""
    is_negative = glob[at : at + 1] in (b"!", b"^")
    at += is_negative
    first, chosen, end = at, set[int](), 0
    while at == first or glob[at : at + 1] != b"]":
        is_class = glob.startswith(b"[:", at)
        if is_class and end < at + 2 and (end := glob.find(b"]", at + 2)) < 0:  # thousands of `[:` share one search
            raise re.error("a set without an end")
        if is_class and end > at + 2 and glob[end - 1 : end] == b":":
            if (name := glob[at + 2 : end - 1]) not in _CLASSES:
                raise re.error("an unknown class")
            chosen |= _members(name)
            at = end + 1
        elif item := _SET_ITEM.match(glob, at):
            low, at = item["first"][-1], item.end()
            chosen |= {low, *range(low, (item["last"] or b"\0")[-1] + 1)}  # as in git, `[b-a]` matches `b`
        else:
            raise re.error("a set without an end")
    return [value for value in range(256) if (value in chosen) != is_negative and value != ord("/")], at + 1


def _ranges(values: list[int]) -> bytes:
    """Return ascending byte values as ranges, to be written inside the `[]` of a regular expression."""
    known = set(values)
    lows = [value for value in values if value - 1 not in known]
    highs = [value for value in values if value + 1 not in known]
    return b"".join(b"\\x%02x-\\x%02x" % ends for ends in zip(lows, highs, strict=True))
