"""What the decode kernels cost on chips that are not there: instructions beside the memory cycles of the same bytes.

python scripts/kernel_budget.py --chips v5p,h100 --storages bf16,kivi4,kvquant3

Compiles each storage's kernel with the real compilers (pip install -e '.[compile]', Python >= 3.12) and counts what
they wrote. A tile is 128 tokens' keys and values of one kv head, of 128 channels ("-h64", "-h96": of so many). Static:
nothing is timed.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no device is looked for: the chips are described, not there

import jax
from _cli import Parser, check_targets, compilers, count, environment, one_line_errors, show
from rich.table import Table

from kvjax.evaluate.compare_report import to_markdown
from kvjax.evaluate.progress import bar
from pallas_kernels import deviceless
from pallas_kernels.decode_attention import budget, support

UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", metavar="A,B", help=f"of {', '.join(deviceless.CHIPS)} (all whose compiler is here)")
    parser.add_argument("--storages", metavar="A,B", help=f"of {', '.join(budget.CASES)} (all)")
    parser.add_argument("--block", type=int, default=128, metavar="T", help="tokens per block (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--markdown", action="store_true", help="print tables for a page")
    parser.add_argument(
        "--support", action="store_true", help="print what runs fused where, and why not; compile nothing"
    )
    args = parser.parse_args(argv)
    if args.support:
        print(support.markdown())
        return 0
    with one_line_errors():
        check_targets(args, "json")
        chips = chosen(args.chips, "chips", deviceless.CHIPS)
        storages = chosen(args.storages, "storages", tuple(budget.CASES))
        reasons = {chip: reason for chip in chips if (reason := deviceless.missing(chip))}
        if args.chips or len(reasons) == len(chips):
            for reason in reasons.values():
                raise NotImplementedError(reason)
        if args.block < 32 or args.block % 32:
            raise ValueError(f"`block={args.block}` must be a positive multiple of 32 tokens; the default is 128.")
        chips = [chip for chip in chips if chip not in reasons]
        costs, refused, failed = measure(chips, storages, args.block)
        if args.json:
            Path(args.json).write_text(json.dumps(as_json(costs, refused), indent=1) + "\n", encoding="utf-8")
    for kind, columns in (("TPU", tpu_columns), ("GPU", gpu_columns)):
        chosen_costs = [c for c in costs if (c.chip in deviceless.TPU_TOPOLOGIES) == (kind == "TPU")]
        if chosen_costs and args.markdown:
            print(to_markdown(columns(chosen_costs)) + "\n")
        elif chosen_costs:
            show([table(columns(chosen_costs))])
    notes = [f"{name}: {reason}" for name, reason in [*reasons.items(), *refused.items(), *failed.items()]]
    show([*notes, f"{count(len(costs), 'kernel')}; {environment()}{compilers()}"])
    return 1 if failed else 0


def as_json(costs: Sequence[budget.Cost], refused: dict[str, str]) -> dict[str, Any]:
    def rounded(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: rounded(value) for name, value in x.items() if value}
        return round(x, 3) if isinstance(x, float) else x

    rows = [{k: rounded(v) for k, v in dataclasses.asdict(c).items()} | {"ratio": round(c.ratio, 3)} for c in costs]
    return {"rows": rows, "refused": refused}


def chosen(value: str | None, option: str, known: tuple[str, ...]) -> list[str]:
    """The names in a list with commas, in the order of `known`; all of them where nothing is asked for."""
    names = list(known) if value is None else [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"`{option}={name}` is none of {', '.join(known)}.")
    if not names:
        raise ValueError(f"`{option}={value!r}` names none; pass e.g. --{option} {known[0]}.")
    return [name for name in known if name in names]


def measure(
    chips: Sequence[str], storages: Sequence[str], block: int
) -> tuple[list[budget.Cost], dict[str, str], dict[str, str]]:
    """Costs, and the reasons of kernels that do not do a storage on a chip, and of those that do not compile."""
    costs: list[budget.Cost] = []
    refused: dict[str, str] = {}
    failed: dict[str, str] = {}
    with bar(True, "kernels") as shown:
        row = shown.add_task("", total=len(chips) * len(storages))
        for chip in chips:
            for storage in storages:
                shown.update(row, description=f"{chip} {storage}")
                try:
                    costs.append(one_cost(storage, chip, block))
                except NotImplementedError as error:
                    refused[f"{chip} {storage}"] = " ".join(str(error).split())
                except (jax.errors.JaxRuntimeError, ValueError) as error:  # the table goes on without it
                    failed[f"{chip} {storage}"] = f"failed: {' '.join(str(error).split())[:300]}"
                shown.advance(row)
    return costs, refused, failed


def one_cost(case: str, chip: str, block: int) -> budget.Cost:
    storage, shape = budget.CASES[case]
    return budget.cost(storage, deviceless.target(chip), dataclasses.replace(shape, tokens=block), name=case)


def faster(cost: budget.Cost, costs: Sequence[budget.Cost]) -> str:
    """Predicted speed over our bf16 kernel's on the same chip, of the same shape."""
    shape = budget.CASES[cost.storage][1]
    dense = [c for c in costs if c.chip == cost.chip and budget.CASES[c.storage] == ("bf16", shape)]
    return f"{dense[0].cycles / cost.cycles:.2f}" if dense else ""


def tpu_columns(costs: Sequence[budget.Cost]) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {
        "chip": [c.chip for c in costs],
        "storage": [c.storage for c in costs],
        "memory cycles": [f"{c.memory_cycles:.1f}" for c in costs],
        "bundles": [f"{c.instructions:.1f}" for c in costs],
        "of a whole step": [f"{c.whole:.1f}" for c in costs],
        "bundles / memory": [f"{c.ratio:.2f}" for c in costs],
        "x bf16": [faster(c, costs) for c in costs],
    }
    columns |= {unit: [f"{c.units.get(unit, 0):.0f}" for c in costs] for unit in UNITS}
    return columns | {
        "vector instr./element": [f"{c.per_element:.2f}" for c in costs],
        "spills": [str(c.spills) for c in costs],
        "temporaries, KiB": [f"{c.temporary_bytes / 1024:.0f}" for c in costs],
    }


def gpu_columns(costs: Sequence[budget.Cost]) -> dict[str, list[str]]:
    return {
        "chip": [c.chip for c in costs],
        "storage": [c.storage for c in costs],
        "instr./element": [f"{c.per_element:.2f}" for c in costs],
        "memory allows": [f"{c.per_element / c.ratio:.2f}" for c in costs],
        "instr. / memory": [f"{c.ratio:.2f}" for c in costs],
        "x bf16": [faster(c, costs) for c in costs],
        "registers": [str(c.registers) for c in costs],
        "spill bytes": [str(c.spills) for c in costs],
        "shared KiB": [f"{c.shared_bytes / 1024:.0f}" for c in costs],
        "most": [", ".join(f"{k} {v:.0f}" for k, v in top(c.units)) for c in costs],
        "temporaries, KiB": [f"{c.temporary_bytes / 1024:.0f}" for c in costs],
    }


def top(units: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(units.items(), key=lambda item: -item[1])[:4]


def table(columns: dict[str, list[str]]) -> Table:
    made = Table(box=None, pad_edge=False)
    for name in columns:
        made.add_column(name, justify="left" if name in ("chip", "storage", "most") else "right")
    for row in zip(*columns.values()):
        made.add_row(*row)
    return made


if __name__ == "__main__":
    sys.exit(main())
