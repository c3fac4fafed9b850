"""AsymKV's analysis: errors from keys and from values, its exhaustive search, and bits by measured sensitivity.

python scripts/allocate.py analyse --model tiny --text wikitext2-test.raw.txt --keys kivi2 --values kivi2
python scripts/allocate.py search --model tiny --text wikitext2-valid.txt --high 2 --low 1 --plot search.png
python scripts/allocate.py auto --model tiny --bits 2.5 --text wikitext2-valid.txt --out tiny-2.5.toml
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from _cli import Parser, check_targets, environment, one_line_errors, seed, show
from evaluate import describe_windows, read_windows
from rich.table import Table

import kvjax
from kvjax.analysis import report
from kvjax.analysis.asymmetry import asymmetry
from kvjax.analysis.search import Point, bits_of_options, search
from kvjax.calibrate import allocate, allocation_file
from kvjax.evaluate.report import plotting
from kvjax.policy import preset
from kvjax.presets import named

_SAVE_EVERY_S = 20.0
_WINDOWS = 8  # unless told


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    with one_line_errors():
        check_targets(args, "json", "plot", *(["out"] if "out" in args else []))
        if args.plot:
            plotting(args.plot)
        tables, notes = args.run(args)
    show([*tables, *notes, environment()])
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="analyse | search | auto")

    def command(name: str, run: Any, about: str) -> Parser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        sub.add_argument("--model", required=True, help='"tiny", a directory in Hugging Face layout, or a hub id')
        sub.add_argument("--dtype", help="of weights and activations (float32 on CPU, else the checkpoint's)")
        sub.add_argument("--json", metavar="FILE", help="write the numbers there")
        sub.add_argument("--plot", metavar="FILE", help="draw them there (needs matplotlib)")
        return sub

    def text(sub: Parser) -> None:
        sub.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
        sub.add_argument("--join", default="auto", choices=("auto", "newline", "blank-line"), help="between lines")
        sub.add_argument("--context", type=int, metavar="N", help="tokens per window (at most 1024)")
        sub.add_argument("--windows", type=int, metavar="N", help="only the first N windows (at most 8)")
        sub.add_argument("--batch", type=int, metavar="N", help="windows at a time; no result depends on it")

    sub = command("analyse", run_analyse, "how far each layer's attention is off from stored keys, and values, alone")
    text(sub)
    sub.add_argument("--keys", default="kivi2", metavar="QUANT", help="whose keys (%(default)s)")
    sub.add_argument("--values", default="kivi2", metavar="QUANT", help="whose values (%(default)s)")

    sub = command("search", run_search, "AsymKV's exhaustive search over (l_k, l_v)")
    text(sub)
    sub.add_argument("--high", type=int, default=2, metavar="B", help="bits of the first layers (%(default)s)")
    sub.add_argument("--low", type=int, default=1, metavar="B", help="bits of the others (%(default)s)")
    sub.add_argument("--suffix", default="", metavar="S", help="of the presets' names: g64, eta, twomean, g128-eta")
    sub.add_argument("--top", type=int, metavar="N", help="rows shown for each number of bits (all)")

    sub = command("auto", run_auto, "bits by layer for keys and values, by measured sensitivity")
    sub.add_argument("--bits", type=float, metavar="B", help="true bits per element, scales included")
    sub.add_argument("--quant", metavar="Q", help="in place of --bits: asymkv-auto@B with options, as -2/1@2.5-g64")
    sub.add_argument("--text", metavar="FILE", help="UTF-8 text to measure on; without it the model writes its own")
    sub.add_argument("--samples", type=int, metavar="N", help=f"windows of it ({allocate.SAMPLES})")
    sub.add_argument("--length", type=int, metavar="S", help=f"tokens of each ({allocate.LENGTH})")
    sub.add_argument("--seed", type=seed, default=0, help="of the windows or the sampled text (%(default)s)")
    sub.add_argument("--rounds", type=int, default=allocate.ROUNDS, metavar="N", help="of refinement (%(default)s)")
    sub.add_argument("--batch", type=int, metavar="N", help="windows at a time; no result depends on it")
    sub.add_argument("--out", metavar="FILE.toml", help="write a policy file, for --quant FILE.toml anywhere")
    return parser.parse_args(argv)


def run_analyse(args: argparse.Namespace) -> tuple[list[Table], list[str]]:
    for name in (args.keys, args.values):
        preset(name)  # an unknown one is told before the model is loaded
    model = kvjax.load(args.model, args.dtype)
    source, tokens = windows_of(args, model)
    keys, values = (kvjax.policy(name, model) for name in (args.keys, args.values))
    rows = asymmetry(model, keys, values, tokens)
    if args.json:
        write(args.json, {"keys": args.keys, "values": args.values, "layers": [row.to_json() for row in rows]})
    if args.plot:
        report.plot_errors(rows, args.plot)
    notes = [
        f"keys {args.keys}, values {args.values}; every layer on exact activations; errors are root mean squares "
        "relative to the exact thing; logits: spread over the tokens attended to; law: the variance law",
        "theorem, as printed: largest deviation of Theorem 1 with -E and with the printed +E from the true difference, "
        "relative to it, in float64",
        describe_windows(source, tokens),
    ]
    return [report.errors_table(rows)], notes


def run_search(args: argparse.Namespace) -> tuple[list[Table], list[str]]:
    if args.top is not None and args.top < 1:
        raise ValueError(f"`top={args.top}` must be at least 1.")
    suffix = f"-{args.suffix.lstrip('-')}" if args.suffix else ""
    preset(f"asymkv-{args.high}/{args.low}-0-0{suffix}")
    model = kvjax.load(args.model, args.dtype)
    source, tokens = windows_of(args, model)
    settings = {
        "model": model.fingerprint, "text": source.name, "join": source.join, "windows": list(tokens.shape),
        "first_tokens": tokens[0, :8].tolist(), "high": args.high, "low": args.low, "suffix": suffix,
    }  # fmt: skip
    known = read_points(args.json, settings) if args.json else []
    found, saved = list(known), time.monotonic()

    def keep(point: Point) -> None:
        nonlocal saved
        found.append(point)
        if args.json and time.monotonic() - saved > _SAVE_EVERY_S:
            write(args.json, {"settings": settings, "points": [p.to_json() for p in found]})
            saved = time.monotonic()

    points = search(
        model, tokens, high=args.high, low=args.low, suffix=suffix, known=known, on_point=keep, batch=args.batch
    )
    if args.json:
        write(args.json, {"settings": settings, "points": [p.to_json() for p in points]})
    if args.plot:
        report.plot_search(points, args.plot)
    notes = ["protocol all: every K and V compressed, the whole window predicted; KL to a bf16 cache; *: Pareto front"]
    if known:
        notes.append(f"{len(known)} points were in {args.json} and not measured again")
    return [report.search_table(points, args.top)], [*notes, describe_windows(source, tokens)]


def run_auto(args: argparse.Namespace) -> tuple[list[Table], list[str]]:
    if (args.bits is None) == (args.quant is None):
        raise ValueError("pass either `--bits`, as in --bits 2.5, or `--quant`, as in --quant asymkv-auto@2.5-g64.")
    name = f"asymkv-auto@{args.bits:g}" if args.quant is None else args.quant
    chosen = preset(name)
    model = kvjax.load(args.model, args.dtype)
    began = time.perf_counter()
    found = allocate.allocate(
        model, name, chosen, text=args.text, samples=args.samples, length=args.length, seed=args.seed,
        rounds=args.rounds, batch=args.batch,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if args.json:
        allocation_file.save(args.json, found)
    if args.out:
        Path(args.out).write_text(allocation_file.to_toml(found, chosen), encoding="utf-8")
    if args.plot:
        options = [named(option) for option in found.options]
        report.plot_allocation(found, bits_of_options(model, [(o.keys, o.values) for o in options]), args.plot)
    notes = [
        f"{name}: {found.bits_per_element:g} of {found.budget:g} true bits per element; KL {found.kl:.5f} nats "
        f"({found.kl_added_up:.5f} added up), {found.measurements} combinations measured jointly, {seconds:.0f} s",
        f"KL alone: one matrix stored, all others exact; {found.tokens} tokens: {found.source}",
    ]
    return [report.sensitivity_table(found), report.allocation_table(found)], notes


def windows_of(args: argparse.Namespace, model: Any) -> tuple[Any, Any]:
    source, tokens = read_windows(args, model)
    return source, tokens if args.windows else tokens[:_WINDOWS]


def read_points(path: str, settings: dict[str, Any]) -> list[Point]:
    """The points of an earlier run of the same search; none where there is no file."""
    if not Path(path).is_file():
        return []
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        same = content["settings"] == settings
        points = [Point(**point) for point in content["points"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"`json={path}` is no search to continue; name another file or delete it.") from None
    if not same:
        raise ValueError(f"`json={path}` is a search with other settings; name another file or delete it.")
    return points


def write(path: str, content: Any) -> None:
    """Whole or not at all: a search may be stopped at any moment."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
