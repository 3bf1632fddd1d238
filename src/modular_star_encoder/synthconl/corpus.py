"""Build a corpus of description–code pairs, like that of mose-code, from packages of Debian, npm and PyPI.

A repeated call continues an interrupted call. Only one process at a time can work in a folder. The same packages always
give the same corpus.
"""

import gzip
import hashlib
import json
import os
import re
import subprocess
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from tqdm.auto import tqdm

from modular_star_encoder.data.functions import description_key, drop_reason, extract_functions
from modular_star_encoder.data.languages.documentation import reads_as_prose
from modular_star_encoder.data.languages.registry import SEARCH_LANGUAGES
from modular_star_encoder.data.sources import STARCODER2_FILTERS, SourceFile
from modular_star_encoder.data.sources.dataset_rows import open_dataset_rows
from modular_star_encoder.data.sources.repositories import archive_repositories
from modular_star_encoder.data.splits import draw_repositories
from modular_star_encoder.evaluation.benchmarks.codesearchnet import read_functions
from modular_star_encoder.evaluation.benchmarks.rows import read_json, read_jsonl
from modular_star_encoder.synthconl.near_duplicates import DuplicateSettings, find_near_duplicates, fingerprint
from modular_star_encoder.utils.crash_safe import crash_safe_map
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import (
    files_below,
    fits,
    folder_lock,
    scratch_folder,
    staged_file,
    staged_folder,
    write_json,
)
from modular_star_encoder.utils.settings import check_names, read_mapping

# Each client writes to the folder in which it runs. `debian-source` needs a deb-src line among apt's sources.
_CLIENTS = {
    "debian": "apt-get download --quiet {name}={version}",
    "debian-source": "apt-get source --download-only --quiet {name}={version}",
    "npm": "npm pack --silent --ignore-scripts {name}@{version}",
    "pypi": "pip download --quiet --no-deps --only-binary=:all: {name}=={version}",
}
_FETCH_SECONDS = 600
# A client would take a name that begins with a dash for an option, and run the code of a folder that a name leads to.
_PACKAGE = re.compile(r"(?P<name>(@[\w.-]+/)?\w[\w.+-]*) (?P<version>\w[\w.+~:-]*) (?P<licence>\S.*)")
_MEMBER = re.compile(rb"(?P<name>[\w.-]+)[ /]+(?:\d+ +){4}(?P<size>\d{1,10}) *`\n")

MAX_CHARACTERS = {"code": 1000, "description": 400}  # longer texts are cut
MAX_PACKAGE_ROWS = 7000  # largest number of pairs from one package, and of texts without a pair
MAX_SAME_DESCRIPTION = 3  # largest number of pairs with the same description
NEAR_DUPLICATE = 0.8  # smallest Jaccard similarity of character 5-grams at which two functions are near-duplicates
VALIDATION_PAIRS = 8800  # number of pairs to hold out; a fifth of all pairs if that is less
NEAR_EVALUATION = 0.7  # smallest Jaccard similarity of token 5-grams at which a text is near an evaluation text
_TOKEN = {"code": re.compile(r"\w+|[^\w\s]"), "description": re.compile(r"\w+")}

Row = dict[str, Any]


class Package(NamedTuple):
    """One version of a package in a registry, with its licence."""

    registry: str
    name: str
    version: str
    licence: str

    @property
    def place(self) -> str:
        """REGISTRY/NAME=VERSION: relative path of the package's folder and, with `.jsonl.gz`, of its file of rows."""
        return f"{self.registry}/{quote(f'{self.name}={self.version}', safe='=+~')}"


def read_packages(path: str | os.PathLike[str]) -> list[Package]:
    """Read packages from a YAML file, {registry: lines}; each line has the form NAME VERSION LICENCE."""
    content = read_mapping(path)
    check_names(list(content), _CLIENTS, str(path))
    packages: dict[str, Package] = {}
    for registry, line in ((registry, line) for registry, lines in content.items() for line in str(lines).splitlines()):
        match = _PACKAGE.fullmatch(line)
        package = Package(registry, **match.groupdict()) if match else None
        if not package or package.place in packages:
            must = "not repeat the package of an earlier line" if package else "have the form NAME VERSION LICENCE"
            raise UserError("corpus.package", f"{path}: {line!r}, in the list of {registry}, must {must}.")
        packages[package.place] = package
    return [*packages.values()]


def fetch_packages(packages: Iterable[Package], out: str | os.PathLike[str]) -> dict[str, list[Package]]:
    """Download packages to folders in `out`; return {outcome: packages}.

    An outcome is "fetched", "fetched before" or a description of the fault.
    """
    outcomes: defaultdict[str, list[Package]] = defaultdict(list)
    # Without pipes, which a process that the client started may hold open after the client is killed.
    options: Row = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    options |= {"timeout": _FETCH_SECONDS, "check": True}
    with folder_lock(Path(out)):
        for package in tqdm(packages, desc="Fetching", unit=" packages"):
            target, outcome = Path(out) / package.place, "fetched before"
            command = [word.format(**package._asdict()) for word in _CLIENTS[package.registry].split()]
            try:
                if not target.is_dir():
                    with staged_folder(target, resumable=True) as folder:
                        subprocess.run(command, cwd=folder, **options)  # noqa: S603  `_PACKAGE` has checked the names
                    outcome = "fetched"
            except FileNotFoundError:
                outcome = f"{command[0]} is not installed"
            except subprocess.SubprocessError as error:
                outcome = f"{command[0]} ended with status {getattr(error, 'returncode', 'timeout')}"
            outcomes[outcome].append(package)
    return dict(outcomes)


def build_corpus(
    packages: Sequence[Package], source: str | os.PathLike[str], out: str | os.PathLike[str], processes: int = 2
) -> Row:
    """Extract a corpus from the packages that `fetch_packages` downloaded to `source`; return `stats.json` as a dict.

    `out` gets three files. `pairs.jsonl.gz` has rows with `package`, `language`, `name`, `description` and `code`.
    `pairs_valid.jsonl.gz` has rows of other packages with the same keys, for validation. `texts.jsonl.gz` has the
    functions without a usable description, with `package`, `language`, `kind` ("code") and `text`. A package that has a
    file in `out/packages` is not read again.
    """
    source, out = Path(source), Path(out)
    files = {one: out / "packages" / f"{one.place}.jsonl.gz" for one in packages if (source / one.place).is_dir()}
    if len(files) < 2:
        message = f"{source} has {len(files)} of {len(packages)} packages. Fetch two or more: some are for validation."
        raise UserError("corpus.packages", message)
    with folder_lock(out):
        _extract({one: file for one, file in files.items() if not file.exists()}, source, processes)
        missing = [":".join(one[:2]) for one in packages if one not in files]
        stats = {"packages": len(files), "packages_missing": missing} | _assemble(files, out)
        write_json(out / "stats.json", stats)
    return stats


def _extract(targets: Mapping[Package, Path], source: Path, processes: int) -> None:
    """Write the file of each package in `targets`: first a line of counts, then one line for each pair or text."""
    packages = list(targets)

    def items() -> Iterator[tuple[int, SourceFile | Counter[str]]]:
        for number, package in enumerate(packages):
            with scratch_folder("corpus") as temporary:
                try:
                    folder = _archives(source / package.place, temporary)
                    reader = archive_repositories(folder, languages=SEARCH_LANGUAGES, filters=STARCODER2_FILTERS)
                except UserError:
                    yield number, Counter({"packages without an archive": 1})
                    continue
                yield from ((number, file) for file in reader)
                yield number, Counter({f"files left out: {reason}": n for reason, n in reader.skipped.items()})

    crash = Counter({"files that crash the parser": 1})
    options: Row = {"processes": processes, "chunk_size": 16, "crashed": lambda item: [(item[0], crash, [])]}
    parts = crash_safe_map(_rows, items(), **options)
    for number, of_package in groupby(chain.from_iterable(parts), key=lambda part: part[0]):
        counts, rows = Counter[str](), []
        bar: Row = {"desc": f"Package {number + 1:,} of {len(packages):,}", "unit": " files", "leave": False}
        for _, its_counts, some in tqdm(of_package, **bar):
            counts += its_counts
            rows += [{"package": ":".join(packages[number][:2])} | row for row in some]
        _write_rows(targets[packages[number]], [{"counts": counts}, *rows])


def _archives(folder: Path, temporary: Path) -> Path:
    """Return `folder`; if it has a Debian package, copy this package's data to `temporary` and return `temporary`."""
    for deb in filter(Path.is_file, folder.glob("*.deb")):
        folder = temporary
        with deb.open("rb") as archive:
            archive.seek(8)  # skip `!<arch>`; then each member follows its name, four numbers and its size: deb(5)
            while match := _MEMBER.fullmatch(archive.read(60)):
                end = archive.tell() + int(match["size"])
                if match["name"].startswith(b"data.tar"):
                    with (folder / match["name"].decode()).open("wb") as copy:
                        while part := archive.read(min(2**20, end - archive.tell())):
                            copy.write(part)
                archive.seek(end + end % 2)
    return folder


def _rows(items: list[tuple[int, SourceFile | Counter[str]]]) -> list[tuple[int, Counter[str], list[Row]]]:
    """Return (package number, {name of a count: number}, rows) for each file; a row is a pair or a lone function."""
    parts = []
    for number, file in items:
        counts, rows = Counter[str](), list[Row]()
        for one in extract_functions(file, counts, documented_only=False) if isinstance(file, SourceFile) else ():
            reason = drop_reason(one) or ("" if reads_as_prose(one.description) else "description reads as code")
            code, description = one.code[: MAX_CHARACTERS["code"]], one.description[: MAX_CHARACTERS["description"]]
            row: Row = {"language": one.language}
            if not reason:
                rows.append(row | {"name": one.name, "description": description, "code": code})
            elif one.code.count("\n") > 1 and "test" not in one.name.lower():
                rows.append(row | {"kind": "code", "text": code})
            counts[f"documented functions without a pair: {reason}"] += bool(reason and one.description)
        parts.append((number, counts + (file if isinstance(file, Counter) else Counter(files=1)), rows))
    return parts


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n"


def _write_rows(target: Path, rows: Iterable[Row]) -> str:
    """Write rows as gzipped JSON lines; return the SHA-256 of the lines before compression."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with (
        staged_file(target, resumable=True) as temporary,
        temporary.open("wb") as file,
        gzip.GzipFile("", "wb", 6, file, mtime=0) as output,  # no name and time, so that equal rows give equal files
    ):
        for line in map(_line, rows):
            digest.update(line)
            output.write(line)
    return digest.hexdigest()


def _assemble(files: Mapping[Package, Path], out: Path) -> Row:
    """Join the packages' rows into a corpus in `out`, without equal rows or near-duplicate pairs; return statistics."""
    counts, dropped, licences = Counter[str](), Counter[str](), {":".join(one[:2]): one.licence for one in files}
    pairs: list[Row] = []
    texts: list[Row] = []

    def keep(rows: list[Row], rule: str, keeps: Callable[[Row], bool]) -> list[Row]:
        kept = [row for row in rows if keeps(row)]
        dropped[rule] += len(rows) - len(kept)
        return kept

    def repetition(seen: Counter[bytes], text: str) -> int:
        seen[key := _key(text)] += 1
        return seen[key]

    for package, path in tqdm(files.items(), desc="Reading rows", unit=" packages"):
        head, *lines = [row if isinstance(row, dict) else {} for _, row in open_dataset_rows([path], [])] or [{}]
        if not fits(head.get("counts"), dict[str, int]) or not all(_is_own(row, package) for row in lines):
            raise UserError("corpus.packages.file", f"Remove {path}: it has rows that this command did not write.")
        counts.update(head["counts"])
        for rows, column in ((pairs, "code"), (texts, "text")):
            some = [row for row in lines if column in row]
            rows += some[:MAX_PACKAGE_ROWS]
            dropped[f"{column}: its package has more"] += len(some[MAX_PACKAGE_ROWS:])
    codes, descriptions = Counter[bytes](), Counter[bytes]()
    pairs = keep(pairs, "code: equal to another", lambda row: repetition(codes, row["code"]) == 1)
    few = "code: description of other pairs"
    pairs = keep(pairs, few, lambda row: repetition(descriptions, row["description"]) <= MAX_SAME_DESCRIPTION)
    settings = DuplicateSettings(threshold=NEAR_DUPLICATE)
    prints = fingerprint((row["code"] for row in pairs), settings.banding)
    kept = iter(find_near_duplicates([[prints]], settings).kept.tolist())
    pairs = keep(pairs, "code: near another", lambda _: next(kept))
    sizes = Counter(row["package"] for row in pairs)
    share = min(0.2, VALIDATION_PAIRS / max(1, len(pairs))) / 10
    held_out = draw_repositories(sizes, seed=0, min_test=VALIDATION_PAIRS, max_repository_share=share)
    valid = [row for row in pairs if row["package"] in held_out]
    theirs = {_key(row["description"]) for row in valid}
    train = [row for row in pairs if row["package"] not in held_out]
    train = keep(train, "code: description of a held-out pair", lambda row: _key(row["description"]) not in theirs)
    texts = keep(texts, "text: of a held-out package", lambda row: row["package"] not in held_out)
    texts = keep(texts, "text: equal to another", lambda row: repetition(codes, row["text"]) == 1)
    parts = {"pairs": train, "pairs_valid": valid, "texts": texts}
    return {
        **{name: len(rows) for name, rows in parts.items()},
        "packages_held_out": sorted(held_out),
        "extraction": counts,
        "dropped": dropped,
        **{f"{name}_by_language": Counter(row["language"] for row in rows) for name, rows in parts.items()},
        "pairs_by_licence": Counter(licences[row["package"]] for row in pairs),
        "pairs_by_package": Counter(row["package"] for row in pairs),
        "sha256_of_lines": {name: _write_rows(out / f"{name}.jsonl.gz", rows) for name, rows in parts.items()},
    }


def _is_own(row: Row, package: Package) -> bool:
    """Return whether a row (a pair or a text) is from `package` and has a str in each column that belongs to it."""
    columns = ("text", "kind") if "text" in row else ("code", "description", "name")
    texts = all(isinstance(row.get(column), str) for column in ("language", *columns))
    return texts and row.get("package") == ":".join(package[:2])


def _key(text: str) -> bytes:
    """Return a hash of a text's letters, in lower case, and digits; texts with the same hash count as equal."""
    return hashlib.blake2b(description_key(text).encode(errors="replace"), digest_size=12).digest()


class EvaluationTexts:
    """Finds texts that are equal or nearly equal to a text of an evaluation set, or to the beginning of such a text.

    An evaluation set is a JSON Lines file (also `.gz`), a JSON file with a list of rows, or a folder of these two kinds
    of files. The set's texts are `code` (text, list or {language: text}), `description` and `query` of each row, and
    the paragraphs of `description` and `query`. Rows of JSON Lines may also have CodeSearchNet's format.
    """

    def __init__(self, sources: Iterable[str | os.PathLike[str]]) -> None:
        self.counts: Counter[str] = Counter()  # "SET KIND" → number of texts
        self._equal: dict[tuple[str, bytes], str] = {}  # {(kind, hash of a text): name of the set}
        self._grams: dict[str, dict[int, list[int]]] = {kind: defaultdict(list) for kind in _TOKEN}  # 5-gram → texts
        self._texts: list[tuple[str, int]] = []  # for each text number: (name of the set, number of 5-grams)
        for source in map(Path, sources):
            for path in files_below(source, "*.json*") if source.is_dir() else [source]:
                for kind, text in dict.fromkeys(_evaluation_texts(path)):
                    self._add(source.name.partition(".")[0], kind, text)
        if not self._texts:
            raise UserError("corpus.against", "Pass an evaluation set with texts in `code`, `description` or `query`.")

    def _add(self, name: str, kind: str, text: str) -> None:
        self.counts[f"{name} {kind}"] += 1
        for one in {text, text[: MAX_CHARACTERS[kind]]}:
            if description_key(one):
                self._equal.setdefault((kind, _key(one)), name)
            grams = _grams(one, kind)
            for gram in grams:
                self._grams[kind][gram].append(len(self._texts))
            self._texts.append((name, len(grams)))

    def find(self, kind: str, text: str) -> str | None:
        """Return "equal SET" or "near SET" if `text` matches a text of the evaluation set SET, else None.

        `kind` is code or description.
        """
        if name := self._equal.get((kind, _key(text))):
            return f"equal {name}"
        index, grams = self._grams[kind], _grams(text, kind)
        known = index.keys() & grams
        if len(known) < NEAR_EVALUATION * len(grams):
            return None
        common = Counter(chain.from_iterable(index[gram] for gram in known))
        near = {n: count / (len(grams) + self._texts[n][1] - count) for n, count in sorted(common.items())}
        best = max(near, key=near.__getitem__, default=0)
        return f"near {self._texts[best][0]}" if near.get(best, 0) >= NEAR_EVALUATION else None


def _grams(text: str, kind: str) -> set[int]:
    tokens = _TOKEN[kind].findall(text.lower())
    return set(map(hash, zip(*(tokens[start:] for start in range(5)), strict=False)))


def _evaluation_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the texts of an evaluation file: ("code", text) for code, ("description", text) for all other texts."""
    rows = read_json(path, list[dict[str, Any]]) if path.suffix == ".json" else read_jsonl(path, dict[str, Any])
    if rows and {"func_documentation_string", "docstring"} & rows[0].keys():
        rows = [one._asdict() for one in read_functions([path], rows[0].get("language", "")).values()]
    for row in rows:
        code = row.get("code")
        for one in code.values() if isinstance(code, dict) else code if isinstance(code, list) else [code]:
            yield from [("code", one)] if isinstance(one, str) else ()
        for text in (row[name] for name in ("description", "query") if isinstance(row.get(name), str)):
            paragraphs = (part for part in re.split(r"\n\s*\n", text) if len(part.split()) > 4)
            yield from (("description", one) for one in (text, *paragraphs))


def check_corpus(
    files: Iterable[str | os.PathLike[str]], texts: EvaluationTexts, drop: str | os.PathLike[str] | None = None
) -> tuple[Row, list[str]]:
    """Return a report on `files`, and a list with a line for each text in them that matches one of `texts`.

    If `drop` is given, copies of the files without the matching rows are written to this folder. The report's keys are
    the files' names or, if several files have the same name, their paths.
    """
    rule = f"equal letters and digits, or Jaccard similarity of token 5-grams >= {NEAR_EVALUATION}"
    report: Row = {"rule": rule, "evaluation_texts": texts.counts, "files": {}}
    hits: list[str] = []

    def others(path: Path, counts: Counter[str], digest: Any) -> Iterator[Row]:
        """Yield the rows that match no evaluation text; add all rows to `counts` and `digest`, matches to `hits`."""
        for place, row in tqdm(open_dataset_rows([path], []), desc=path.name, unit=" rows"):
            row = row if isinstance(row, dict) else {}
            kinds: list[Any] = [(one, row.get(one)) for one in _TOKEN]
            if "text" in row:
                kinds = [(row.get("kind"), row["text"])]
            if not all(kind in list(_TOKEN) and isinstance(text, str) for kind, text in kinds):
                raise UserError("corpus.row", f"{place} must have `code` and `description`, or `kind` and `text`.")
            found = [f"{kind} {hit}" for kind, text in kinds if (hit := texts.find(kind, text))]
            hits.extend(f"{place} ({row.get('package')}): {one}" for one in found)
            counts.update(found, rows=1, rows_found=bool(found))
            digest.update(_line(row))
            if not found:
                yield row

    paths = [*map(Path, files)]
    names = Counter(path.name for path in paths)
    copies = [Path(drop or "", f"{path.name.removesuffix('.gz')}.gz") for path in paths]
    if drop and (len({*copies}) < len(copies) or {*map(Path.resolve, copies)} & {*map(Path.resolve, paths)}):
        message = f"Copies in {drop} would replace one another or an original. Name another folder, or check one file"
        raise UserError("corpus.drop", f"{message} at a time.")
    with folder_lock(Path(drop)) if drop else nullcontext():
        for path, copy in zip(paths, copies, strict=True):
            counts, digest = Counter(rows=0, rows_found=0), hashlib.sha256()
            if drop:
                _write_rows(copy, others(path, counts, digest))
            else:
                deque(others(path, counts, digest), maxlen=0)
            name = path.name if names[path.name] == 1 else str(path)
            report["files"][name] = {**counts, "sha256_of_lines": digest.hexdigest()}
    return report, hits
