import contextlib
import json
import re
import runpy
import socket
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from modular_star_encoder.cli.main import main
from modular_star_encoder.demo import serving
from modular_star_encoder.demo.serving import LARGEST_REQUEST, served
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
    assert (shown.status_code, "&lt;script&gt;" in shown.text) == (200, True)
    policy = shown.headers["content-security-policy"]
    assert ("script-src" in policy, "default-src 'none'" in policy) == (False, True)
    for path in ("../index/.lock", "/etc/passwd", "gone.py"):
        assert httpx.get(f"{address}source", params={"path": path}).status_code == 404
    assert httpx.get(f"{address}source", params={"path": "stack.py", "first": "x"}).status_code == 404
    assert httpx.get(f"{address}gradio_api/file={index.folder}/stack.py").status_code in (403, 404)


def question_body(address, data, session):
    """The request that the page sends to ask a question."""
    dependencies = httpx.get(f"{address}config", timeout=300).json()["dependencies"]
    function = next(one["id"] for one in dependencies if len(one["inputs"]) == 6)
    return {"data": data, "fn_index": function, "session_hash": session}


def asked(address, data, session):
    """Ask a question as the page does; return the HTML of both sides, or the status and the reason if it is refused."""
    joined = httpx.post(f"{address}gradio_api/queue/join", json=question_body(address, data, session), timeout=300)
    if joined.status_code != 200:
        return joined.status_code, joined.text
    with httpx.stream(
        "GET", f"{address}gradio_api/queue/data", params={"session_hash": session}, timeout=300
    ) as events:
        for line in events.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {"msg": ""}
            if message["msg"] == "process_completed":
                return message["output"].get("data") or message["output"]


def resident_mb():
    return int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


def test_fifty_clients_are_answered_in_bounded_memory(address, index):
    big = Path(index.folder, "settings.py")
    before, was = resident_mb(), big.read_text()
    big.write_text("".join(f"OPTION_{number} = {number} * (a[{number}] + b({number}))\n" for number in range(30_000)))
    with ThreadPoolExecutor(50) as pool:
        pages = pool.map(lambda _: httpx.get(f"{address}source?path=settings.py&first=9000", timeout=300), range(15))
        answers = pool.map(lambda n: asked(address, ["push an item", [], "", 0, 0, 1], f"client{n}"), range(50))
        assert all("mose-hit" in html for sides in answers for html in sides)
        assert {(page.status_code, "OPTION_8999" in page.text, len(page.text) < 1_000_000) for page in pages} == {
            (200, True, True)
        }
    big.write_text(was)
    assert resident_mb() - before < 300  # with the clients, which are in this process


def test_questions_over_the_limit_are_refused_and_none_skips_the_queue(index, monkeypatch):
    monkeypatch.setattr("modular_star_encoder.demo.page.MOST_WAITING", 5)
    question = ["add", [], "", 0, 0, 1]
    with served(index) as address, ThreadPoolExecutor(12) as pool:
        with index._lock:  # no question is answered
            waiting = [pool.submit(asked, address, question, f"client{n}") for n in range(12)]
            while sum(one.done() for one in waiting) < 5:
                time.sleep(0.05)
        replies = [one.result() for one in waiting]
        refused = [reply for reply in replies if reply[0] == 503]
        assert (all("Queue is full" in text for _, text in refused), len(refused) >= 5) == (True, True)
        assert all("mose-hit" in html for reply in replies if reply[0] != 503 for html in reply)
        direct = httpx.post(f"{address}gradio_api/run/answer", json={"data": question})
        assert direct.status_code == 404


def test_answers_that_nobody_reads_do_not_pile_up(address, monkeypatch):
    monkeypatch.setattr(serving, "MOST_UNREAD", 10)
    body = question_body(address, ["add", [], "", 0, 0, 1], "silent")
    for _ in range(30):
        assert httpx.post(f"{address}gradio_api/queue/join", json=body).status_code == 200
        asked(address, ["add", [], "", 0, 0, 1], "reads")  # waits for the answer before
    read, url = [], f"{address}gradio_api/queue/data"
    events = httpx.stream("GET", url, params={"session_hash": "silent"}, timeout=2)
    with contextlib.suppress(httpx.ReadTimeout), events as lines:
        for line in lines.iter_lines():
            read += ["process_completed" in line]
    assert 0 < sum(read) <= 10


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_however_it_is_sent(address, chunked):
    body = b"x" * (LARGEST_REQUEST + 1)
    for path in ("queue/join", "run/answer", "upload", "component_server", "cancel"):
        sent = (body[start : start + 10_000] for start in range(0, len(body), 10_000)) if chunked else body
        answer = httpx.post(f"{address}gradio_api/{path}", content=sent, headers={"content-type": "application/json"})
        # Gradio turns every error of reading these two into 400.
        assert answer.status_code in ((400, 413) if path in ("upload", "component_server") else (413,)), path


def test_requests_that_write_files_are_refused(address):
    asked(address, ["add", [], "", 0, 0, 1], "writes")
    url = f"{address}gradio_api"
    for answer in (
        httpx.get(f"{url}/deep_link", params={"session_hash": "writes"}),
        httpx.post(f"{url}/upload", files={"files": ("a.txt", b"text")}),
        httpx.post(f"{url}/upload/", files={"files": ("a.txt", b"text")}, follow_redirects=True),
    ):
        assert answer.status_code == 400


def test_a_request_that_the_page_never_sends_prints_no_traceback(address, capfd):
    good = ["add", [], "", 0, 0, 1]
    for place in range(len(good)):
        for wrong in (None, 1e308, "x" * 5000, [[]], {"a": 1}, ["other"], True):
            asked(address, [*good[:place], wrong, *good[place + 1 :]], f"wrong{place}")
    asked(address, [], "empty")
    body = {"data": good, "fn_index": 0, "session_hash": "a"}
    odd = [body | {"session_hash": name} for name in ("\ud800", "a" * 101)] + [body | {"data": ["\ud800", *good[1:]]}]
    for wrong in (*odd, body | {"fn_index": 10**30}, {"data": good}, []):
        sent = {"content": json.dumps(wrong), "headers": {"content-type": "application/json"}}
        assert httpx.post(f"{address}gradio_api/queue/join", **sent).status_code in (400, 422)
        assert wrong not in odd or httpx.post(f"{address}gradio_api/call/answer", **sent).status_code == 400
    assert httpx.get(address, headers={"x-forwarded-host": "[::"}).status_code == 400
    with contextlib.suppress(httpx.RemoteProtocolError):  # the answer ends early
        httpx.get(f"{address}gradio_api/queue/data", params={"session_hash": "unknown"})
    assert "Traceback" not in "".join(capfd.readouterr())
    assert "mose-hit" in asked(address, good, "after")[0]


def test_a_port_that_is_taken_and_a_host_that_is_not_this_machine_are_one_sentence(index):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with raises("demo.port_taken", port), served(index, port=port):
            pass
    with raises("demo.port", 70_000), served(index, port=70_000):
        pass
    for host in ("::1", "192.0.2.1", "a" * 64):
        with raises("demo.host", host), served(index, host=host):
            pass


@pytest.fixture
def calls(monkeypatch):
    """(location of the index, options) of each call of `serve`."""
    made = []
    monkeypatch.setattr(serving, "serve", lambda index, **options: made.append((index.store.location, options)))
    return made


def test_mose_demo_serves_the_index_named_and_refuses_none(index, checkpoint, calls, tmp_path, capsys):
    location = index.store.location
    assert main(["demo", "--index", location, "--model", str(checkpoint), "--port", "7999"]) == 0
    assert calls == [(location, {"checkpoint": str(checkpoint), "host": "127.0.0.1", "port": 7999, "source": None})]
    assert main(["demo", "--index", str(tmp_path)]) == 2
    assert "mose index FOLDER" in capsys.readouterr().err


def test_without_gradio_the_error_names_the_extra(monkeypatch, index):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=re.escape("modular-star-encoder[demo]")), served(index):
        pass


def test_the_space_reads_what_to_serve_from_the_environment(index, checkpoint, calls, monkeypatch):
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
