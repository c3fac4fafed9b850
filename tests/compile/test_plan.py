"""The real compilers confirm plans (`kvjax.evaluate.confirm`): bytes on each device, collectives, what does not fit."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kvjax.chips import CHIPS, tiled_bytes, tiled_order
from pallas_kernels import deviceless

ROOT = Path(__file__).parents[2]
NUMBERS = {1: jnp.uint8, 2: jnp.bfloat16, 4: jnp.float32}
# Kinds of leaves: words, rows shared by the heads, slots, planes, rings, weights, constants; whole tiles and others.
LEAVES = [
    ((2, 1, 64, 8, 8, 128), 4), ((2, 1, 51, 3, 12, 96), 4), ((2, 1, 64, 8, 1, 128), 2), ((2, 1, 51, 1, 128), 2),
    ((2, 1, 51, 8, 2, 128), 1), ((2, 1, 51, 1, 2, 256), 2), ((2, 1, 64, 2, 2, 128), 1), ((2, 1, 20, 1, 256), 2),
    ((2, 3, 64, 1, 1, 128), 2), ((2, 1, 64, 8, 128, 32), 4), ((2, 1, 8, 128, 80), 2), ((2, 1, 4, 1, 128), 2),
    ((2, 100, 1, 1, 128), 2), ((400, 96), 2), ((32, 4), 4), ((32, 3, 1, 128), 4), ((2, 1), 4), ((300,), 4), ((3,), 4),
]  # fmt: skip


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_arrays_are_laid_out_as_the_compiler_lays_them_out(on, chip):
    arrays = tuple(jax.ShapeDtypeStruct(shape, NUMBERS[size]) for shape, size in LEAVES)
    compiled = deviceless.compile(jax.jit(lambda *xs: jnp.int32(0), keep_unused=True), arrays, on(chip))
    assert compiled.memory.argument == sum(tiled_bytes(shape, size) for shape, size in LEAVES)
    orders = [held.layout.major_to_minor for held in compiled.executable.input_formats[0]]
    assert orders == [tiled_order(shape, size) for shape, size in LEAVES]


def confirm(tmp_path, **case):
    """The row of one case, by the script in a process of its own: libtpu reads its settings once."""
    if reason := deviceless.missing(case["devices"].partition(":")[0]):
        pytest.skip(reason)
    out = tmp_path / "rows.json"
    arguments = [f"--{name}={value}" for name, value in case.items()]
    command = [sys.executable, str(ROOT / "scripts" / "confirm_plan.py"), *arguments, f"--json={out}"]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(out.read_text())[0]


def test_tpus_hold_10m_tokens_as_planned(tmp_path):
    row = confirm(tmp_path, model="llama-3-8b", quant="kvquant3", tokens="10M", devices="v5e:32", mesh="seq=4,tensor=8")
    assert row["fits"] and row["planned_fits"]
    # The token and its count come on top; nothing else.
    assert 0 <= row["argument_bytes"] - row["planned_argument_bytes"] <= 1024
    assert abs(row["error"]) < 0.01 and row["temporary_bytes"] < 64 << 20
    assert row["alias_bytes"] >= 0.999 * (row["planned_argument_bytes"] - weights(row))
    assert all(count == 0 for name, count in row["collectives"].items() if name != "all-reduce")
    # Two to join the blocks of all devices, two products over heads, four for ranges and means of the ring: its values
    # share them over all heads. Then one row of the embedding.
    assert row["all_reduces"]["layer"] == 8 and row["all_reduces"]["step"] == 1
    assert row["planned_all_reduces"] == {"seq": 2 * 32, "tensor": (2 + 4) * 32 + 1}


def weights(row):
    """Llama-3-8B in bfloat16 over heads, MLP channels and vocabulary."""
    whole = 2 * 128256 * 4096 + 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    return 2 * (whole // row["mesh"]["tensor"] + 32 * 2 * 4096 + 4096)


def test_what_does_not_fit_is_refused_as_planned(tmp_path):
    row = confirm(tmp_path, model="llama-7b", quant="kvquant3", tokens="10M", devices="v5p:8", mesh="tensor=8")
    assert not row["fits"] and not row["planned_fits"] and abs(row["error"]) < 0.01
    assert math.isclose(row["available_bytes"], CHIPS["v5p"].memory, rel_tol=1e-3)  # what the table of chips says


def test_eight_h100_miss_10m_tokens_as_planned(tmp_path):
    row = confirm(tmp_path, model="llama-7b", quant="kvquant2-dense", tokens="10M", devices="h100:8", mesh="seq=8")
    assert not row["fits"] and not row["planned_fits"] and abs(row["error"]) < 0.01
    assert row["temporary_bytes"] < 64 << 20
    assert all(count == 0 for name, count in row["collectives"].items() if name != "all-reduce")
    assert row["all_reduces"]["layer"] == 2
