"""Measures compressed K/V caches: perplexity and divergence, passkey recall, all at once, KVQuant's ablation.

python scripts/evaluate.py compare --model tiny --text wikitext2-test.raw.txt --haystack moby-dick.txt --out compare
python scripts/evaluate.py perplexity --model tiny --quant kvquant4,kvquant3,kvquant2 --text wikitext2-test.raw.txt
python scripts/evaluate.py passkey --model tiny --quant bf16,kvquant3,kvquant2 --text moby-dick.txt
python scripts/evaluate.py ladder --model tiny --text wikitext2-test.raw.txt --calibration-text wikitext2-valid.txt
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import _compare
from _cli import Parser, check_targets, environment, integers, one_line_errors, presets, seed, show
from rich.table import Table

import kvjax
from kvjax.calibrate.text import self_sampled_tokens, tokens_from_file
from kvjax.evaluate import ladder, passkey, perplexity, report
from kvjax.evaluate.text import tokenize, windows

DEFAULT_CONTEXT = _compare.DEFAULT_CONTEXT


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    with one_line_errors():
        if args.run is _compare.run:
            return _compare.run(args, shlex.join(["python", "scripts/evaluate.py", *(argv or sys.argv[1:])]))
        check_targets(args, "json", *(["plot"] if "plot" in args else []))
        results, table, notes = args.run(args)
        if args.json:
            Path(args.json).write_text(json.dumps([r.to_json() for r in results], indent=2) + "\n", encoding="utf-8")
    show([table, *notes, environment()])
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="compare | perplexity | passkey | ladder")

    def command(name: str, run: Any, about: str) -> Parser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        sub.add_argument("--model", required=True, help='"tiny", a directory in Hugging Face layout, or a hub id')
        sub.add_argument("--dtype", help="of weights and activations (float32 on CPU, else the checkpoint's)")
        if run is not _compare.run:
            sub.add_argument("--json", metavar="FILE", help="write the rows there")
        return sub

    def text(sub: Parser, count: str = "all") -> None:
        sub.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to predict")
        sub.add_argument(
            "--join", default="auto", choices=("auto", "newline", "blank-line"),
            help="between lines: as they are, or a blank line, which raw WikiText without blank lines wants; "
            "auto: a blank line where the file has none",
        )  # fmt: skip
        sub.add_argument("--context", type=int, metavar="N",
                         help=f"tokens per window (at most {DEFAULT_CONTEXT} of the model's context)")  # fmt: skip
        sub.add_argument("--windows", type=int, metavar="N", help=f"only the first N windows ({count})")
        sub.add_argument("--batch", type=int, metavar="N", help="windows at a time; no result depends on it")

    def quant(sub: Parser) -> None:
        sub.add_argument("--quant", required=True, metavar="A,B,C", help="presets, commas between")
        sub.add_argument("--calibration-text", metavar="FILE", help="fit presets on this now (their calibration files)")

    sub = command("compare", _compare.run, "all presets by all measures: rows, tables and plots; resumable")
    text(sub, str(_compare.WINDOWS))
    _compare.add_arguments(sub)

    sub = command("perplexity", run_perplexity, "perplexity, KL and top-1 agreement against a bf16 cache")
    quant(sub)
    text(sub)
    sub.add_argument("--protocol", default="all", choices=("all", "decode"),
                     help="all: every K and V of the window compressed, as the papers measure; "
                     "decode: exact prefill, then real decode steps (%(default)s)")  # fmt: skip
    sub.add_argument("--prefill", type=int, metavar="N", help="decode: tokens prefilled (half of the window)")

    sub = command("passkey", run_passkey, "recall of a number hidden in a text")
    quant(sub)
    sub.add_argument("--text", metavar="FILE", help="haystack (the original task's filler)")
    sub.add_argument("--lengths", type=integers, nargs="+", metavar="N", default=[[256, 512, 1024]],
                     help="tokens of the prompts (256 512 1024)")  # fmt: skip
    sub.add_argument(
        "--depths", type=int, default=10, metavar="N", help="places of the number, evenly spread (%(default)s)"
    )
    sub.add_argument("--trials", type=int, default=5, metavar="N", help="prompts per length and depth (%(default)s)")
    sub.add_argument("--seed", type=seed, default=0, help="of numbers and pieces of text (%(default)s)")
    sub.add_argument("--plot", metavar="FILE", help="draw recall by length and depth (needs matplotlib)")

    sub = command("ladder", run_ladder, "KVQuant's parts, one after the other")
    text(sub)
    sub.add_argument("--bits", type=int, default=3, choices=(2, 3, 4), help="of the codes (%(default)s)")
    sub.add_argument("--calibration-text", metavar="FILE", help="to fit on; without it the model writes its own")
    sub.add_argument("--samples", type=int, default=16, metavar="N", help="calibration windows (%(default)s)")
    return parser.parse_args(argv)


def run_perplexity(args: argparse.Namespace) -> tuple[list, Table, list[str]]:
    names = presets(args.quant)
    _compare.check_calibration_text(args.calibration_text, names)
    model = kvjax.load(args.model, args.dtype)
    text, tokens = read_windows(args, model)
    first = perplexity.first_target(args.protocol, tokens.shape[1], args.prefill)
    policies = [_compare.policy(name, model, args.calibration_text) for name in names]
    results = perplexity.perplexity(
        model, policies, tokens, protocol=args.protocol, prefill=args.prefill, batch=args.batch
    )
    what = "every K and V compressed, the whole window predicted"
    if args.protocol == "decode":
        what = f"{first - 1} tokens prefilled exactly, predictions of the decode steps that follow"
    notes = [f"protocol {args.protocol}: {what}", describe_windows(text, tokens)]
    for policy in policies:
        notes += [f"{policy.name}: {line}" for line in perplexity.path_of(model, policy, args.protocol).splitlines()]
    if any(result.without_slot for result in results):
        notes.append("no slot: elements outside their range that found no outlier slot; they saturate")
    return results, report.perplexity_table(results, text), notes


def run_passkey(args: argparse.Namespace) -> tuple[list, Table, list[str]]:
    names = presets(args.quant)
    _compare.check_calibration_text(args.calibration_text, names)
    if args.plot:
        report.plotting(args.plot)
    model = kvjax.load(args.model, args.dtype)
    text = tokenize(model, args.text, "newline") if args.text else None
    lengths = [length for part in args.lengths for length in part]
    passkey.tasks_of(model, text.tokens if text else None, lengths, args.depths, args.trials)  # refuses, or is cheap
    policies = [_compare.policy(name, model, args.calibration_text) for name in names]
    results = passkey.passkey(
        model, policies, text.tokens if text else None,
        lengths=lengths, depths=args.depths, trials=args.trials, seed=args.seed,
    )  # fmt: skip
    if args.plot:
        report.plot_recall(results, args.plot)
    notes = [
        f"haystack {text.name if text else 'filler'}; {args.trials} prompts per length and depth, seed {args.seed}; "
        "columns: depth of the key, cells: how many were recalled"
    ]
    for policy in policies:
        notes += [f"{policy.name}: {line}" for line in perplexity.path_of(model, policy, "decode").splitlines()]
    return results, report.passkey_table(results), notes


def run_ladder(args: argparse.Namespace) -> tuple[list, Table, list[str]]:
    if args.calibration_text is not None:
        _compare.digest_of(args.calibration_text)  # told before the model is loaded where it cannot be read
    model = kvjax.load(args.model, args.dtype)
    text, tokens = read_windows(args, model)
    if args.samples < 1:
        raise ValueError(f"`samples={args.samples}` must be at least 1.")
    length = tokens.shape[1]
    if args.calibration_text is not None:
        calibration, source = tokens_from_file(model, args.calibration_text, args.samples, length)
    else:
        calibration, source = self_sampled_tokens(model, args.samples, length)
    rows = ladder.ladder(model, tokens, calibration, ladder.steps(args.bits), batch=args.batch)
    notes = [
        "protocol all: every K and V compressed, the whole window predicted; delta: perplexity less that of 'to'",
        describe_windows(text, tokens),
        f"fitted on {args.samples} windows of {length} tokens: {source}",
        "uncapped outliers: a slot for every channel, so the bits of that row are those of no usable method",
    ]
    return rows, report.ladder_table(rows, text), notes


def read_windows(args: argparse.Namespace, model: Any) -> tuple[Any, Any]:
    context = _compare.context_of(args, model)
    text = tokenize(model, args.text, args.join)
    return text, windows(text, context, args.windows)


def describe_windows(text: Any, tokens: Any) -> str:
    return f"{text.name} (lines joined by {text.join}): {tokens.shape[0]} windows of {tokens.shape[1]} tokens"


if __name__ == "__main__":
    sys.exit(main())
