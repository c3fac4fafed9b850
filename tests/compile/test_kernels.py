"""Every storage's decode kernel by the real compilers of every chip: it compiles, and nothing in it has grown."""

import dataclasses
import json
from pathlib import Path

import pytest

from pallas_kernels import deviceless
from pallas_kernels.decode_attention import budget
from pallas_kernels.decode_attention.specs import PLANES_READ

# Written by `python scripts/kernel_budget.py --chips v5e,v5p,v6e,7x,h100 --json tests/compile/budget.json`.
BUDGET = json.loads((Path(__file__).parent / "budget.json").read_text(encoding="utf-8"))
COMMITTED = {(row["chip"], row["storage"]): row for row in BUDGET["rows"]}
GROWTH = 1.15  # another version of a compiler may schedule a little differently
# A GPU's splits leave a result each, 33 to 49 of them for 8 heads; a TPU's nothing.
TEMPORARIES = {"tpu": 1 << 20, "cuda": 1_000_000}
SPILLS = {"tpu": 8, "cuda": 0}  # what is left: instructions
PLANES_SPILLS = 32  # on v6e and 7x, where values are read at 16 bits
CHIPS = [chip for chip in deviceless.CHIPS if chip != "h200"]  # the code of an h100


@pytest.mark.parametrize("case", budget.CASES)
@pytest.mark.parametrize("chip", CHIPS)
def test_a_kernel_compiles_within_its_budget(on, chip, case):
    target, (storage, shape) = on(chip), budget.CASES[case]
    pytest.importorskip(f"pallas_kernels.decode_attention.{budget.implementation(chip)}")
    committed = COMMITTED.get((chip, case))
    if committed is None:
        with pytest.raises(NotImplementedError):
            budget.cost(storage, target, shape, marginal=False)
        pytest.skip(BUDGET["refused"].get(f"{chip} {case}", "not in budget.json"))
    cost = budget.cost(storage, target, shape, marginal=False)
    assert cost.spills <= committed["spills"]
    assert cost.temporary_bytes < TEMPORARIES[target.platform]
    assert cost.padding < 1.01  # T and H of the presets fill whole tiles in memory
    assert cost.whole <= GROWTH * committed["whole"]
    assert cost.registers <= 255 and cost.shared_bytes <= 227 * 1024


@pytest.mark.parametrize(
    ("storage", "chip", "group", "channels", "spills"),
    # Many queries per kv head, and heads of 256: what needs most registers, and most of VMEM.
    [
        ("kvquant4", "v5e", 16, 128, 0),
        ("kivi4", "v5e", 16, 128, 146),  # half as many tokens at once spill 36, and take 9 % more bundles
        ("kivi4", "v6e", 16, 128, 4),
        ("kvquant4", "v6e", 4, 256, 50),
        ("kvquant2", "v5p", 16, 256, 120),
    ],
)
def test_other_shapes_fit_a_tpu(on, storage, chip, group, channels, spills):
    target = on(chip)
    shape = dataclasses.replace(budget.LLAMA_3_8B, group=group, channels=channels)
    (kernel,) = budget.compile_storage(storage, budget.LONG, target, shape).kernels.values()
    assert kernel.spills <= spills


@pytest.mark.parametrize(("storage", "channels"), [("kvquant4", 96), ("kvquant3", 256)])
def test_other_head_sizes_fit_a_gpu(on, storage, channels):
    pytest.importorskip("pallas_kernels.decode_attention.mosaic_gpu")
    cost = budget.cost(storage, on("h100"), dataclasses.replace(budget.LLAMA_3_8B, channels=channels))
    assert cost.spills == 0 and cost.shared_bytes <= 227 * 1024


def test_the_budget_lists_every_storage_on_every_chip():
    for name in ("mosaic_tpu", "mosaic_gpu"):
        pytest.importorskip(f"pallas_kernels.decode_attention.{name}")
    listed = {f"{chip} {storage}" for chip, storage in COMMITTED} | set(BUDGET["refused"])
    assert listed == {f"{chip} {case}" for chip in CHIPS for case in budget.CASES}
    for row in BUDGET["rows"]:
        most = SPILLS["cuda" if row["chip"] == "h100" else "tpu"]
        assert row["spills"] <= (PLANES_SPILLS if row["storage"] in PLANES_READ else most)


def test_an_h200_is_another_gpu_with_the_same_code(on):
    h100, h200 = (on(chip) for chip in ("h100", "h200"))
    assert h200.kernel_chip == h100.kernel_chip
    kinds = [next(iter(target.sharding.device_set)).device_kind for target in (h100, h200)]
    assert kinds == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
