"""long_context.py: 2,000 tokens over four devices, what it reports, and what it refuses."""

import json

import pytest


@pytest.fixture
def main(load_script):
    return load_script("long_context").main


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "whale.txt"
    file.write_text("Call me Ishmael. Some years ago, never mind how long precisely.\n" * 10, encoding="utf-8")
    return str(file)


def test_report(main, text, tmp_path, capsys):
    file = tmp_path / "report.json"
    arguments = ["--quant", "int4", "--tokens", "2k", "--chunk", "512", "--mesh", "seq=4", "--max-new-tokens", "3"]
    arguments += ["--prefill-window", "300", "--compare-at", "4k", "--check", "--one-device"]
    assert main(["--text", text, *arguments, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["tokens"] == 2000 and figures["mesh"] == {"seq": 4} and figures["devices"] == 4
    assert figures["bits_per_element"] == 5.0 and figures["overrun"] == 0
    # 16 blocks of 128 tokens of 32 channels, 5 bits: 4 for each device; the rest is recent tokens and numbers.
    sealed = 2 * 16 * 128 * 32 * 5 // 8
    rest = figures["cache_bytes"] - sealed
    assert rest > 0 and figures["cache_bytes_per_device"] == sealed // 4 + rest
    assert figures["prefill_curve"][-1][0] == 2000 and figures["decode_ms_per_step"] > 0
    temporaries = [compiled["prefill"]["temporary"] for compiled in figures["compiled_per_device"].values()]
    assert len(temporaries) == 2 and temporaries[1] < 1.05 * temporaries[0]  # they do not grow with the context
    memory = figures["memory"]
    assert memory["predicted"]["sum_over_devices"] > 4 * temporaries[0]
    assert 0 <= memory["growth"] <= memory["peak_of_process"]
    assert figures["one_device"]["logits"] < 1e-4 < figures["one_device"]["largest_logit"]
    # The check sees the whole context: were the window still on in decode steps, they would be far off.
    assert figures["check"]["outputs"][0] < 1e-5 and figures["check"]["logits"] < 1e-4
    assert figures["check"]["same_token"] and figures["prefill_window"] == 300
    out = capsys.readouterr()
    assert "2,000 tokens in" in out.err and "5.00 bits per element" in out.out and "against float64" in out.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quant", "kvquant33"], "`quant=kvquant33` is not a preset"),
        (["--tokens", "many"], "'many' is no number of tokens"),
        (["--mesh", "ring=8"], "`mesh=ring=8`"),
        (["--text", "/dev/null", "--tokens", "1k"], "`text=/dev/null` is empty"),
        (["--json", "/nowhere/a.json"], "`json=/nowhere/a.json`"),
        (["--max-new-tokens", "0"], "`new_tokens=0` must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(main, text, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["--text", text, *arguments])
    errors = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
