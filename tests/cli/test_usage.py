import re

import pytest

from modular_star_encoder.cli.main import main


@pytest.mark.parametrize(("command", "last"), [("grow", "OUT"), ("dataset corpus check", "FILE")])
def test_the_usage_line_has_an_option_with_several_values_after_all_arguments(capsys, command, last):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert re.search(rf" {last}.* --[\w-]+ [A-Z]+ \[[A-Z]+ \.\.\.\]", usage)


@pytest.mark.parametrize(("token", "named"), [("", "needs a token"), ("“hf_abc”", "other than printable ASCII")])
def test_a_missing_or_misspelled_token_stops_an_upload_before_it_is_prepared(mose, monkeypatch, token, named):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("modular_star_encoder.utils.http.check_hub", lambda: None)
    status, _, errors = mose("publish", "mose-code", "--repository", "a/b", "--license", "mit", "--upload")
    assert (status, named in errors, "abc" in errors) == (2, True, False)
