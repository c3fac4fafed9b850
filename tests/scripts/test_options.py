"""What all scripts have in common: options that are none end in one line."""

from pathlib import Path

import pytest

SCRIPTS = sorted(p.stem for p in (Path(__file__).parents[2] / "scripts").glob("[!_]*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unknown_option_is_one_line_and_exit_code_2(load_script, capsys, name):
    with pytest.raises(SystemExit) as stop:
        load_script(name).main(["--nosuch"])
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(errors) == 1 and errors[0].startswith("error: ") and errors[0].endswith(" --help")
