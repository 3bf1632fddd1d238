import json

import pytest

from modular_star_encoder.utils.files import check_writable, write_json


def test_what_was_written_is_read_back_and_nothing_else_is_left(tmp_path):
    write_json(tmp_path / "results.json", {"mrr": 0.5, "größe": [1, 2]})
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == {"mrr": 0.5, "größe": [1, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"mrr": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"mrr": float("nan")})

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"mrr": 0.6})
    assert json.loads(path.read_text()) == {"mrr": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_file_that_could_not_be_written_is_refused_beforehand(tmp_path):
    check_writable(tmp_path / "results.json")
    with pytest.raises(ValueError, match="there is no folder"):
        check_writable(tmp_path / "no" / "results.json")
    with pytest.raises(ValueError, match="is a folder"):
        check_writable(tmp_path)
