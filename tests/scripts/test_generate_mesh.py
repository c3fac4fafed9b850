"""generate.py over the devices of one process; many processes are in tests/test_distributed.py."""

import json
import os

import jax
import pytest


@pytest.fixture
def main(monkeypatch, load_script):
    assert (
        len(jax.devices()) == 8
    )  # JAX has started: a script that wants another number does not change it for all tests
    for name in list(os.environ):
        if name.startswith(("KVJAX_", "SLURM_", "OMPI_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    return load_script("generate").main


def test_report_of_a_mesh(main, tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["--quant", "int4", "--prompt", "The sea", "--max-new-tokens", "4", "--context", "1000"]
    assert main([*arguments, "--mesh", "seq=4", "--json", str(report)]) == 0
    figures = json.loads(report.read_text())
    assert (figures["mesh"], figures["devices"], figures["processes"]) == ("seq=4", 4, 1)
    # Eight blocks of 128 tokens at 4.25 bits, 5 layers, 2 heads of 64: a quarter each; ring and sinks are whole.
    sealed = 8 * 128 * 5 * 2 * 128 * 4.25 / 8
    whole = figures["cache_bytes"] - sealed
    assert whole > 0 and figures["cache_bytes_per_device"] == whole + sealed / 4
    assert f"seq=4: 4 devices, {figures['cache_bytes_per_device']:,} bytes each" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "seq=16"], "needs 16 devices, but there are 8"),
        (["--mesh", "sequence=2"], "must be data=N, seq=N or tensor=N"),
        (["--mesh", "tensor=8"], "`mesh`: tensor=8 must divide"),
        (["--mesh", "seq=2", "--quant", "alignedkv"], "use seq=1"),
        (["--coordinator", "host0:8476"], "add --distributed"),
        (["--distributed"], "`mesh` is missing"),
        (["--mesh", "seq=2", "--distributed"], "finds nothing to join"),
        (["--mesh", "seq=2", "--distributed", "--process", "0"], "`coordinator`, `processes` must be given too"),
        (["--mesh", "seq=3", "--distributed", "--coordinator", "h:1", "--processes", "2", "--process", "0"], "evenly"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(main, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    errors = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
