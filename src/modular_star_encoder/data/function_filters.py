"""CodeSearchNet's rules on functions, one test for each.

Source: Husain et al., "CodeSearchNet Challenge", 2019 (arXiv 1909.09436), section 2. It leaves out constructors and
"standard extension methods" such as `__str__` in Python and `toString` in Java; the names listed here are those of its
published parsers, and their like in the languages that it does not cover.
"""

from collections.abc import Callable

from modular_star_encoder.data.documented_function import DocumentedFunction

MIN_DESCRIPTION_WORDS = 3
MAX_DESCRIPTION_WORDS = 256
MIN_CODE_LINES = 3

_CONSTRUCTORS = {
    "python": {"__init__", "__new__", "__del__"},
    "javascript": {"constructor"},
    "php": {"__construct", "__destruct"},
    "ruby": {"initialize", "initialize_copy"},
}
_NAMED_LIKE_THEIR_CLASS = {"java", "cpp"}
_SPECIAL_METHODS = {
    "java": {"toString", "hashCode", "equals", "clone", "finalize", "notify", "notifyAll"},
    "go": {"String", "GoString", "Error", "init", "main"},
    "php": {
        *("__call", "__callStatic", "__get", "__set", "__isset", "__unset", "__sleep", "__wakeup", "__serialize"),
        *("__unserialize", "__toString", "__invoke", "__set_state", "__clone", "__debugInfo"),
    },
    "javascript": {"toString", "toLocaleString", "valueOf"},
    "ruby": {"to_s", "to_str", "to_text", "inspect", "display", "dup", "clone", "hash", "eql?", "equal?", "between?"},
    "c": {"main"},
    "cpp": {"main"},
}


def is_well_described(function: DocumentedFunction) -> bool:
    """Whether the description has 3 to 256 words."""
    words = sum(any(map(str.isalnum, word)) for word in function.description.split())
    return MIN_DESCRIPTION_WORDS <= words <= MAX_DESCRIPTION_WORDS


def is_described_in_ascii(function: DocumentedFunction) -> bool:
    """Whether more than half of the letters of the description are ASCII: a coarse test of "written in English"."""
    letters = [character for character in function.description if character.isalpha()]
    return 2 * sum(map(str.isascii, letters)) > len(letters)


def is_long_enough(function: DocumentedFunction) -> bool:
    """Whether the code, without its docstring, has at least 3 lines that are not blank."""
    return sum(bool(line.strip()) for line in function.code.splitlines()) >= MIN_CODE_LINES


def is_no_constructor(function: DocumentedFunction) -> bool:
    """Whether the function does not construct or destroy an object."""
    outer, _, name = function.name.rpartition(".")
    if name in _CONSTRUCTORS.get(function.language, ()):
        return False
    return function.language not in _NAMED_LIKE_THEIR_CLASS or name.lstrip("~") != outer.rpartition(".")[2]


def is_no_special_method(function: DocumentedFunction) -> bool:
    """Whether the name is none that the language itself gives a meaning: `__str__`, `toString`, `==`, `main`."""
    name = _own_name(function)
    if function.language == "python" and name.startswith("__") and name.endswith("__"):
        return False
    if function.language == "cpp" and name.startswith("operator") and not name[8:9].isidentifier():
        return False
    if function.language == "ruby" and not any(map(str.isalnum, name)):
        return False
    return name not in _SPECIAL_METHODS.get(function.language, ())


def is_no_test(function: DocumentedFunction) -> bool:
    """Whether the function's own name does not contain "test", in any case."""
    return "test" not in _own_name(function).lower()


def _own_name(function: DocumentedFunction) -> str:
    return function.name.rpartition(".")[2]


FILTERS: dict[str, Callable[[DocumentedFunction], bool]] = {
    "description not of 3 to 256 words": is_well_described,
    "description mostly not ASCII": is_described_in_ascii,
    "code of fewer than 3 lines": is_long_enough,
    "constructor": is_no_constructor,
    "special method": is_no_special_method,
    "name contains test": is_no_test,
}
"""In the order in which they are applied: what is dropped, and the test that keeps the rest."""
