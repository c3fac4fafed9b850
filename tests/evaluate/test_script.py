"""scripts/evaluate.py: rows under the fixed keys, errors in one line."""

import json

import pytest


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The captain looked out over the sea, and said nothing.\n" * 20, encoding="utf-8")
    return str(path)


def test_perplexity(script, text, tmp_path, capsys):
    out = tmp_path / "rows.json"
    common = ["perplexity", "--model", "tiny", "--quant", "int4,f32,int4", "--text", text, "--json", str(out)]
    assert script.main([*common, "--context", "64", "--windows", "2"]) == 0
    rows = json.loads(out.read_text())
    assert [list(row) for row in rows] == [
        ["quant", "bits_per_element", "nll", "perplexity", "kl", "top1_agreement", "tokens", "seconds"]
    ] * 3
    assert [row["quant"] for row in rows] == ["bf16", "int4", "f32"]
    assert rows[0]["kl"] == 0 and rows[0]["top1_agreement"] == 1 and rows[0]["tokens"] == 126
    printed = capsys.readouterr().out
    assert "blank-line" in printed and "2 windows of 64 tokens" in printed and "jax" in printed
    assert "\u2026" not in printed  # no number is cut


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--quant", "kvqant3"], "nearest are kvquant3"),
        (["--quant", ","], "names no preset"),
        (["--model", "/none"], "is no directory"),
        (["--text", "/none.txt"], "cannot be read"),
        (["--calibration-text", "/none.txt"], "`calibration-text=/none.txt`: `quant=int4` needs no calibration"),
        (["--quant", "int4,kivi2", "--calibration-text", "/none.txt"], "`calibration-text=/none.txt` cannot be read"),
        (["--context", "100000"], "2048 positions"),
        (["--context", "1024"], "tokens, less than one window"),
        (["--windows", "0"], "windows=0"),
        (["--windows", "x"], "invalid int"),
        (["--batch", "-1"], "batch=-1"),
        (["--prefill", "9"], "prefill=9"),
        (["--protocol", "half"], "invalid choice"),
        (["--json", "/none/rows.json"], "`json=/none/rows.json`: its directory does not exist"),
    ],
)
def test_bad_input_ends_in_one_line(script, text, capsys, change, message):
    arguments = {"--model": "tiny", "--quant": "int4", "--text": text, "--context": "64"}
    arguments |= dict(zip(change[::2], change[1::2]))
    with pytest.raises(SystemExit) as stop:
        script.main(["perplexity", *(part for pair in arguments.items() for part in pair)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error


def test_other_commands_refuse_too(script, capsys):
    for arguments, message in (
        (["passkey", "--model", "tiny", "--quant", "int4", "--lengths", "12"], "too few"),
        (["passkey", "--model", "tiny", "--quant", "int4", "--lengths", "256,a"], "invalid"),
        (["ladder", "--model", "tiny", "--text", "/none"], "cannot be read"),
        (["ladder", "--model", "tiny", "--text", __file__, "--calibration-text", ""], "`calibration-text=` cannot be"),
        ([], "required"),
    ):
        with pytest.raises(SystemExit) as stop:
            script.main(arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
