"""scripts/evaluate.py compare: files, resuming, exit codes, errors in one line."""

import csv
import json
import sys

import pytest

import kvjax
from kvjax.evaluate import compare as module


@pytest.fixture
def common(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The captain looked out over the sea, and said nothing.\n" * 20, encoding="utf-8")
    return {
        "--model": "tiny",
        "--quant": "int4",
        "--text": str(text),
        "--context": "64",
        "--out": str(tmp_path / "out"),
    }


def run(script, arguments, *flags):
    return script.main(["compare", *(part for pair in arguments.items() for part in pair), *flags])


def test_files_and_resuming(script, common, tmp_path, capsys, monkeypatch):
    more = common | {"--windows": "1", "--protocols": "all"}
    assert run(script, more, "--no-passkey") == 0
    out = tmp_path / "out"
    rows = json.loads((out / "compare.json").read_text())
    assert [row["quant"] for row in rows] == ["bf16", "int4"] and rows[0]["all_kl"] == 0.0 < rows[1]["all_kl"]
    assert [row["quant"] for row in csv.DictReader((out / "compare.csv").open())] == ["bf16", "int4"]
    report = (out / "compare.md").read_text()
    assert "protocol all: 1 window of 64 tokens of text.txt" in report
    assert "`python scripts/evaluate.py compare --model tiny" in report
    printed = capsys.readouterr()
    assert "2 results, 0 of them from an earlier run" in printed.out and "2 of 2 results to measure" in printed.err
    assert f"{rows[1]['all_kl']:.5f}" in printed.out and f"{rows[1]['all_kl']:.5f}" in report

    monkeypatch.setattr(module, "_measure", lambda *args: pytest.fail("measured again"))
    assert run(script, more, "--no-passkey") == 0
    assert "0 of 2 results to measure; 2 are finished" in capsys.readouterr().err
    assert json.loads((out / "compare.json").read_text()) == rows


def test_exit_codes(script, common, tmp_path, capsys, monkeypatch):
    def interrupt(task, policy, part, on_progress):
        if policy.name == "int3":
            raise KeyboardInterrupt
        return {"bits_per_element": 4.0, "cells": []}, ["path"]

    monkeypatch.setattr(module, "_measure", interrupt)
    passkey = common | {"--protocols": "", "--lengths": "96", "--depths": "2", "--trials": "1"}
    assert run(script, passkey | {"--quant": "int4,int3"}) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.jsonl").read_text().count("\n") == 2

    known = kvjax.policy

    def policy(name, *args, **kwargs):
        if name == "int2":
            raise ValueError("no such layers")
        return known(name, *args, **kwargs)

    monkeypatch.setattr(kvjax, "policy", policy)
    assert run(script, passkey | {"--quant": "int2,int4"}) == 1
    printed = capsys.readouterr().out
    assert "int2 failed: no such layers" in printed and "1 preset failed: int2" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--quant": "kvqant3"}, "nearest are kvquant3"),
        ({"--shape": "llama"}, "`shape=llama` must be"),
        ({"--tokens": "0"}, "tokens=0"),
        ({"--out": __file__}, "is a file"),
        ({"--out": "/proc/none"}, "cannot be written"),
        ({"--calibration-text": "/none.txt"}, "`quant=int4` needs no calibration"),
        (
            {"--quant": "int4,kvquant3", "--calibration-text": "/none.txt"},
            "`calibration-text=/none.txt` cannot be read",
        ),
        ({"--text": "/none.txt"}, "cannot be read"),
        ({"--haystack": "/none.txt"}, "`haystack='/none.txt'` cannot be read"),
        ({"--protocols": "all,half"}, "'half'"),
        ({"--context": "100000"}, "2048 positions"),
        ({"--windows": "0"}, "windows=0"),
        ({"--decode-windows": "1000"}, "windows=1000"),
        ({"--prefill": "64"}, "prefill=64"),
        ({"--lengths": "12"}, "too few"),
        ({"--lengths": "100000"}, "2048 positions"),
        ({"--lengths": "a"}, "invalid"),
        ({"--trials": "0"}, "trials=0"),
        ({"--batch": "0"}, "batch=0"),
    ],
)
def test_bad_input_ends_in_one_line_before_the_work(script, common, capsys, monkeypatch, change, message):
    monkeypatch.setattr(module, "_measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        run(script, common | change)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error


def test_without_matplotlib_all_else_is_written(script, common, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(module, "_measure", lambda *args: ({"bits_per_element": 4.0, "cells": []}, ["path"]))
    assert run(script, common | {"--protocols": "", "--lengths": "96", "--depths": "2", "--trials": "1"}) == 0
    assert "plots need matplotlib" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.jsonl", "compare.json", "compare.csv", "compare.md",
    }  # fmt: skip
