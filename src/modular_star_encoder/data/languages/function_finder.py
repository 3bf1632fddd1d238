"""Find the functions of a source text in its syntax tree: their spans, names, descriptions and code."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from tree_sitter import Node, Tree

from modular_star_encoder.data.languages import parsing
from modular_star_encoder.data.languages.documentation import description_before, docstring_description, docstring_of
from modular_star_encoder.data.languages.parsing import Grammar, SourceText, UnparsableSourceError, load_grammar
from modular_star_encoder.data.languages.registry import Language

MAX_NESTING = 16  # deeper functions are left out: each level repeats the text of the functions inside it
MAX_DEFINITIONS = 20_000  # a file with more holds data, which an index divides into blocks of lines
_MAX_NAME_LENGTH, _MAX_NAME_BYTES = 200, 10_000  # of a name, and of its source, such as `get("stack").push`


@dataclass(frozen=True, slots=True)
class FoundFunction:
    """A function in a source text. The fields are those of `DocumentedFunction`."""

    line: int
    name: str
    description: str
    code: str
    source: str
    start_byte: int
    end_byte: int


def find_functions(
    text: str, language: str, *, documented_only: bool = False, counts: Counter[str] | None = None
) -> list[FoundFunction]:
    """Return the functions of `text` that have a body and no syntax error, in order, with methods and nested functions.

    If `documented_only`, return only functions with a description. `counts` counts files with a syntax error, and
    functions left out. UnparsableSourceError if `text` can't be parsed, or has a syntax error and no intact function.
    """
    grammar, source = load_grammar(language), SourceText(text)
    tree = parsing.parse(source.bytes, grammar)
    finder = _Finder(source, tree, grammar)
    found = list(finder.functions(documented_only))
    if tree.root_node.has_error:
        if not finder.sound:
            raise UnparsableSourceError("The text has no function without a syntax error.")
        finder.counts["files with a syntax error"] += 1
    if counts is not None:
        counts.update(finder.counts)
    return found


@dataclass(frozen=True, slots=True)
class Definition:
    """A function, class or other definition in a source text, and its lines."""

    kind: str  # `function`, `scope` (such as a class), `type`, or `extension` (adds to a type, as `impl` does in Rust)
    name: str
    start: int  # first line, counted from 0
    end: int  # line after the last
    line: int  # first line after decorators, annotations and attributes
    repeats: bool = False  # whether its statement defines another name first, as `B` in `type (A int; B int)`


_KINDS = ("function", "scope", "type", "extension")


def outline(text: str, language: str) -> list[Definition]:
    """Return functions, classes and other definitions, outer before inner; UnparsableSourceError if parsing fails."""
    grammar, source = load_grammar(language), SourceText(text)
    found: dict[tuple[int, int, str], Definition] = {}
    statements: dict[int, tuple[str, int]] = {}  # id of a node → name of its first definition, and `line`
    if len(matches := parsing.matches(grammar.definitions, parsing.parse(source.bytes, grammar))) > MAX_DEFINITIONS:
        raise UnparsableSourceError(f"The text has more than {MAX_DEFINITIONS:,} definitions.")
    for captures in matches:
        kind = next((kind for kind in _KINDS if kind in captures), None)
        if kind is None or not (name := _name(captures, source.bytes, grammar.language)):
            continue
        node = captures[kind][0]
        if node.parent is not None and node.parent.type in _WRAPPERS:
            node = node.parent
        first = node
        while (before := first.prev_sibling) is not None and before.type in _DECORATIONS_BEFORE:
            first = before
        span = (first.start_point.row, node.end_point.row + (node.end_point.column > 0))
        if node.id not in statements:  # one statement may define thousands of names
            statements[node.id] = name, _line(node)
        known, (first_name, line) = found.get((*span, name)), statements[node.id]
        if known is None or _KINDS.index(kind) < _KINDS.index(known.kind):
            found[*span, name] = Definition(kind, name, *span, line, name != first_name)
    return sorted(found.values(), key=lambda one: (one.start, -one.end))


def _line(node: Node) -> int:
    for child in node.children:
        for part in child.children if child.type == "modifiers" else [child]:
            if not _DECORATION.search(part.type):
                return part.start_point.row
    return node.start_point.row


_DECORATION = re.compile("decorator|annotation|attribute|comment")
_DECORATIONS_BEFORE = {"attribute_item", "unary_operator"}  # attributes of Rust, `@doc` of Elixir
_WRAPPERS = {"decorated_definition", "export_statement", "template_declaration"}


@dataclass(slots=True)
class _Definition:
    """A function, or a scope such as a class, in the syntax tree."""

    node: Node
    name: str
    is_function: bool
    body: Node | None


class _Finder:
    def __init__(self, source: SourceText, tree: Tree, grammar: Grammar) -> None:
        self.counts: Counter[str] = Counter()
        self.sound = 0
        self._source, self._language = source, grammar.language
        self._untyped: set[int] = set()
        self._comments: list[tuple[int, int]] = []
        scopes: list[_Definition] = []
        functions: dict[int, _Definition] = {}
        strings: list[Node] = []
        for captures in parsing.matches(grammar.query, tree):
            if "comment" in captures:
                self._comments += [node.byte_range for node in captures["comment"]]
            elif "verbatim" in captures:
                strings += captures["verbatim"]
            elif "untyped" in captures:
                self._untyped.add(captures["untyped"][0].id)
            elif {"type", "extension"}.isdisjoint(captures) and (name := _name(captures, source.bytes, self._language)):
                body = captures["body"][0] if "body" in captures else None
                if "scope" not in captures:
                    node = captures["function"][0]
                    key = (body or node).id  # several patterns may find one body: the widest function is kept
                    before = functions[key].node if key in functions else None
                    if before is None or len(range(*before.byte_range)) < len(range(*node.byte_range)):
                        functions[key] = _Definition(node, name, True, body)
                elif name != "exports":  # `module.exports = {…}` gives no name to what is inside
                    scopes.append(_Definition(captures["scope"][0], name, False, body))
        found = [*scopes, *functions.values()]
        self._definitions = sorted(found, key=lambda one: (one.node.start_byte, -one.node.end_byte))
        self._comments.sort()
        self._heredocs = {node.start_byte: node.end_byte for node in strings if node.type == "heredoc_body"}
        # The starts of the lines whose white space is part of a string; strings inside a string add none.
        self._fixed_lines, at = set[int](), 0
        spans = (node.byte_range for node in strings if node.start_point.row < node.end_point.row)
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            self._fixed_lines.update(source.line_starts_between(max(start, at), end))
            at = max(at, end)

    def functions(self, documented_only: bool) -> Iterator[FoundFunction]:
        enclosing: list[_Definition] = []
        for index, one in enumerate(self._definitions):
            while enclosing and enclosing[-1].node.end_byte <= one.node.start_byte:
                enclosing.pop()
            untyped = one.body is not None and one.body.id in self._untyped
            if untyped and not (enclosing and enclosing[-1].name == one.name):
                continue  # looks like a C++ constructor, but is outside of the class with its name, so it is a macro
            if one.is_function and one.node.has_error:
                self.counts["functions with a syntax error"] += 1
            elif one.is_function and len(enclosing) >= MAX_NESTING:
                self.counts["functions nested too deeply"] += 1
            elif one.is_function:
                self.sound += 1
                name = ".".join([*(outer.name for outer in enclosing), one.name])
                if found := self._found(index, name, documented_only):
                    yield found
            enclosing.append(one)

    def _found(self, index: int, name: str, documented_only: bool) -> FoundFunction | None:
        node, body = self._definitions[index].node, self._definitions[index].body
        start, end = node.start_byte, node.end_byte
        if self._language.has_docstrings and body is not None:
            docstring = _docstring(body, self._source)
            if docstring and len(_statements(body)) == 1:
                return None
            description = docstring_description(docstring[1]) if docstring else ""
            last_token = node  # comments may follow it inside `node`
            while children := [child for child in last_token.children if not child.is_extra]:
                last_token = children[-1]
            end = last_token.end_byte
        else:
            description = description_before(start, self._comments, self._source, self._language)
            end = self._end_of_heredocs(end)
        if documented_only and not description:
            return None
        # Remove the first line's indentation from the other lines.
        before = _INDENT.match(self._source.bytes, self._source.line_start(start), start)
        indent = before[0].rpartition(b"\f")[2] if before else b""
        lines = [at for at in self._source.line_starts_between(start, end) if at not in self._fixed_lines]
        cuts = [(at, at + len(indent), b"") for at in lines if indent and self._source.bytes.startswith(indent, at)]
        if self._language.has_docstrings:
            following = map(self._definitions.__getitem__, range(index, len(self._definitions)))
            inside = takewhile(lambda one: one.node.start_byte < end, following)
            cuts += [cut for one in inside if one.body and (cut := _docstring_cut(one.body, self._source))]
        code = _cut_out(self._source.bytes, start, end, cuts)
        first, last, text = self._source.original_span(start, end)
        return FoundFunction(self._source.line(start), name, description, code, text, first, last)

    def _end_of_heredocs(self, end: int) -> int:
        """Return the offset after the heredocs that begin on a Ruby method's last line, or `end`."""
        line_end = self._source.bytes.find(b"\n", end)
        while line_end in self._heredocs and not self._source.bytes[end:line_end].strip():
            end = line_end = self._heredocs[line_end]
        return end


_C_NAMES = {"identifier", "field_identifier", "type_identifier", "destructor_name", "operator_name"}


def _name(captures: dict[str, list[Node]], source: bytes, language: Language) -> str | None:
    """Return the dotted name of the definition in the `captures` of a query; None if they hold no definition."""
    if "keyword" in captures and _text(captures["keyword"][0], source) not in language.definers:
        return None
    if "declarator" in captures:
        name = _declared_name(captures["declarator"][0], source, language)
    else:
        name = language.dotted_name(_text(captures["name"][0], source))
        if "receiver" in captures:  # `*Stack[T]`
            receiver = _text(captures["receiver"][0], source).lstrip("*( ").partition("[")[0].rstrip(") ")
            name = f"{receiver}.{name}"
    return name if name and len(name) <= _MAX_NAME_LENGTH else None


def _text(node: Node | None, source: bytes) -> str:
    """Return the source of a node with single spaces; "" if the node is None or too long to be a name."""
    if node is None or node.end_byte - node.start_byte > _MAX_NAME_BYTES:
        return ""
    return " ".join(source[node.start_byte : node.end_byte].decode(errors="replace").split())


def _declared_name(declarator: Node, source: bytes, language: Language) -> str | None:
    """Return the dotted name of the function that a C or C++ declarator declares; None if it declares no function."""
    node: Node | None = declarator
    is_function = False
    while node is not None and node.type not in _C_NAMES:
        if node.type == "operator_cast":
            return _text(node, source).partition("(")[0].rstrip()
        if node.type == "template_function":
            node = node.child_by_field_name("name")
        elif node.type == "qualified_identifier":
            name = _qualified_name(node, source)
            return name if is_function or "operator" in name else None
        else:
            is_function = is_function or node.type == "function_declarator"
            # Inside parentheses or after `&`, the declarator has no field name.
            inner = (one for one in node.named_children if one.type.endswith("declarator") or one.type in _C_NAMES)
            node = node.child_by_field_name("declarator") or next(inner, None)
    name = _text(node, source)
    return name if is_function and name not in language.keywords else None


def _qualified_name(node: Node | None, source: bytes) -> str:
    """Return a C++ name with dots: `"Stack.push"` for `Stack<T>::push`."""
    parts = []
    while node is not None and node.type == "qualified_identifier":
        if scope := node.child_by_field_name("scope"):
            parts.append(_text(scope, source).partition("<")[0])
        node = node.child_by_field_name("name")
    if node is not None and node.type == "template_function":
        node = node.child_by_field_name("name")
    return ".".join([*parts, _text(node, source).partition("(")[0].rstrip()])


Cut = tuple[int, int, bytes]  # first byte, byte after the last, replacement
_STRINGS = {"string", "concatenated_string", "parenthesized_expression"}
# Matches what may follow a docstring on its last line, and the blank lines after that line.
_REST_OF_DOCSTRING_LINE = re.compile(rb"[ \t\f]*;?[ \t\f]*(?:#[^\n]*)?(?:\n(?:[ \t\f]*\n)*|\Z)")
_INDENT = re.compile(rb"[ \t\f]*")


def _statements(body: Node) -> list[Node]:
    return [child for child in body.named_children if not child.is_extra]


def _docstring(body: Node, source: SourceText) -> tuple[Node, str] | None:
    """Return (statement node, text) of the docstring at the beginning of a Python definition's body, or None."""
    match _statements(body):
        case [Node(type="expression_statement", named_children=[literal]) as statement, *_] if literal.type in _STRINGS:
            value = docstring_of(source.bytes[literal.start_byte : literal.end_byte].decode())
            return None if value is None else (statement, value)
    return None


def _docstring_cut(body: Node, source: SourceText) -> Cut | None:
    if not (found := _docstring(body, source)):
        return None
    docstring, statements = found[0], _statements(body)
    if len(statements) == 1:
        return docstring.start_byte, docstring.end_byte, b"pass"
    if rest := _REST_OF_DOCSTRING_LINE.match(source.bytes, docstring.end_byte):
        return source.line_start(docstring.start_byte), rest.end(), b""
    return docstring.start_byte, statements[1].start_byte, b""  # `def f(): "docstring"; return 1`


def _cut_out(source: bytes, start: int, end: int, cuts: Iterable[Cut]) -> str:
    """Return the text from byte `start` to `end`, with the replacements `cuts`; of overlapping cuts, the first wins."""
    pieces, at = [], start
    for cut_start, cut_end, replacement in sorted(cuts, key=lambda cut: (cut[0], -cut[1])):
        if at <= cut_start < end:
            pieces += [source[at:cut_start], replacement]
            at = min(cut_end, end)
    pieces.append(source[at:end])
    return b"".join(pieces).decode().rstrip()
