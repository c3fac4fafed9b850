"""Times decoding: attention over packed storage, a model's decode step, and the largest context that fits a chip.

python scripts/bench_decode.py --model tiny --quant kvquant4,kvquant3 --contexts 1024,8192   a model's decode step, in
    ratio to the bf16 cache in the same run
python scripts/bench_decode.py --attention --json FILE --plot FILE.png   attention alone, on the chip that is there:
    time, GB/s, share of the measured read ceiling, speed-up over our bf16 and over the attention of others
python scripts/bench_decode.py --check   the errors of every storage on this chip, and no times
python scripts/bench_decode.py --headline --headline-model llama-7b --headline-tokens 1048576   decode steps of a
    large model over a cache of random codes: milliseconds per token, peak memory
python scripts/bench_decode.py --all --out DIR   the last three in one command of about 8 minutes, for a GPU that is
    there for a short time. Needs the package (jax[cuda13] 0.11 or newer, flax, safetensors, rich) and matplotlib;
    torch built for CUDA, and flash-attn, are compared with where they are installed.
"""

import argparse
import json
import sys
import time
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from _cli import (
    Parser,
    check_folder,
    check_targets,
    count,
    environment,
    integers,
    one_line_errors,
    presets,
    show,
    versions,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvjax.evaluate.bench import attention, device, headline, report, session, steps
from kvjax.evaluate.report import machine, plotting
from kvjax.evaluate.text import read_file
from pallas_kernels.decode_attention import api, specs

STORAGES = (
    "kivi4,kivi2,kvquant4,kvquant3,kvquant2,int4,kvquant4-dense,kvquant2-dense,int8,asymkv-k2v1,kivi1,"
    "alignedkv-16,alignedkv-8"
)
# What matters most first, should the time end; one of them is no multiple of a block.
CONTEXTS = {
    "cpu": [4096, 32768],
    "gpu": [32768, 1 << 20, 4096, 100_003],
    "tpu": [32768, 1 << 20, 4096, 100_003],
}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--attention", action="store_true", help="time attention alone")
    mode.add_argument("--check", action="store_true", help="errors of attention alone")
    mode.add_argument("--headline", action="store_true", help="time a large model at one large context")
    mode.add_argument("--all", action="store_true", help="check, attention and headline, each in a process of its own")
    parser.add_argument("--quant", metavar="A,B", help=f"presets; of --attention, storages ({STORAGES}, beside bf16)")
    parser.add_argument("--contexts", type=integers, metavar="N,N", help="tokens (1024,8192; --attention: up to 1M)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows (%(default)s)")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="calls timed (60; --attention: twice 30; --headline: 30)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", metavar="FILE", help="of --attention: draw them there (PNG, SVG)")
    parser.add_argument(
        "--out", metavar="DIR", default="runs/bench", help="of --all: folder of its files (%(default)s)"
    )
    parser.add_argument("--model", default="tiny", help='"tiny", a directory in Hugging Face layout, or a hub id')
    kernel = parser.add_argument_group("--attention, --check and --all")
    known = typing.get_args(api.Implementation)
    kernel.add_argument("--implementation", choices=known, help="what computes it (by platform)")
    kernel.add_argument("--chip", help="generation of the chip, as in v5e or sm_90 (by device)")
    kernel.add_argument("--heads", type=int, default=8, metavar="K", help="kv heads (%(default)s)")
    kernel.add_argument("--group", type=int, default=4, metavar="G", help="query heads of each (%(default)s)")
    kernel.add_argument("--channels", type=int, default=128, metavar="H", help="head size (%(default)s)")
    kernel.add_argument("--block", type=int, metavar="T", help="tokens per block (128; on a TPU, 256 at 3 bits)")
    kernel.add_argument("--layers", type=int, metavar="L", help="of the storage (as many as exceed the last cache)")
    kernel.add_argument("--seconds", type=float, metavar="S", help="start nothing new after so long (--all: 420)")
    kernel.add_argument("--checked", metavar="FILE", help="what --check wrote: do not check again")
    large = parser.add_argument_group("--headline and --all")
    large.add_argument(
        "--headline-model", default="llama-7b", choices=list(headline.MODELS), help="shape (%(default)s)"
    )
    large.add_argument("--headline-tokens", type=int, default=1 << 20, metavar="N", help="of one row (%(default)s)")
    large.add_argument("--headline-quant", default="kvquant2-dense", metavar="Q", help="preset (%(default)s)")
    large.add_argument("--headline-layers", type=int, metavar="L", help="fewer layers than the model's")
    args = parser.parse_args(argv)
    with one_line_errors():
        check_targets(args, "json", "plot")
        for name in (
            "batch",
            "rounds",
            "heads",
            "group",
            "channels",
            "block",
            "layers",
            "headline_tokens",
            "headline_layers",
        ):
            _positive(name, getattr(args, name))
        for context in args.contexts or []:
            _positive("contexts", context)
        if args.all:
            check_folder(args, "out")
            return run_all(args)
        if args.headline:
            return run_headline(args)
        return run_attention(args) if args.attention or args.check else run_model(args)


def run_model(args: argparse.Namespace) -> int:
    quants = presets("kvquant4,kvquant3,kvquant2" if args.quant is None else args.quant)
    console = Console(stderr=True)

    def progress(rounds: range, what: str) -> Any:
        return track(rounds, what, console=console)

    contexts = args.contexts or [1024, 8192]
    rows = steps.measure(args.model, quants, contexts, args.batch, args.rounds or 60, progress)
    write(args, {"rows": rows})
    table = Table("context", "preset", "ms per step", "time / bf16", box=None)
    for row in rows:
        table.add_row(
            str(row["context"]), row["quant"], f"{row['ms_per_step']:.2f}", f"{row['time_over_bf16']:.2f}"
        )  # fmt: skip
    show([table])
    return 0


def run_attention(args: argparse.Namespace) -> int:
    settings = _settings(args)
    if args.plot:
        plotting(args.plot)  # says now that it is missing, not after minutes
    facts = {"settings": vars(settings), "platform": jax.default_backend(), "chip": settings.chip}
    rows: list[attention.Row] = []
    if args.check:
        for row in attention.check(settings):
            rows.append(row)
            write(args, facts | {"rows": rows})
            say(f"{row['storage']}: {row['status']} {row['reason'] or ''} {_errors(row)}")
            if row["status"] == "failed" and not _alive():
                return session.DEVICE_LOST
        return _code(rows)
    name = f"{settings.implementation} {settings.chip}".strip()
    blocks = f"{settings.block} tokens{' or more' * (settings.implementation == 'mosaic_tpu')}"
    what = (
        f"{name}: {settings.heads} kv heads of {settings.channels} channels, "
        f"{settings.group} query heads each, {count(settings.batch, 'row')}, blocks of {blocks}; "
        f"median of 2 runs of {settings.rounds} calls"
    )
    known = None if args.checked is None else read_checked(args.checked)
    for more in attention.measure(settings, say, known):
        rows += more
        write(args, facts | {"rows": rows})
        if args.plot and report.timed(rows):
            report.plot(rows, f"{what}\n{environment()}", Path(args.plot))
    show([report.time_table(rows), report.bytes_table(rows), *report.notes(rows), what, environment()])
    return _code(rows)


def read_checked(path: str) -> list[attention.Row]:
    """The rows that --check wrote."""
    try:
        rows = json.loads(read_file(path, "checked"))["rows"]
        whole = all({"storage", "status"} <= row.keys() for row in rows)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"`checked={path}` is not what --check --json writes; make it so, or leave it out.")
    return rows


def run_headline(args: argparse.Namespace) -> int:
    figures = headline.measure(
        args.headline_model,
        args.headline_quant,
        args.headline_tokens,
        args.rounds or 30,
        args.headline_layers,
        args.block,
        say,
    )
    write(args, figures)
    show([*report.headline_lines(figures), environment()])
    return 0


def run_all(args: argparse.Namespace) -> int:
    """Must not touch a device: a process that does takes its memory from those started here."""
    options: list[str] = []
    for name in (
        "contexts",
        "batch",
        "rounds",
        "implementation",
        "chip",
        "heads",
        "group",
        "channels",
        "block",
        "layers",
    ):
        value = getattr(args, name)
        if value is not None:
            options += [f"--{name}", ",".join(map(str, value)) if name == "contexts" else str(value)]
    large = []
    for name in ("headline_model", "headline_tokens", "headline_quant", "headline_layers", "block"):
        if getattr(args, name) is not None:
            large += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    storages = list(dict.fromkeys([attention.BASE, *_storages(args)]))
    return session.run(
        __file__, options, storages, Path(args.out), 420.0 if args.seconds is None else args.seconds, large
    )


def write(args: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    """The figures so far, with all that is needed to repeat them."""
    if args.json:
        facts = {
            "command": " ".join(["python", "scripts/bench_decode.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "machine": machine(),
            "platform": jax.default_backend(),
            "versions": versions() | device.versions(),
        }
        Path(args.json).write_text(json.dumps(facts | dict(figures), indent=2) + "\n", encoding="utf-8")


def say(what: str) -> None:
    Console(stderr=True, highlight=False).print(what, style="dim", soft_wrap=True, markup=False)


def _storages(args: argparse.Namespace) -> tuple[str, ...]:
    names = tuple(dict.fromkeys((STORAGES if args.quant is None else args.quant).split(",")))
    for name in names:
        if name not in specs.TIMED:
            raise ValueError(f"`quant={name}` is not a storage; there are {', '.join(specs.TIMED)}.")
    return names


def _settings(args: argparse.Namespace) -> attention.Settings:
    contexts = tuple(args.contexts or CONTEXTS[jax.default_backend()])
    sizes = {name: getattr(args, name) for name in ("batch", "heads", "group", "channels", "layers", "seconds")}
    implementation = args.implementation or device.implementation()
    chip = device.chip() if args.chip is None else args.chip
    return attention.Settings(
        _storages(args), contexts, block=args.block or 128, rounds=args.rounds or 30, implementation=implementation,
        chip=chip, **sizes,
    )  # fmt: skip


def _positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"`{name}={value}` must be at least 1.")


def _errors(row: Mapping[str, Any]) -> str:
    return f"error {row['error']:.2g} (at most {row['bound']:.2g})" if "error" in row else ""


def _alive() -> bool:
    """Whether the device still computes: after a fault in a kernel it may not, and every later answer is worthless."""
    try:
        return float(jax.numpy.ones(8).sum()) == 8
    except Exception:
        return False


def _code(rows: list[attention.Row]) -> int:
    return (
        1 if any(row["status"] in ("wrong", "failed") and row.get("implementation") != "rival" for row in rows) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
