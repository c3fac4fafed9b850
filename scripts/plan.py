"""What a context would need on given devices, and how fast it could be, before anything is allocated.

python scripts/plan.py --model llama-7b --quant kvquant2-dense --tokens 10M --devices v5p:8

Numbers of tokens: 10M is 10,000,000 and 128k is 128,000; 1Mi is 1,048,576. Devices: v5e, v5p, v6e, 7x (half a chip
each), a100-80, h100, h200, and how many; without a number, as few as it takes. Of your own: --devices mine:8
--device-memory 80e9 --bandwidth 2e12 --interconnect 5e10 --flops 3e14. What the real compilers say to these plans:
scripts/confirm_plan.py.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed, and no device is needed

from _cli import Parser, check_targets, count, environment, one_line_errors, presets, show, tokens, versions

from kvjax import sharding
from kvjax.chips import CHIPS, Chip, parse_devices
from kvjax.evaluate import plan_report
from kvjax.evaluate.plan_report import Row
from kvjax.model.known import KNOWN, model_config
from kvjax.plan_search import BY_QUALITY, Question, break_even, choose, fewest_devices, largest_context, way_out

CHOOSE = "auto"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="llama-7b", help=f"{', '.join(KNOWN)}, or what generate.py takes; only its config is read"
    )
    parser.add_argument(
        "--quant", default="kvquant3", metavar="A,B",
        help=f'presets (%(default)s); "{CHOOSE}": the best that fits of {", ".join(BY_QUALITY)}',
    )  # fmt: skip
    parser.add_argument("--tokens", type=tokens, default=tokens("1Mi"), metavar="N", help="per row (1Mi = 1,048,576)")
    parser.add_argument("--devices", default="v5p:8", metavar="CHIP[:N]", help=f"{', '.join(CHIPS)} (%(default)s)")
    parser.add_argument("--mesh", metavar="AXES", help='such as "seq=4,tensor=2" (the fastest that fits)')
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows (%(default)s)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of weights and recent tokens"
    )
    parser.add_argument("--max-bits", type=float, metavar="B", help=f"per element, with --quant {CHOOSE} (any)")
    parser.add_argument("--device-memory", type=float, metavar="BYTES", help="that a program may use on a device")
    parser.add_argument("--bandwidth", type=float, metavar="BYTES/S", help="of that memory")
    parser.add_argument("--interconnect", type=float, metavar="BYTES/S", help="that a device sends, over all its links")
    parser.add_argument("--flops", type=float, metavar="N", help="bf16 operations per second of a device")
    parser.add_argument("--json", metavar="FILE", help="write the plans there")
    parser.add_argument("--plot", metavar="FILE", help="draw memory against context there (PNG, SVG or PDF)")
    args = parser.parse_args(argv)
    with one_line_errors():
        run(args)
    return 0


def run(args: argparse.Namespace) -> None:
    check_targets(args, "json", "plot")
    if args.plot:
        plan_report.plotting(args.plot)  # a missing matplotlib is told at once
    own = {"memory": args.device_memory}
    own |= {name: getattr(args, name) for name in ("bandwidth", "interconnect", "flops")}
    check_max_bits(args)
    chip, devices = parse_devices(args.devices, own)
    mesh = sharding.parse_mesh(args.mesh) if args.mesh else None
    if mesh is not None:
        if devices not in (None, math.prod(mesh.values())):
            raise ValueError(
                f"`mesh={args.mesh}` is of {math.prod(mesh.values())} devices, but `devices` says {devices}."
            )
        devices = math.prod(mesh.values())
    question = Question(model_config(args.model), chip, args.batch, args.dtype)
    chosen = ""
    if args.quant == CHOOSE:
        names, chosen = choice(question, args, devices or 1, mesh)
    else:
        names = list(dict.fromkeys([*presets(args.quant), "bf16"]))
    rows = [searched(question, name, args, devices, mesh) for name in names]
    head = (
        f"{args.model}, {args.tokens:,} tokens, {count(args.batch, 'row')}, {args.dtype}; {described(chip)}; bytes are "
        "of one device"
    )
    said = [*([chosen] if chosen else []), *plan_report.notes(rows), environment()]
    show([head, plan_report.parts_table(rows), plan_report.plans_table(rows), *said])
    if args.json:
        content = {
            "model": args.model, "tokens": args.tokens, "batch": args.batch, "dtype": args.dtype,
            "chip": {name: getattr(chip, name) for name in ("name", "memory", "bandwidth", "interconnect", "flops")},
            "choice": names[0] if chosen else None, "plans": [plan_report.as_json(row) for row in rows],
            "versions": versions(),
        }  # fmt: skip
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        what = f"{args.model} on {rows[0].plan.devices} {chip.name}" if devices else f"{args.model} on {chip.name}"
        plan_report.plot(Path(args.plot), question, rows, f"{what}, {count(args.batch, 'row')}")


def check_max_bits(args: argparse.Namespace) -> None:
    if args.max_bits is None:
        return
    if args.quant != CHOOSE:
        raise ValueError(
            f"`max-bits={args.max_bits:g}` is of --quant {CHOOSE}, but `quant={args.quant}` is given; leave one out."
        )
    if not 0 < args.max_bits < math.inf:
        raise ValueError(f"`max-bits={args.max_bits:g}` must be a positive number of bits per element.")


def choice(question: Question, args: argparse.Namespace, devices: int, mesh) -> tuple[list[str], str]:
    """The best preset that fits, what is next to it in quality, and a line that says so."""
    max_bits = math.inf if args.max_bits is None else args.max_bits
    found = choose(question, args.tokens, devices, max_bits=max_bits, mesh=mesh)
    limit = f" and store at most {max_bits:g} bits" if math.isfinite(max_bits) else ""
    if found.best is None:
        fitting = [p.bits_per_element for p in found.plans if p.fits]
        why = f"the smallest misses by {-max(p.spare for p in found.plans) / 2**30:.2f} GiB per device; add devices."
        if fitting:
            why = f"those that fit store {min(fitting):.2f} bits and more; allow as many."
        raise ValueError(
            f"`quant={CHOOSE}`: none of {', '.join(BY_QUALITY)} fits {args.tokens:,} tokens on {args.devices}{limit}; "
            f"{why}"
        )
    names = [found.best.quant, *(p.quant for p in found.plans if p.quant != found.best.quant)]
    return names, f"Take {found.best.quant}: the best in quality (README, Results) of those that fit{limit}."


def searched(question: Question, quant: str, args: argparse.Namespace, devices: int | None, mesh) -> Row:
    if devices is None:
        devices = fewest_devices(question, quant, args.tokens)
        if devices is None:
            raise ValueError(f"`tokens={args.tokens}`: no number of {question.chip.name} holds it with {quant}.")
    p = question.plan(quant, args.tokens, devices, mesh)
    longest = largest_context(question, quant, devices, mesh)
    return Row(
        plan=p,
        largest_context=longest,
        break_even=None if quant == "bf16" else break_even(question, quant, devices, p.mesh),
        way_out="" if p.fits else way_out(question, p, longest),
    )


def described(chip: Chip) -> str:
    return (
        f"{chip.name}: {chip.memory / 2**30:.2f} GiB usable, {chip.bandwidth / 1e9:,.0f} GB/s, links "
        f"{chip.interconnect / 1e9:,.0f} GB/s, {chip.flops / 1e12:,.0f} Tflop/s"
    )


if __name__ == "__main__":
    sys.exit(main())
