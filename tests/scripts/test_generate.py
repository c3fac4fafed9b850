"""The command line of generate.py: its report, and one line and exit code 2 for bad input."""

import json

import pytest

import kvjax
from kvjax import decode, saving


@pytest.fixture
def main(load_script):
    return load_script("generate").main


def test_report(main, tmp_path, capsys):
    report = tmp_path / "report.json"
    compiled = decode._next_token._cache_size()
    assert main(["--quant", "int4", "--prompt", "The sea", "--max-new-tokens", "4", "--json", str(report)]) == 0
    out = capsys.readouterr()
    figures = json.loads(report.read_text())
    assert list(figures) == [
        "text", "quant", "bits_per_element", "bits_read_per_element", "cache_bytes", "bf16_bytes",
        "prefill_tokens_per_s", "decode_tokens_per_s", "path", "platform", "versions",
    ]  # fmt: skip
    assert out.out == f"The sea{figures['text']}\n" and figures["text"]
    assert decode._next_token._cache_size() - compiled <= 1  # nothing is compiled while tokens are timed
    assert figures["bits_per_element"] == 4.25  # 4-bit codes and 32 bits per token of 128 channels
    assert figures["bits_read_per_element"] is None  # everything is read
    assert "4.25 bits per element" in out.err and "reference (chunked jnp)" in out.err


def test_a_document_is_read_once_and_asked_about(main, tmp_path, capsys):
    text, question = "The captain looked out over the sea. " * 20, "And then"
    saved, report = str(tmp_path / "saved"), tmp_path / "report.json"
    common = ["--max-new-tokens", "8", "--temperature", "0", "--json", str(report)]
    assert main(["--quant", "int4", "--prompt", text, "--save-cache", saved, *common]) == 0
    first = json.loads(report.read_text())
    tokens = first["saved"]["tokens"]
    assert first["saved"]["bytes"] > 0 and first["saved"]["seconds"] >= first["saved"]["seconds_waited"] > 0
    assert f"{tokens:,} tokens" in capsys.readouterr().err
    assert main(["--load-cache", saved, "--prompt", question, *common]) == 0
    answer = json.loads(report.read_text())
    assert answer["loaded"]["tokens"] == tokens and answer["quant"] == "int4"
    assert capsys.readouterr().out == f"{question}{answer['text']}\n"

    model = kvjax.load("tiny")
    cache, held = saving.load_cache(saved, model, capacity=tokens + 30)
    assert held.tolist() == [model.tokenizer(text)["input_ids"]]
    ids = model.tokenizer(question, add_special_tokens=False)["input_ids"]
    new, _ = decode.generate(model, cache, [ids], max_new_tokens=8)
    assert model.tokenizer.decode(new[0], skip_special_tokens=True) == answer["text"]

    for arguments, message in [
        (["--prompt", "a", "--quant", "kivi2"], "`--quant kivi2`: the cache in "),
        ([], "give --prompt or --prompt-file with what follows"),
        (["--prompt", "a", "--calibration", "x"], "`--calibration`: a saved cache has its constants with it"),
        (["--prompt", "a", "--context", "9"], f"holds {tokens} tokens, `prompt` has 1 tokens"),
    ]:
        refused(main, ["--load-cache", saved, *arguments], message, capsys)
    refused(main, ["--load-cache", str(tmp_path), "--prompt", "a"], "holds no saved cache", capsys)
    refused(main, ["--save-cache", str(report)], "is a file", capsys)


def refused(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    errors = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere"], "/nowhere"),
        (["--json", "/nowhere/report.json"], "`json=/nowhere/report.json`: its directory does not exist"),
        (["--quant", "kvquant33"], "`quant=kvquant33` is not a preset; the nearest are kvquant3"),
        (["--quant", ""], "`quant=` is not a preset"),
        (["--context", "8"], "--context is 8; pass --context"),
        (["--context", "0"], "--context is 0; pass --context"),
        (["--prompt", "a", "--prompt-file", "b"], "argument --prompt-file: not allowed with argument --prompt"),
        (["--prompt", ""], "`prompt` is empty"),
        (["--prompt-file", "/nowhere/prompt.txt"], "`prompt-file='/nowhere/prompt.txt'` cannot be read"),
        (["--prompt-file", "{binary}"], "is not UTF-8 (invalid start byte at byte 0)"),
        (["--max-new-tokens", "0"], "`max_new_tokens=0`"),
        (["--seed", "99999999999999999999"], "argument --seed: '99999999999999999999' is no seed"),
        (["--temperature", "-1"], "`temperature=-1.0`"),
        (["--quant", "fp8", "--strict"], "strict: the reference would run"),
        (["--quant", "kvquant3", "--calibration", "{damaged}"], "damaged"),
        (["--quant", "kivi2", "--calibration", "{damaged}"], "`quant=kivi2` needs no calibration"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(main, tmp_path, capsys, arguments, message):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x10\x00\x00")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\x94")
    refused(main, [a.format(damaged=damaged, binary=binary) for a in arguments], message, capsys)
