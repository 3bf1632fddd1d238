"""The names of functions and of what encloses them, as the captures of the queries in `grammars` give them."""

import re

from tree_sitter import Node

_Captures = dict[str, list[Node]]

_CONTROL_FLOW = {"if", "else", "for", "while", "switch", "return", "do", "catch", "sizeof", "defined"}
_OBJECTS_WITHOUT_NAME = {"exports", "module", "prototype", "this"}
_MEMBERS = re.compile(r"[\w$#]+(?:\.[\w$#]+)*")
_C_NAMES = {"identifier", "field_identifier", "type_identifier", "destructor_name", "operator_name"}
_MAX_NAME_LENGTH = 200


def function_name(captures: _Captures, source: bytes, language: str) -> str | None:
    """Return the name of the function or scope of one match, dotted where the text is qualified.

    None stands for a match that is no function: a macro, or a statement that error recovery took for one.
    """
    if "declarator" in captures:
        name = _declared_name(captures["declarator"][0], source)
    else:
        name = _text(captures["name"][0], source)
        if language == "javascript":
            name = _member_name(name)
        elif language == "ruby":
            name = name.replace("::", ".")
        elif language == "cpp":
            name = name.partition("<")[0]
        elif "receiver" in captures:
            name = f"{_receiver(_text(captures['receiver'][0], source))}.{name}"
    return name if name and len(name) <= _MAX_NAME_LENGTH else None


def _text(node: Node, source: bytes) -> str:
    return " ".join(source[node.start_byte : node.end_byte].decode(errors="replace").split())


def _member_name(text: str) -> str:
    """Return `"Stack.push"` for `Stack.prototype.push`, `"push"` for `exports.push` and for `'push'`."""
    text = re.sub(r"\s*\.\s*", ".", text.strip("'\""))
    if "." not in text or text.startswith("["):
        return text
    if not _MEMBERS.fullmatch(text):  # `get("stack").push`
        return text.rpartition(".")[2]
    parts = text.split(".")
    return ".".join([part for part in parts if part not in _OBJECTS_WITHOUT_NAME] or parts[-1:])


def _receiver(text: str) -> str:
    """Return `"Stack"` for the receiver's type `*Stack[T]`."""
    return text.lstrip("*( ").partition("[")[0].rstrip(") ")


def _declared_name(declarator: Node, source: bytes) -> str | None:
    """Return the dotted name that a C or C++ declarator of a function declares, or None if it declares none."""
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
            node = node.child_by_field_name("declarator") or _inner_declarator(node)
    name = _text(node, source) if node is not None else ""
    return name if is_function and name not in _CONTROL_FLOW else None


def _inner_declarator(node: Node) -> Node | None:
    """Return the declarator inside parentheses or behind `&`, which these nodes hold without naming it."""
    return next(
        (child for child in node.named_children if child.type.endswith("declarator") or child.type in _C_NAMES), None
    )


def _qualified_name(node: Node | None, source: bytes) -> str:
    """Return `"Stack.push"` for `Stack<T>::push`."""
    parts = []
    while node is not None and node.type == "qualified_identifier":
        scope = node.child_by_field_name("scope")
        if scope is not None:
            parts.append(_text(scope, source).partition("<")[0])
        node = node.child_by_field_name("name")
    if node is not None and node.type == "template_function":
        node = node.child_by_field_name("name")
    return ".".join([*parts, _text(node, source).partition("(")[0].rstrip() if node is not None else ""])
