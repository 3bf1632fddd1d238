"""Functions with documentation -> pairs, functions without -> code texts, README prose -> description texts; one shard per package.

usage: extract.py INDEX COUNT [FAMILY ...]   (resumable: a package with a shard or a .started mark is skipped)
"""
import gzip, json, os, re, subprocess, sys, tarfile, time, io, html
from collections import Counter
from pathlib import Path, PurePath
from tree_sitter import Language, Parser, Query, QueryCursor
from modular_star_encoder.data import function_finder, grammars
from modular_star_encoder.data.documentation import comment_description
from modular_star_encoder.data.documented_function import DocumentedFunction, code_key
from modular_star_encoder.data.function_filters import FILTERS
from modular_star_encoder.data.file_filters import FileFilters, is_closed, is_generated, is_test, is_vendored
from modular_star_encoder.data.archive_members import archive_members, ArchiveLimits
from modular_star_encoder.data.source_files import LANGUAGE_OF_SUFFIX, SourceFile
from modular_star_encoder.data.functions import extract_functions

HERE = Path(__file__).parent
RAW, OUT = HERE / "raw", HERE / "extracted"
grammars.MAX_PARSE_SECONDS = 3.0
MORE = {".ts": "typescript", ".mts": "typescript", ".rs": "rust", ".cs": "csharp", ".kt": "kotlin", ".scala": "scala", ".swift": "swift",
        ".lua": "lua", ".sh": "bash", ".bash": "bash", ".ex": "elixir", ".zig": "zig", ".hs": "haskell", ".tcc": "cpp", ".ipp": "cpp", ".inl": "cpp"}
SUFFIX = {**LANGUAGE_OF_SUFFIX, **MORE}
FAMILY_LANGUAGES = {"go": {"go"}, "ruby": {"ruby"}, "php": {"php"}, "lua": {"lua"}, "rust": {"rust"}}
MAX_PAIRS, MAX_CODE, MAX_SECONDS, MAX_BYTES = 7000, 1500, 60, 1_500_000
FILE_FILTERS = FileFilters(max_bytes=MAX_BYTES, max_line_length=800, max_average_line_length=110, min_alphabetic_share=0.25, generated=False)

# --- TypeScript goes through the project's finder with its JavaScript rules and another grammar
_load = function_finder.load_grammar
_TS = None
def _typescript():
    global _TS
    if _TS is None:
        import tree_sitter_typescript
        g = Language(tree_sitter_typescript.language_typescript())
        q = grammars._JAVASCRIPT.replace("field_definition property:", "public_field_definition name:") + "(abstract_class_declaration name: (_) @name) @scope\n"
        _TS = grammars.Grammar(Parser(g), Query(g, q), Query(g, "(ERROR) @error (MISSING) @missing"))
    return _TS
_as_typescript = False
def load(language): return _typescript() if _as_typescript and language == "javascript" else _load(language)
function_finder.load_grammar = load

# --- other languages: a query for functions, documentation read from the lines above
GENERIC = {
    "rust": ("tree_sitter_rust", "language", "(function_item name: (_) @name body: (_)) @function"),
    "csharp": ("tree_sitter_c_sharp", "language", "(method_declaration name: (_) @name body: (_)) @function"),
    "kotlin": ("tree_sitter_kotlin", "language", "(function_declaration name: (_) @name (function_body)) @function"),
    "scala": ("tree_sitter_scala", "language", "(function_definition name: (_) @name body: (_)) @function"),
    "swift": ("tree_sitter_swift", "language", "(function_declaration name: (simple_identifier) @name body: (_)) @function"),
    "lua": ("tree_sitter_lua", "language", "(function_declaration name: (_) @name body: (_)) @function (assignment_statement (variable_list . name: (_) @name) (expression_list . value: (function_definition))) @function"),
    "bash": ("tree_sitter_bash", "language", "(function_definition name: (_) @name) @function"),
    "zig": ("tree_sitter_zig", "language", "(function_declaration name: (_) @name body: (_)) @function"),
    "elixir": ("tree_sitter_elixir", "language", "(call target: (identifier) @_t (arguments [(call target: (identifier) @name) (identifier) @name (binary_operator left: (call target: (identifier) @name))]) (do_block) (#match? @_t \"^defp?$\")) @function"),
    "haskell": ("tree_sitter_haskell", "language", "(function name: (variable) @name) @function"),
}
LINE = {"rust": r"///", "csharp": r"///", "swift": r"///", "zig": r"///", "lua": r"--+", "bash": r"#+", "haskell": r"--", "kotlin": None, "scala": None}
ATTRIBUTE = re.compile(r"\s*(#\[.*\]|@\w.*|\[[\w.]+(\(.*\))?\](\s*\[.*\])?)\s*$")
_generic = {}
def generic_functions(text, language):
    if language not in _generic:
        module, entry, query = GENERIC[language]
        g = Language(getattr(__import__(module), entry)())
        _generic[language] = (Parser(g), Query(g, query))
    parser, query = _generic[language]
    source = text.replace("\r\n", "\n").encode()
    grammar = grammars.Grammar(parser, query, query)
    tree = grammars.parse(source, grammar)
    lines = source.decode().split("\n")
    spans = {}
    for _, captures in QueryCursor(query).matches(tree.root_node):
        node, name = captures["function"][0], captures["name"][0]
        if node.has_error: continue
        spans.setdefault(node.start_point.row, (node, source[name.start_byte:name.end_byte].decode(errors="replace")))
    last_name = None
    for row in sorted(spans):
        node, name = spans[row]
        end = node.end_point.row
        first = row
        if language == "haskell":
            if name == last_name: continue
            last_name = name
            while end + 1 < len(lines) and (m := re.match(r"(\w[\w']*)\b", lines[end + 1])) and m.group(1) == name: 
                end += 1
                while end + 1 < len(lines) and re.match(r"\s+\S", lines[end + 1]): end += 1
            while first > 0 and (lines[first - 1].startswith(name + " ::") or (lines[first - 1].startswith((" ", "\t")) and any(l.startswith(name + " ::") for l in lines[max(0, first - 8):first - 1]))): first -= 1
        at = first - 1
        while at >= 0 and (ATTRIBUTE.match(lines[at]) if language not in ("lua", "bash", "haskell") else False):
            at -= 1
        code_lines = lines[first:end + 1]
        indent = min((len(l) - len(l.lstrip()) for l in code_lines if l.strip()), default=0)
        yield row + 1, name, generic_doc(lines, at, language), "\n".join(l[indent:] for l in code_lines)
def generic_doc(lines, at, language):
    if language == "elixir":
        k = at
        while k >= 0 and at - k < 12 and lines[k].strip() and not lines[k].strip().endswith('"""') : k -= 1
        if k < 0 or lines[k].strip() != '"""': return ""
        body = []; k -= 1
        while k >= 0 and '"""' not in lines[k]: body.insert(0, lines[k]); k -= 1
        if k < 0 or "@doc" not in lines[k]: return ""
        return comment_description(["// " + l.strip() for l in body], "javascript")
    if at < 0: return ""
    run = []
    if lines[at].rstrip().endswith("*/") and language not in ("lua", "bash", "haskell"):
        k = at
        while k >= 0 and "/*" not in lines[k]: k -= 1
        if k < 0 or not lines[k].lstrip().startswith("/**"): return ""
        return comment_description(["\n".join(lines[k:at + 1]).strip()], "java")
    mark = LINE.get(language)
    if mark is None: return ""
    pattern = re.compile(r"\s*" + mark + r"(?P<t>.*)$")
    while at >= 0 and (m := pattern.match(lines[at])): run.insert(0, m["t"]); at -= 1
    if language == "bash" and run and run[0].startswith("!"): return ""
    if language == "haskell":
        if not run or not run[0].lstrip().startswith("|"): return ""
        run[0] = run[0].lstrip()[1:]
    if not run: return ""
    if language == "csharp":
        t = "\n".join(run); m = re.search(r"<summary>(.*?)</summary>", t, re.S)
        if not m: return ""
        t = re.sub(r'<(?:see|paramref|typeparamref|c|seealso)\b[^<>]*?(?:cref|name|langword)="(?:\w:)?([^"]*)"[^<>]*/?>', r"\1", m[1])
        return " ".join(html.unescape(re.sub(r"<[^<>]+>", " ", t)).split())
    if language == "lua": run = [l.lstrip("- ") if set(l.strip()) != {"-"} else "" for l in run]
    return comment_description(["// " + l.strip() for l in run], "javascript")

# --- what a package is: licence and repository
BAN = set()
def load_bans():
    for f in Path(os.environ["MOSE_DATA"] + "/codesearchnet").glob("*.gz"):
        for l in gzip.open(f, "rt"): BAN.add(json.loads(l)["repository_name"].lower())
    for l in Path(os.environ["MOSE_DATA"], "semble/repos.tsv").read_text().splitlines()[1:]: BAN.add(l.split("\t")[2].removeprefix("github:").lower())
    BAN.update((HERE / "semble_more.txt").read_text().lower().split())
GITHUB = re.compile(r"github\.com[/:]([\w.-]+/[\w.-]+)")
def banned(text):
    return next((m for m in (x.lower().removesuffix(".git") for x in GITHUB.findall(text or "")) if m in BAN), None)
OK = re.compile(r"expat|\bmit\b|mit[-/ ]|\bx11\b|bsd|apache|isc\b|zlib|psf|python|lgpl|lesser|library general|mpl|mozilla|boost|\bbsl|unlicense|cc0|public[- ]domain|\bpd\b|wtfpl|php-|php license|postgres|ruby|artistic|classpath|cpe|epl|eclipse|edl|cddl|upl|ncsa|icu|unicode|0bsd|blueoak|hpnd|ofl|vim|ms-pl|openssl|curl|libpng|ftl|w3c|afl|zpl|cc-by-[34]\.0$|universal permissive", re.I)
GPL = re.compile(r"\b(a)?gpl|gnu (affero )?general public", re.I)
def permitted(licence):
    """A licence expression is fine if one alternative of every part is permissive or weak copyleft."""
    if not licence: return False
    for part in re.split(r"\band\b|&|(?<!\w),(?! or)", licence, flags=re.I):
        if part.strip() and not any(OK.search(alternative) and not (GPL.search(re.sub(r"lgpl\S*|lesser general public", "", alternative, flags=re.I)) and not re.search("classpath|cpe|exception", alternative, re.I)) for alternative in re.split(r"\bor\b|\||/(?=[A-Z])", part, flags=re.I)): return False
    return True
def deb_licence(text):
    m = re.search(r"^Files: *(?:\n? *)\*.*?^License: *(.+?)$", text, re.M | re.S | re.I)
    if m: return m.group(1).strip()
    m = re.search(r"^License: *(\S.*)$", text, re.M)
    if m and "format" in text[:300].lower(): return m.group(1).strip()
    for name, pattern in (("LGPL", r"GNU (LESSER|LIBRARY) GENERAL PUBLIC LICENSE\s+Version"), ("GPL", r"GNU General Public License|/GPL-"), ("Apache-2.0", r"Apache (Software )?License|licenses/Apache|licensed to the apache software"), ("LGPL", r"Lesser General Public|Library General Public"), ("BSD", r"Redistribution and use in source"), ("Expat", r"Permission is hereby granted, free of charge"), ("MPL", "Mozilla Public"), ("Expat", r"MIT[ -]licen[sc]e"), ("Ruby", "same (?:terms|licen[sc]e) as Ruby|Ruby['’]s licen"), ("PHP", r"PHP License"), ("ISC", r"Permission to use, copy, modify, and(?:/or)? distribute")):
        if re.search(pattern, text, re.I):
            if name == "GPL" and re.search("classpath", text, re.I): return "GPL-with-classpath-exception"
            return name
    return ""

class Tar:
    """Members of a tar stream as (name, size, read)."""
    def __init__(self, stream): self.tar = tarfile.open(fileobj=stream, mode="r|")
    def __iter__(self):
        for m in self.tar:
            if m.isfile(): yield m.name.removeprefix("./"), m.size, (lambda m=m: self.tar.extractfile(m).read())
def members(path):
    if path.suffix == ".deb":
        p = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try: yield from Tar(p.stdout)
        finally: p.stdout.close(); p.kill(); p.wait()
        return
    for m in archive_members(path, ArchiveLimits(max_bytes=1_500_000_000)):
        if m.kind == "file": yield m.name.removeprefix("./"), m.size, (lambda m=m: m.read(MAX_BYTES + 1))

JUNK_PATH = re.compile(r"(^|/)(debian|\.pc|umd|cjs|commonjs|dist-cjs|dist-es|dist-types|esm5|fesm5|fesm2015|_?es5|es2015|bundles?|locales?|i18n|lang|langs|min|minified|node_modules|vendor|third_party|3rdparty|testdata|tests?|specs?|__tests__|fixtures?|mocks?|autotest\w*|bench(marks?)?|data/unicode|examples?/data|Godeps)/|\.min\.|\.d\.[mc]?ts$|\.pb\.|_pb2|\.generated\.|zz_generated|generated[./]|parser\.tab|[-_.]bundle\.", re.I)
INNER_TAR = re.compile(r"\.(tar\.(xz|gz|bz2)|tgz)$")
def read_files(path, family, info):
    wanted = FAMILY_LANGUAGES.get(family)
    for name, size, read in members(path):
        base = name.rsplit("/", 1)[-1]
        if re.search(r"usr/share/doc/[^/]+/copyright$", name) and not info.get("licence"):
            text = read().decode(errors="replace"); info["licence"] = deb_licence(text)
            info["banned"] = info.get("banned") or banned(text[:3000] if family != "npm" else "")
            continue
        if base == "package.json" and name.count("/") == 1 and path.suffix == ".tgz":
            try: p = json.loads(read())
            except ValueError: continue
            l = p.get("license") or p.get("licenses") or ""
            if isinstance(l, list): l = " OR ".join(x.get("type", "") if isinstance(x, dict) else str(x) for x in l)
            if isinstance(l, dict): l = l.get("type", "")
            info["licence"] = str(l); info["banned"] = banned(json.dumps(p.get("repository", "")) + json.dumps(p.get("homepage", "")))
            continue
        if name.endswith(".dist-info/METADATA"):
            head = read().decode(errors="replace"); h, _, body = head.partition("\n\n")
            g = lambda k: (re.findall(rf"^{k}: *(.+)$", h, re.M) or [""])
            classifiers = [c.rsplit("::", 1)[-1].strip() for c in re.findall(r"^Classifier: (License ::.*)$", h, re.M) if c.count("::") > 1 or "OSI" not in c]
            info["licence"] = g("License-Expression")[0] or " OR ".join(classifiers) or g("License")[0][:80]
            if not permitted(info["licence"]) and g("License")[0] and permitted(g("License")[0][:60]): info["licence"] = g("License")[0][:60]
            urls = [u for u in g("Home-page") + [x for x in g("Project-URL") if re.search("home|source|repo|code|git", x, re.I)]]
            info["banned"] = banned(" ".join(urls))
            if body: yield "README", "readme", body
            continue
        if family == "source" and not info.get("licence") and re.match(r"(licen[sc]e|copying)([-.]\w+)*$", base, re.I) and name.count("/") <= 2 and size < 100_000:
            found = deb_licence(read().decode(errors="replace"))
            if found: info["licence"] = found; info["licence_from"] = name
            continue
        if re.match(r"readme(\.(md|rst|txt|rdoc|markdown))?(\.gz)?$", base, re.I) and size < 300_000 and name.count("/") <= 5 and "node_modules" not in name:
            content = read()
            if base.endswith(".gz"):
                try: content = gzip.decompress(content)
                except Exception: continue
            yield name, "readme", content.decode(errors="replace"); continue
        if name.startswith("usr/src/") and INNER_TAR.search(base) and path.suffix == ".deb":
            data = read()
            with tarfile.open(fileobj=io.BytesIO(data)) as inner:
                for m in inner:
                    if m.isfile() and m.size < MAX_BYTES:
                        r = checked(m.name, m.size, lambda m=m: inner.extractfile(m).read(), wanted)
                        if r: yield r
            continue
        if base == "src.zip" and path.suffix == ".deb":  # openjdk: java.base alone
            import zipfile
            with zipfile.ZipFile(io.BytesIO(read())) as inner:
                for m in inner.infolist():
                    if m.filename.startswith(("java.base/java/", "java.base/sun/", "java.net.http/", "java.logging/", "java.sql", "java.xml/")):
                        r = checked(m.filename, m.file_size, lambda m=m: inner.read(m), wanted)
                        if r: yield r
            info["licence"] = info.get("licence") or "GPL-2 with classpath exception"
            continue
        r = checked(name, size, read, wanted)
        if r: yield r
def checked(name, size, read, wanted):
    suffix = "." + name.rsplit(".", 1)[-1] if "." in name else ""
    language = SUFFIX.get(suffix)
    if not language or (wanted and language not in wanted) or size > MAX_BYTES or size < 80 or JUNK_PATH.search(name): return None
    pure = PurePath(re.sub(r"^(usr/(share|lib)/|.*?(dist|site)-packages/|package/)", "", name))
    if is_vendored(pure, language) or is_test(pure, language) or is_closed(PurePath(pure.name)) : return None
    text, reason = FILE_FILTERS.decode(read())
    return None if reason else (name, language, text)

JUNK = re.compile(r"^(todo|fixme|xxx|hack|note to self|deprecated\.?$|see |inherit|\(non-javadoc\)|@|eslint|global |jshint|copyright|creates? a new instance of|generated |autogenerated|nolint|do not edit|constructor\b|\W*$|this (method|function) is (called|invoked) when)|copyright \(c\)|auto-?generated", re.I)
CODE_LIKE = re.compile(r"[;{}]\s*$|\);|=>|^\W*(if|for|while|return|var|let|const|int|void|else|#include|#define)\b.*[({=]")
def good_description(d, language):
    if JUNK.search(d) or not d: return False
    if language in ("c", "cpp", "bash", "lua", "ruby", "go") and CODE_LIKE.search(d): return False
    letters = sum(c.isalpha() for c in d); ascii_ = sum(c.isascii() for c in d)
    return ascii_ >= 0.95 * len(d) and letters >= 0.55 * len(d)
def trimmed(d):
    if len(d) <= 400: return d
    return d[:400].rsplit(" ", 1)[0]
def alpha_ok(code): return sum(c.isalpha() for c in code) > 0.25 * len(code)
def readme_texts(text):
    text = re.sub(r"```.*?```|~~~.*?~~~|<!--.*?-->", "\n\n", text, flags=re.S)
    for paragraph in re.split(r"\n\s*\n", text):
        if re.match(r"\s*([#|>`=*+\-!\[<.]|    |\d+\.|::)", paragraph): continue
        t = re.sub(r"!?\[([^\]]*)\]\([^)]*\)|:\w+:`([^`<]*)[^`]*`|<[^<>]+>", lambda m: m[1] or m[2] or "", " ".join(paragraph.split()))
        if 40 <= len(t) <= 1500 and len(t.split()) >= 7 and sum(c.isalpha() or c == " " for c in t) > 0.85 * len(t) and t.isascii() and not re.search(r"licen[sc]e|copyright|npm install|pip install|badge|warrant", t, re.I): yield trimmed(t)

_DOC_HINT = {"javascript": "/**", "typescript": "/**", "java": "/**", "php": "/**", "go": "\n//", "ruby": "# ", "python": '"""'}
def functions_of(package, name, language, text, counts):
    global _as_typescript
    if language in GENERIC:
        try: found = list(generic_functions(text, language))
        except grammars.UnparsableSourceError: counts["files that do not parse"] += 1; return
        for line, fname, description, code in found:
            yield DocumentedFunction(package, name, line, language, fname, description, code)
        return
    _as_typescript = language == "typescript"
    try:
        file = SourceFile(package, name, "javascript" if language == "typescript" else language, text)
        out = extract_functions(file, counts, documented_only=False)
    finally: _as_typescript = False
    for f in out:
        if language == "typescript": f = DocumentedFunction(f.repository, f.path, f.line, language, f.name, f.description, f.code)
        yield f
def extract(family, package, path, hint=None):
    info = dict(hint or {}); counts = Counter(); rows = []; texts = []; seen = set(); readmes = []; votes = Counter(); seconds = time.process_time()
    for name, language, text in read_files(path, family, info):
        if info.get("banned"): break
        if info.get("licence") and not permitted(info["licence"]): break
        if language == "readme":
            for t in readme_texts(text):
                if len(readmes) < 60 and t not in readmes: readmes.append(t)
            continue
        if time.process_time() - seconds > MAX_SECONDS or len(rows) >= MAX_PAIRS: 
            if info.get("licence"): counts["stopped early"] += 1; break
            continue
        counts["files"] += 1
        if not info.get("licence"): votes[deb_licence(text[:3000])] += 1
        hint_ = _DOC_HINT.get(language)
        if hint_ and hint_ not in text and len(texts) >= MAX_CODE: continue
        try: found = list(functions_of(package, name, language, text, counts))
        except Exception as e: counts["failed " + type(e).__name__] += 1; continue
        for f in found:
            reason = next((r for r, keeps in FILTERS.items() if not keeps(f)), None)
            if reason and (f.description or reason != "description not of 3 to 256 words"): counts["dropped: " + reason] += 1
            key = hash(code_key(f.code)[:3000])
            if key in seen: counts["dropped: same code"] += 1; continue
            seen.add(key)
            if reason is None and good_description(f.description, language) and alpha_ok(f.code):
                rows.append({"package": package, "language": f.language, "name": f.name[-120:], "description": trimmed(f.description), "code": f.code[:1000]})
            elif f.code.count("\n") >= 2 and len(f.code) >= 60 and alpha_ok(f.code) and len(texts) < MAX_CODE and "test" not in f.name.lower():
                texts.append({"package": package, "language": f.language, "kind": "code", "text": f.code[:1000]})
    if not info.get("licence") and votes:
        (best, n), = votes.most_common(1)
        if best and n >= 0.5 * sum(votes.values()): info["licence"], info["licence_from"] = best, "headers of the files"
    info["permitted"] = permitted(info.get("licence", "")) and not info.get("banned")
    if not info["permitted"]: rows, texts, readmes = [], [], []
    main = Counter(r["language"] for r in rows + texts).most_common(1)
    texts += [{"package": package, "language": main[0][0] if main else family, "kind": "description", "text": t} for t in readmes]
    return info, counts, rows, texts
def packages(families):
    for kind in families:
        folder = RAW / kind
        for path in sorted(folder.iterdir()):
            if path.name.endswith((".deb", ".tgz", ".whl", ".tar.gz", ".tar.xz", ".tar.bz2")) and ".debian.tar" not in path.name: yield kind, path
def main():
    index, count, families = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or ["debian", "npm", "pypi", "source"]
    index %= count
    load_bans()
    family_of = {l.split("\t")[1]: l.split("\t")[0] for l in (HERE / "debian.tsv").read_text().splitlines()}
    work = list(packages(families))[index::count]
    if "debian" in families: work.sort(key=lambda x: hash(x[1].name) if False else __import__("zlib").crc32(x[1].name.encode()))
    if families == ["source"]:
        order = {l.split("\t")[0]: n for n, l in enumerate((HERE / "source.tsv").read_text().splitlines())}
        import os
        if os.environ.get('ORDER2'): order = {l.strip(): n for n, l in enumerate((HERE / 'source_order2.txt').read_text().splitlines())}
        work.sort(key=lambda x: order.get(x[1].name.split("_")[0], 9999))
    for kind, path in work:
        short = path.name.split("_")[0] if kind == "debian" else path.name
        target = OUT / kind / (path.name + ".jsonl.gz"); target.parent.mkdir(parents=True, exist_ok=True)
        mark = target.with_suffix(".started")
        if target.exists() or mark.exists(): continue
        if time.time() - path.stat().st_mtime < 3: continue
        mark.touch()
        family = family_of.get(short, "c" if kind == "debian" else kind) if kind == "debian" else kind
        name = {"debian": "deb:", "npm": "npm:", "pypi": "pypi:", "source": "src:"}[kind] + (short if kind in ("debian",) else re.sub(r"-\d[\w.+~]*?(?:-(?:py|cp).*)?\.(tgz|whl)$", "", path.name) if kind in ("npm", "pypi") else path.name.split("_")[0])
        hint = {}
        if kind == "source":
            hint = source_hint(path)
        try: info, counts, rows, texts = extract(family, name, path, hint)
        except Exception as e: info, counts, rows, texts = {"error": repr(e)[:200]}, Counter(), [], []
        tmp = target.with_suffix(".tmp")
        with gzip.open(tmp, "wt", compresslevel=4) as f:
            f.write(json.dumps({"package": name, "file": path.name, "kind": kind, "family": family, **info, "counts": counts, "pairs": len(rows), "texts": len(texts)}) + "\n")
            for r in rows: f.write(json.dumps({"p": r}) + "\n")
            for r in texts: f.write(json.dumps({"t": r}) + "\n")
        tmp.rename(target); mark.unlink()
def source_hint(path):
    stem = path.name.split("_")[0]; text = ""
    for d in path.parent.glob(stem + "_*.debian.tar.*"):
        with tarfile.open(d) as t:
            for m in t:
                if m.name == "debian/copyright": text = t.extractfile(m).read().decode(errors="replace")
    return {"licence": deb_licence(text), "banned": banned(text[:1500])} if text else {}
if __name__ == "__main__": main()
