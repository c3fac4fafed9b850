"""scripts/allocate.py: its three commands on the model that ships, and errors in one line."""

import json

import pytest

from kvjax.policy import preset


@pytest.fixture
def main(load_script):
    load_script("evaluate")  # which it imports
    return load_script("allocate").main


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The captain looked out over the sea, and said nothing.\n" * 20, encoding="utf-8")
    return str(path)


def test_analyse(main, text, tmp_path, capsys):
    out, plot = tmp_path / "rows.json", tmp_path / "rows.png"
    arguments = ["analyse", "--model", "tiny", "--text", text, "--context", "64", "--windows", "1"]
    assert main([*arguments, "--keys", "kivi1", "--values", "int4", "--json", str(out), "--plot", str(plot)]) == 0
    content = json.loads(out.read_text())
    assert content["keys"] == "kivi1" and [row["layer"] for row in content["layers"]] == list(range(5))
    for row in content["layers"]:
        assert 0 < row["from_values"] < row["from_keys"] and row["theorem"] < 1e-10 < row["printed"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "1 windows of 64 tokens" in capsys.readouterr().out


def test_search_goes_on_where_it_stopped(main, text, tmp_path, capsys):
    out, plot = tmp_path / "points.json", tmp_path / "points.png"
    arguments = ["search", "--model", "tiny", "--text", text, "--context", "40", "--windows", "1", "--json", str(out)]
    assert main([*arguments, "--top", "1"]) == 0
    content = json.loads(out.read_text())
    assert len(content["points"]) == 36 and content["settings"]["high"] == 2
    printed = capsys.readouterr().out
    assert printed.count("asymkv-") == 11 and "2.100" in printed  # the best of each number of bits
    content["points"] = content["points"][:-1]
    out.write_text(json.dumps(content))
    assert main([*arguments, "--plot", str(plot)]) == 0
    assert "35 points were in" in capsys.readouterr().out and len(json.loads(out.read_text())["points"]) == 36
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main([*arguments, "--suffix", "twomean"])
    assert "is a search with other settings" in capsys.readouterr().err


def test_auto(main, text, tmp_path, capsys):
    toml, out, plot = (tmp_path / f"a.{kind}" for kind in ("toml", "json", "png"))
    arguments = ["auto", "--model", "tiny", "--quant", "asymkv-auto-2/1@2.3", "--text", text, "--rounds", "1"]
    arguments += ["--samples", "1", "--length", "40", "--out", str(toml), "--json", str(out), "--plot", str(plot)]
    assert main(arguments) == 0
    found = json.loads(out.read_text())
    assert found["bits_per_element"] == 2.3 and plot.read_bytes().startswith(b"\x89PNG")
    keys = [f"kivi{k.bits}" for k, _ in preset(str(toml)).codecs(5)]
    assert keys == found["keys"] and "2.3 of 2.3 true bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["auto", "--bits", "1"], "a budget of 1 true bits per element"),
        (["auto", "--bits", "2", "--quant", "asymkv-auto@2"], "either `--bits`"),
        (["auto", "--quant", "kivi2"], "no budget to spend"),
        (["auto", "--quant", ""], "`quant=` is not a preset"),
        (["auto", "--bits", "2", "--out", "/none/a.toml"], "`out=/none/a.toml`: its directory does not exist"),
        (["auto", "--bits", "2", "--text", "/none.txt"], "/none.txt"),
        (["auto", "--bits", "2", "--seed", "-1"], "argument --seed: '-1' is no seed"),
        (["search", "--text", "TEXT", "--low", "2", "--context", "64"], "must be fewer bits"),
        (["search", "--text", "TEXT", "--suffix", "g7x"], "is not a preset"),
        (["search", "--text", "TEXT", "--top", "0"], "top=0"),
        (["search", "--text", "TEXT", "--json", "TEXT", "--context", "64"], "is no search to continue"),
        (["analyse", "--text", "TEXT", "--keys", "kivy2"], "nearest are kivi"),
        (["analyse"], "--text"),
    ],
)
def test_bad_input_ends_in_one_line(main, text, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main([arguments[0], "--model", "tiny", *(text if part == "TEXT" else part for part in arguments[1:])])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error
