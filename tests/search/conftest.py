"""A small code folder, and an index of it."""

from dataclasses import asdict

import pytest

from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.local_store import LocalStore
from modular_star_encoder.search.pieces import Snippet

FILES = {
    "stack.py": '''\
class Stack:
    def push(self, item):
        """Put an item on top."""
        self.items.append(item)

    def pop(self):
        return self.items.pop()
''',
    "src/parseHeader.js": """// Splits a header into names and values.
function parseHeader(text) {
  return text.split(':')
}
""",
    "src/add.go": "package add\n\nfunc Add(a int, b int) int {\n\treturn a + b\n}\n",
    "settings.py": "".join(f"OPTION_{number} = {number}\n" for number in range(1, 101)),
}


def write_code(folder, files=FILES):
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def build(folder, location, checkpoint, **options):
    """In this process and without a bar."""
    return CodeIndex.build(folder, location, checkpoint=checkpoint, **{"processes": 1, "progress": False, **options})


def stored_rows(location):
    """All rows of an index in a folder as dictionaries."""
    rows = []
    for segment in LocalStore(location)._alive():
        for place in segment.alive.nonzero()[0]:
            snippet, scales = segment.snippet(place), {one: segment[f"scales_{one}"][place] for one in segment.exits}
            vectors = {f"vector_{one}": (segment[f"vectors_{one}"][place] * scales[one]).tolist() for one in scales}
            rows.append({"row_id": f"{snippet.path}:{snippet.first_line}", **asdict(snippet), **vectors})
    return rows


def embedded(row):
    """What is embedded of a row, without the prompt."""
    return Snippet(row["path"], "", row["name"], 1, 1, row["text"]).embedded()


@pytest.fixture
def code(tmp_path):
    return write_code(tmp_path / "code")


@pytest.fixture
def index(code, tmp_path, checkpoint):
    """An index of that folder, in this process without a bar."""
    return build(code, tmp_path / "index", checkpoint)


@pytest.fixture
def change_before(monkeypatch):
    """Let `change()` happen before the next call of a function, or before its next one with a file of this name."""

    def install(change, module, function, file=None):
        original = getattr(module, function)

        def changed_before(*arguments, **options):
            if file is None or arguments[0].name == file:
                monkeypatch.undo()
                change()
            return original(*arguments, **options)

        monkeypatch.setattr(module, function, changed_before)

    return install


@pytest.fixture(scope="session")
def shared_index(tmp_path_factory, checkpoint):
    """An index at exits 1 and 4 that no test changes."""
    folder = tmp_path_factory.mktemp("shared")
    return build(write_code(folder / "code"), folder / "index", checkpoint, exit_layers=(1, 4))
