import re
import runpy
import socket
import sys
import tomllib
from pathlib import Path

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from modular_star_encoder.cli.main import main
from modular_star_encoder.demo import serving
from modular_star_encoder.demo.serving import served
from tests.demo.conftest import HOSTILE_NAME
from tests.errors import raises

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def address(index):
    with served(index) as address:
        yield address


def test_the_page_is_bound_to_loopback_names_no_other_host_and_shares_nothing(address):
    assert address.startswith("http://127.0.0.1:")
    config = httpx.get(f"{address}config").json()
    assert config["analytics_enabled"] is config["run_history"] is False
    response = httpx.get(address, headers={"host": "localhost"})
    assert re.findall(r'(?:src|href)="(https?:)?//[^"]*"', response.text) == []
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert not re.search("@import|googleapis", httpx.get(f"{address}theme.css").text)
    assert httpx.get(address, headers={"host": "evil.example"}).status_code == 400


def test_files_of_the_index_are_served_and_others_are_not(address, index):
    shown = httpx.get(f"{address}source", params={"path": HOSTILE_NAME, "first": 1, "last": 2})
    assert shown.status_code == 200
    assert "&lt;script&gt;" in shown.text
    assert "script-src" not in shown.headers["content-security-policy"]
    assert "default-src 'none'" in shown.headers["content-security-policy"]
    for path in ("../index/.lock", "/etc/passwd", "gone.py"):
        assert httpx.get(f"{address}source", params={"path": path}).status_code == 404
    assert httpx.get(f"{address}source", params={"path": "stack.py", "first": "x"}).status_code == 404
    assert httpx.get(f"{address}gradio_api/file={index.folder}/stack.py").status_code in (403, 404)


def test_a_port_that_is_taken_is_one_sentence(index):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with raises("demo.port_taken", port), served(index, port=port):
            pass
    with raises("demo.port", 70_000), served(index, port=70_000):
        pass


@pytest.mark.parametrize("host", ["::1", "192.0.2.1", "a" * 64])
def test_a_host_that_is_not_this_machine_is_one_sentence(index, host):
    with raises("demo.host"), served(index, host=host):
        pass


def test_mose_demo_serves_the_index_named_and_refuses_none(index, checkpoint, monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(serving, "serve", lambda index, **options: calls.append((index.store.location, options)))
    location = index.store.location
    assert main(["demo", "--index", location, "--model", str(checkpoint), "--port", "7999"]) == 0
    assert calls == [(location, {"checkpoint": str(checkpoint), "host": "127.0.0.1", "port": 7999, "source": None})]
    assert main(["demo", "--index", str(tmp_path)]) == 2
    assert "mose index FOLDER" in capsys.readouterr().err


def test_without_gradio_the_error_names_the_extra(monkeypatch, index):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=re.escape("modular-star-encoder[demo]")), served(index):
        pass


def test_the_space_reads_what_to_serve_from_the_environment(index, checkpoint, monkeypatch):
    calls = []
    monkeypatch.setattr(serving, "serve", lambda index, **options: calls.append((index.store.location, options)))
    source = "https://github.com/o/n/blob/abc"
    for name, value in {"INDEX": index.store.location, "CHECKPOINT": str(checkpoint), "SOURCE": source}.items():
        monkeypatch.setenv(f"MOSE_{name}", value)
    runpy.run_path(str(ROOT / "examples/space/app.py"), run_name="__main__")
    assert calls == [(index.store.location, {"checkpoint": str(checkpoint), "host": None, "source": source})]


def test_the_space_asks_for_a_gradio_that_we_support():
    text = (ROOT / "examples/space/README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert (header["sdk"], header["app_file"]) == ("gradio", "app.py")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert Version(header["sdk_version"]) in Requirement(extras["demo"][0]).specifier
    wanted = Requirement((ROOT / "examples/space/requirements.txt").read_text().splitlines()[-1])
    assert wanted.name == "modular-star-encoder"
    assert wanted.extras <= set(extras)
