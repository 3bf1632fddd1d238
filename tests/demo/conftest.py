import pytest

from tests.search.conftest import FILES, build, write_code

HOSTILE_NAME = "<img src=x onerror='window.attacked=1'>.py"
HOSTILE_CODE = """\
def render(page):
    script = "<script>window.attacked = 2</script>"
    image = "<img src=x onerror='window.attacked=3'>"
    template = "${window.attacked=4} {{window.attacked=5}}"
    return "</code></pre></article>" + script + image + template
"""


@pytest.fixture(scope="session")
def index(tmp_path_factory, checkpoint):
    """An index at exits 1 and 4, with a file whose name and code are HTML; no test changes it."""
    folder = tmp_path_factory.mktemp("demo")
    code = write_code(folder / "code", FILES | {HOSTILE_NAME: HOSTILE_CODE})
    return build(code, folder / "index", checkpoint, exit_layers=(1, 4))
