"""Prefills a long context over many devices, decodes a few tokens, and measures memory against the prediction.

python scripts/long_context.py --text moby-dick.txt --tokens 1Mi --mesh seq=8

glibc keeps what is freed: MALLOC_MMAP_THRESHOLD_=65536 in the environment makes the process as large as what it holds.
"""

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
from _cli import Parser, check_targets, environment, one_line_errors, tokens, versions
from rich.console import Console
from rich.table import Table

import kvjax
from kvjax import distributed, sharding
from kvjax.evaluate import long_context, progress
from kvjax.evaluate.long_context import RANDOM, Settings
from kvjax.evaluate.text import tokenize
from kvjax.policy import preset


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="random",
        help=f'"random" ({RANDOM.layers} layer, {RANDOM.q_heads} head of {RANDOM.head_dim} channels), "tiny", a '
        "directory in Hugging Face layout, or a hub id",
    )
    parser.add_argument("--quant", default="kvquant3", help="preset (%(default)s)")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text, repeated to the wanted length")
    parser.add_argument("--tokens", type=tokens, default=1 << 20, metavar="N", help="of context: 128k, 1M, 1Mi (1Mi)")
    parser.add_argument("--mesh", default="seq=8", help="devices, such as seq=4,tensor=2 (%(default)s)")
    parser.add_argument("--chunk", type=tokens, default=16384, metavar="N", help="tokens of a call (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="decode steps (%(default)s)")
    parser.add_argument("--attention", choices=("exact", "cached"), default="exact", help="of prefill (%(default)s)")
    parser.add_argument(
        "--prefill-window", type=tokens, metavar="N", help="in prefill, attend to the newest N tokens only: linear time"
    )
    parser.add_argument(
        "--compare-at", type=tokens, default=[], nargs="*", metavar="N", help="contexts to compare temporaries with"
    )
    parser.add_argument("--check", action="store_true", help="compare a step with float64 attention over the cache")
    parser.add_argument("--one-device", action="store_true", help="do it again on one device, and compare logits")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    args = parser.parse_args(argv)
    with one_line_errors():
        check_targets(args, "json")
        report = run(args, Console(stderr=True, highlight=False))
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    preset(args.quant)  # a misspelt preset is told before the model is loaded
    settings = Settings(
        args.quant, args.tokens, min(args.chunk, args.tokens), args.max_new_tokens, args.attention,
        args.prefill_window, tuple(args.compare_at),
    )  # fmt: skip
    mesh = make_mesh(args.mesh)
    with console.status("loading the model"):
        model = (
            long_context.random_model(args.tokens, mesh)
            if args.model == "random"
            else kvjax.load(args.model, mesh=mesh)
        )
        text = tokenize(model, args.text).tokens
    if not len(text):
        raise ValueError(f"`text={args.text}` is empty; pass a text of at least one token.")
    console.print(f"{len(text):,} tokens of text, read {args.tokens / len(text):.1f} times")
    with Bar(args.tokens, console) as bar:
        facts = long_context.measure(model, text, settings, mesh, args.check, args.one_device, console.print, bar.track)
    report = {"model": args.model, "text": Path(args.text).name, **facts, "command": shlex.join(sys.argv)}
    show(report, Console(highlight=False))
    return report | {"environment": environment(), "versions": versions()}


def make_mesh(text: str) -> jax.sharding.Mesh | None:
    """The mesh; None for a single device. Where there are only CPUs, they become as many devices as it takes."""
    devices = math.prod(sharding.parse_mesh(text).values())
    distributed.set_cpu_devices(devices)
    return sharding.make_mesh(text) if devices > 1 else None


class Bar:
    """Progress of prefill, whose calls take longer as the context grows; lines where stderr is no terminal."""

    def __init__(self, total: int, console: Console):
        self._console, self._total = console, total
        self._calls: list[tuple[int, float]] = [(0, 0.0)]
        self._told = 0.0
        self._bar = progress.growing_bar(console.is_terminal)
        self._row = self._bar.add_task("prefill", total=total, speed="", left="")

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def track(self, done: int, seconds: float) -> None:
        before, then = self._calls[-1]
        self._calls.append((done, seconds))
        speed = f"{(done - before) / (seconds - then):,.0f} tokens/s"
        left = progress.clock(progress.seconds_left(self._calls, self._total))
        self._bar.update(self._row, completed=done, speed=speed, left=left)
        if not self._console.is_terminal and (time.monotonic() - self._told > 30 or done == self._total):
            self._told = time.monotonic()
            self._console.print(f"{done:,} tokens in {progress.clock(seconds)}, {speed}, left {left}")


def show(report: dict[str, Any], console: Console) -> None:
    memory, compiled = report["memory"], report["compiled_per_device"]
    predicted, devices = memory["predicted"], report["devices"]
    rows = {
        "preset": f"{report['quant']}: {report['bits_per_element']:.2f} bits per element, as stored",
        "path": report["path"],
        "cache": f"{mib(report['cache_bytes'])}, {mib(report['cache_bytes_per_device'])} on each of {devices} devices "
        f"(bf16: {mib(report['bf16_bytes'])} in all)",
        "prefill": f"{report['tokens']:,} tokens in {report['prefill_seconds']:.1f} s, "
        f"{report['prefill_tokens_per_s']:,.0f} tokens/s",
        "decode": f"{report['decode_ms_per_step']:.1f} ms per step, {report['decode_tokens_per_s']:.1f} tokens/s",
        "memory grew by": f"{mib(memory['growth'])} from {mib(memory['before'])}, peak of the process "
        f"{mib(memory['peak_of_process'])}",
        "predicted": f"{mib(predicted['sum_over_devices'])} = {devices} x ({mib(predicted['cache'])} of cache + "
        f"{mib(predicted['temporaries'])} of temporaries)",
    }
    for context, functions in compiled.items():
        parts = (f"{name} {mib(b['temporary'])}" for name, b in functions.items())
        rows[f"temporaries at {int(context):,}"] = ", ".join(parts) + " on each device"
    if again := report.get("one_device"):
        rows["against one device"] = f"logits off by {again['logits']:.1e} of {again['largest_logit']:.1f}"
    if check := report.get("check"):
        rows["against float64"] = (
            f"attention off by {max(check['outputs']):.1e} of its largest, logits by {check['logits']:.1e} of "
            f"{check['largest_logit']:.1f}, {'the same' if check['same_token'] else 'ANOTHER'} token"
        )
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
