import re

import pytest

from modular_star_encoder.cli.main import main


@pytest.mark.parametrize(("command", "last"), [("grow", "OUT"), ("dataset corpus check", "FILE")])
def test_the_usage_line_has_an_option_with_several_values_after_all_arguments(capsys, command, last):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert re.search(rf" {last}.* --[\w-]+ [A-Z]+ \[[A-Z]+ \.\.\.\]", usage)
