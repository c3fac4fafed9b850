"""scripts/plan.py: tables, JSON and plot; errors in one line."""

import argparse
import json
import sys

import pytest


@pytest.fixture
def script(load_script):
    return load_script("plan")


def test_a_plan_in_json(script, tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["--model", "LLaMA-7B", "--quant", "kvquant2-dense", "--tokens", "10M", "--devices", "v5p:8"]
    assert script.main([*arguments, "--mesh", "seq=8", "--json", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["tokens"] == 10_000_000 and content["chip"]["name"] == "v5p" and content["choice"] is None
    first, second = content["plans"]
    assert (first["quant"], second["quant"]) == ("kvquant2-dense", "bf16")
    assert first["fits"] and first["mesh"] == {"data": 1, "seq": 8, "tensor": 1} and first["devices"] == 8
    assert first["needed_bytes"] == sum(first["parts_bytes"].values()) == first["usable_bytes"] - first["spare_bytes"]
    assert first["largest_context"] > 10_000_000 > second["largest_context"]
    assert set(first["ms_per_token"]) == {"memory", "compute", "interconnect", "latency", "total"}
    assert not second["fits"] and "devices" in second["way_out"]
    printed = capsys.readouterr().out
    assert "bf16 does not fit by" in printed and "10,000,000 tokens" in printed


def test_a_plot(script, tmp_path, monkeypatch, capsys):
    plot = tmp_path / "plan.png"
    arguments = ["--model", "tiny", "--quant", "bf16", "--tokens", "4k", "--devices", "v5e:1", "--plot", str(plot)]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(SystemExit):
            script.main(arguments)
    assert "`plot` needs matplotlib" in capsys.readouterr().err and not plot.exists()
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        script.main([*arguments[:-1], "plan.xyz"])
    assert "`plot=plan.xyz` must end in a format of pictures" in capsys.readouterr().err
    assert script.main(arguments) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_it_chooses_preset_and_number_of_devices(script, tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["--tokens", "4k", "--model", "tiny", "--json", str(out)]
    assert script.main([*arguments, "--quant", "auto", "--max-bits", "4.6", "--devices", "v5e:1"]) == 0
    assert json.loads(out.read_text())["choice"] == "kvquant4"
    assert "Take kvquant4" in capsys.readouterr().out
    own = ["--bandwidth", "1e12", "--interconnect", "1e11", "--flops", "1e14"]
    assert script.main([*arguments, "--quant", "kvquant3", "--devices", "mine", "--device-memory", "1e7", *own]) == 0
    first, *_ = json.loads(out.read_text())["plans"]
    assert first["devices"] == 2 and first["usable_bytes"] == 10_000_000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--devices", "tpu:4"], "tpu is none of v5e, v5p"),
        (["--quant", "kvquant33"], "is not a preset"),
        (["--quant", "asymkv-auto@2.5"], "use a preset of given bits"),
        (["--model", "nothing"], "or one of llama-7b"),
        (["--mesh", "seq=4", "--devices", "v5p:8"], "is of 4 devices, but `devices` says 8"),
        (["--mesh", "seqs=4"], "must be data=N, seq=N or tensor=N"),
        (["--quant", "auto", "--tokens", "1G", "--devices", "v5e:1"], "the smallest misses by"),
        (["--batch", "0"], "must all be at least 1"),
        (["--tokens", "-5"], "is no number of tokens"),
        (["--quant", "asymkv-99-99"], "`quant=asymkv-99-99` sets layer 32"),
        (["--quant", "auto", "--max-bits", "1", "--model", "tiny"], "and store at most 1 bits; those that fit store"),
        (["--max-bits", "2"], "`max-bits=2` is of --quant auto, but `quant=kvquant3` is given"),
        (["--quant", "auto", "--max-bits", "nan"], "`max-bits=nan` must be a positive number"),
        (["--json", ""], "`json=` is a directory"),
    ],
)
def test_bad_input_ends_in_one_line(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    printed = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and message in printed and "\n" not in printed


def test_numbers_of_tokens(script):
    wanted = {
        "1048576": 1 << 20,
        "1,048,576": 1 << 20,
        "10M": 10**7,
        "128k": 128_000,
        "128Ki": 1 << 17,
        "1.5M": 1_500_000,
    }
    assert {text: script.tokens(text) for text in wanted} == wanted
    for text in ("", "M", "0", "10Q", "1.5", "1e6", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no number of tokens"):
            script.tokens(text)
