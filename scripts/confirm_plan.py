"""The real compilers' word on plans: decode steps of whole models, compiled for TPUs and GPUs that are not there.

python scripts/confirm_plan.py
python scripts/confirm_plan.py --model llama-3-8b --quant kvquant3 --tokens 10M --devices v5e:32 --mesh seq=4,tensor=8

Needs pip install -e '.[compile]', Python >= 3.12; no TPU, GPU or driver. Without --model the cases of
kvjax/evaluate/confirm.py. Exit code 1 where a compiler contradicts a plan: another verdict, or more than 1 % off.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no device is looked for: the chips are described, not there
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the GPU's compiler complains of what does not fit; we say it

from _cli import Parser, check_targets, compilers, count, environment, one_line_errors, show, tokens
from rich.table import Table

from kvjax.evaluate import confirm
from kvjax.evaluate.compare_report import to_markdown
from kvjax.evaluate.confirm import CASES, Case, Confirmation
from kvjax.evaluate.plan_report import mesh_text, tokens_text
from kvjax.evaluate.progress import bar
from pallas_kernels import deviceless
from pallas_kernels.deviceless_mesh import OutOfMemory

TOLERANCE = 0.01


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as in plan.py; without it, all cases")
    parser.add_argument("--quant", default="kvquant3", help="one preset (%(default)s)")
    parser.add_argument("--tokens", type=tokens, default=tokens("1Mi"), metavar="N", help="as in plan.py (1Mi)")
    parser.add_argument("--devices", default="v5p:8", metavar="CHIP:N", help="as in plan.py (%(default)s)")
    parser.add_argument("--mesh", default="", metavar="AXES", help="as in plan.py (the plan's)")
    parser.add_argument(
        "--prompt", type=int, metavar="N", help="compile prefill of N tokens too, and print its temporaries"
    )
    parser.add_argument("--chips", metavar="A,B", help="of all cases, those on these chips")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--markdown", action="store_true", help="print the table for a page")
    args = parser.parse_args(argv)
    with one_line_errors():
        check_targets(args, "json")
        if args.prompt is not None and args.prompt < 1:
            raise ValueError(
                f"`prompt={args.prompt}` must be at least 1 token; leave it out for the decode step alone."
            )
        found, skipped = measure(chosen(args))
        if args.json:
            rows = [confirm.as_json(c) for c in found]
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        prompts = [line for c in found for line in of_prompt(c, args.prompt)] if args.prompt else []
    wrong = [c for c in found if contradicted(c)]
    columns = as_columns(found)
    if args.markdown:
        print(to_markdown(columns) + "\n")
    else:
        show([table(columns)])
    paths = dict.fromkeys(line for c in found for line in c.plan.path.splitlines() if ": reference" in line)
    said = [f"does not fit: {which(c)}, by {short(c):.2f} GiB per device" for c in found if not c.fits]
    said += [f"CONTRADICTED: {which(c)}" for c in wrong]
    show([*prompts, *said, *paths, *skipped, f"{count(len(found), 'step')}; {environment()}{compilers()}"])
    return 1 if wrong else 0


def chosen(args: argparse.Namespace) -> list[Case]:
    if args.model:
        return [Case(args.model, args.quant, args.tokens, args.devices, args.mesh)]
    wanted = None if args.chips is None else {name.strip() for name in args.chips.split(",")}
    cases = [case for case in CASES if wanted is None or case.devices.partition(":")[0] in wanted]
    if not cases:
        raise ValueError(f"`chips={args.chips}` is in no case; there are v5p, v5e, v6e, h100 and h200.")
    return cases


def measure(cases: list[Case]) -> tuple[list[Confirmation], list[str]]:
    """What the compilers that are here say, and why cases of the others were left out."""
    found, skipped = [], []
    with bar(True, "programs") as shown:
        row = shown.add_task("", total=len(cases))
        for case in cases:
            shown.update(row, description=f"{case.model} {case.quant} on {case.devices}")
            reason = deviceless.missing(case.devices.partition(":")[0])
            if reason and len(cases) > 1:
                skipped.append(f"{case.model} {case.quant} on {case.devices}: {reason}")
            else:
                found.append(confirm.confirm(case))
            shown.advance(row)
    if not found:
        raise NotImplementedError(skipped[0])
    return found, skipped


def of_prompt(c: Confirmation, length: int) -> list[str]:
    """A line for each kind of attention in prefill: its temporaries, or that they do not fit."""
    lines = []
    for name, made in confirm.prompt(c, length).items():
        size = "too large" if isinstance(made, OutOfMemory) else f"{made.memory.temporary / 1e6:,.0f} MB"
        lines.append(f'{which(c)}: prompt of {length:,} tokens, attention "{name}": temporaries {size}')
    return lines


def contradicted(c: Confirmation) -> bool:
    """Whether a plan and its program disagree; within 1 % of what there is, either verdict will do."""
    if c.error is not None and abs(c.error) > TOLERANCE:
        return True
    return c.fits != c.plan.fits and abs(c.plan.spare) > TOLERANCE * c.plan.chip.memory


def which(c: Confirmation) -> str:
    return f"{c.case.model}, {c.case.quant}, {c.case.tokens:,} tokens on {c.case.devices} ({mesh_text(c.plan.mesh)})"


def short(c: Confirmation) -> float:
    return ((c.needed or c.plan.needed) - c.plan.chip.memory) / 2**30


def as_columns(found: list[Confirmation]) -> dict[str, list[str]]:
    """Names of columns to their cells."""

    def gib(nbytes: int | None) -> str:
        return "" if nbytes is None else f"{nbytes / 2**30:.3f}"

    def compiled(what: str) -> list[str]:
        return ["" if isinstance(c.result, OutOfMemory) else str(getattr(c.result.memory, what)) for c in found]

    def others(c: Confirmation) -> str:
        made = {} if isinstance(c.result, OutOfMemory) else c.result.collectives
        return ", ".join(f"{n} {name}" for name, n in made.items() if n and name != "all-reduce") or "none"

    return {
        "model": [c.case.model for c in found],
        "preset": [c.case.quant for c in found],
        "tokens": [tokens_text(c.case.tokens) for c in found],
        "devices": [c.case.devices for c in found],
        "mesh": [mesh_text(c.plan.mesh) for c in found],
        "planned GiB": [gib(c.plan.needed) for c in found],
        "compiled": [gib(c.needed) for c in found],
        "off": ["" if c.error is None else f"{c.error:+.2%}" for c in found],
        "arguments": [gib(int(n) if n else None) for n in compiled("argument")],
        "aliased": [gib(int(n) if n else None) for n in compiled("alias")],
        "temporaries MB": [f"{int(n) / 1e6:.1f}" if n else "" for n in compiled("temporary")],
        "planned MB": [f"{c.plan.parts['temporaries'] / 1e6:.1f}" for c in found],
        "all-reduces a layer / step": [
            "" if isinstance(c.result, OutOfMemory) else f"{c.all_reduces['layer']} / {c.all_reduces['step']}"
            for c in found
        ],
        "other collectives": ["" if isinstance(c.result, OutOfMemory) else others(c) for c in found],
        "compile s": [f"{c.result.compile_s:.0f}" for c in found],
        "CPU s": [f"{c.result.compile_cpu_s:.0f}" for c in found],
        "fits": ["yes" if c.fits else "no" for c in found],
    }


def table(columns: dict[str, list[str]]) -> Table:
    made = Table(box=None, pad_edge=False)
    for name in columns:
        text = name in ("model", "preset", "devices", "mesh", "other collectives", "fits")
        made.add_column(name, justify="left" if text else "right")
    for row in zip(*columns.values()):
        made.add_row(*row)
    return made


if __name__ == "__main__":
    sys.exit(main())
