"""The `compare` command of scripts/evaluate.py: all presets by all measures, resumable."""

import argparse
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from _cli import count, environment, integers, presets, seed, show
from rich.console import Console

import kvjax
from kvjax.evaluate import compare_report as report
from kvjax.evaluate.compare import Outcome, Task, compare, default_presets
from kvjax.evaluate.journal import Journal
from kvjax.evaluate.memory import SHAPES, cache_shape
from kvjax.evaluate.report import plotting
from kvjax.evaluate.text import tokenize, windows
from kvjax.policy import preset

DEFAULT_CONTEXT = 1024
WINDOWS, DECODE_WINDOWS = 32, 8


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """All but what every command has (model, dtype), and the text's."""
    sub.add_argument("--quant", metavar="A,B,C", help="presets, commas between (all built-in but those with Q-Norm)")
    sub.add_argument("--out", required=True, metavar="DIR", help="results; the same command goes on where it stopped")
    sub.add_argument("--calibration-text", metavar="FILE", help="fit presets on this now (their calibration files)")
    sub.add_argument("--protocols", default="all,decode", metavar="P", help="of perplexity (%(default)s)")
    sub.add_argument("--decode-windows", type=int, metavar="N",
                     help=f"the first N windows by protocol decode, which takes longer ({DECODE_WINDOWS})")  # fmt: skip
    sub.add_argument("--prefill", type=int, metavar="N", help="decode: tokens prefilled (half of the window)")
    sub.add_argument("--haystack", metavar="FILE", help="of passkey (the original task's filler)")
    sub.add_argument("--lengths", type=integers, nargs="+", metavar="N", default=[[256, 512, 1024]],
                     help="tokens of passkey prompts (256 512 1024)")  # fmt: skip
    sub.add_argument("--no-passkey", action="store_true", help="perplexity only")
    sub.add_argument("--depths", type=int, default=10, metavar="N", help="places of the number (%(default)s)")
    sub.add_argument("--trials", type=int, default=5, metavar="N", help="prompts per length and depth (%(default)s)")
    sub.add_argument("--seed", type=seed, default=0, help="of numbers and pieces of text (%(default)s)")
    sub.add_argument("--shape", default="llama-7b", metavar="S",
                     help=f"whose cache bytes are counted: {', '.join(SHAPES)}, or layers x kv heads x head size as in "
                     "32x8x128 (%(default)s)")  # fmt: skip
    sub.add_argument("--tokens", type=int, default=131072, metavar="N", help="in that cache (%(default)s)")


def run(args: argparse.Namespace, command: str) -> int:
    """Measures what is missing, then writes and prints everything; 1 where a preset failed."""
    names = default_presets() if args.quant is None else presets(args.quant)
    shape = cache_shape(args.shape)
    if args.tokens < 1:
        raise ValueError(f"`tokens={args.tokens}` must be at least 1.")
    out = writable(args.out)
    calibration = check_calibration_text(args.calibration_text, names)
    try:
        plotting()
        can_plot = True
    except ValueError:
        can_plot = False
    model = kvjax.load(args.model, args.dtype)
    task, caption = make_task(args, model)
    if not can_plot:
        tell("plots need matplotlib, which is missing: all else is written; pip install 'kvjax[plots]'")
    journal = Journal(out / "results.jsonl")
    for note in journal.notes:
        tell(note)
    try:
        outcome = compare(
            task, names, lambda name: policy(name, model, args.calibration_text), journal,
            calibration=calibration, on_start=tell,
        )  # fmt: skip
    except KeyboardInterrupt:
        tell(f"interrupted: what is finished is in {journal.path}; the same command goes on from there")
        return 130
    rows = report.rows(task, names, outcome, shape, args.shape, args.tokens)
    notes = [*caption, *report.remarks(rows), *report.paths(outcome), environment()]
    write(out, rows, notes, command)
    plots = []
    if can_plot:
        from kvjax.evaluate.compare_plots import plot_all  # with matplotlib, which is optional

        plots = plot_all(rows, shape, out)
    parts: list[Any] = [report.to_table(report.columns(rows)), ""]
    if depths := report.passkey_columns(rows):
        parts += ["passkeys recalled, by depth", report.to_table(depths), ""]
    show([*parts, *notes, *summary(outcome, journal, plots)])
    return 1 if outcome.errors else 0


def tell(line: str) -> None:
    """Something to know before the report."""
    Console(stderr=True, highlight=False).print(line, style="dim", soft_wrap=True, markup=False)


def make_task(args: argparse.Namespace, model: Any) -> tuple[Task, list[str]]:
    """What is to be measured, checked, and what a report must say of it."""
    protocols = [part.strip() for part in args.protocols.split(",") if part.strip()]
    if unknown := [part for part in protocols if part not in report.PROTOCOLS]:
        raise ValueError(f"`protocols={args.protocols}`: {unknown[0]!r} is none; name all, decode or both.")
    context = context_of(args, model)
    text = tokenize(model, args.text, args.join)
    available = len(windows(text, context))
    counts = {
        "all": min(WINDOWS, available) if args.windows is None else args.windows,
        "decode": min(DECODE_WINDOWS, available) if args.decode_windows is None else args.decode_windows,
    }
    haystack = tokenize(model, args.haystack, "newline", "haystack") if args.haystack else None
    task = Task(
        model,
        {protocol: windows(text, context, counts[protocol]) for protocol in report.PROTOCOLS if protocol in protocols},
        prefill=args.prefill,
        batch=args.batch,
        lengths=() if args.no_passkey else tuple(dict.fromkeys(n for part in args.lengths for n in part)),
        haystack=haystack.tokens if haystack else None,
        depths=args.depths,
        trials=args.trials,
        seed=args.seed,
    )
    parts = task.parts  # refuses settings that make no evaluation
    source = f"of {context} tokens of {text.name} (lines joined by {text.join})"
    caption = []
    if "all" in parts:
        read = f"protocol all: {count(counts['all'], 'window')} {source}"
        caption.append(f"{read}; every K and V compressed, the whole window predicted")
    if "decode" in parts:
        read = f"protocol decode: {count(counts['decode'], 'window')} {source}"
        ahead = f"{parts['decode']['prefill']} tokens prefilled exactly"
        caption.append(f"{read}; {ahead}, predictions of the decode steps that follow")
    if task.lengths:
        prompts = f"{count(args.depths, 'depth')}, {count(args.trials, 'prompt')} each, seed {args.seed}"
        hay = haystack.name if haystack else "filler"
        caption.append(f"passkey: in {hay}, {prompts}; greedy, through prefill and decode steps")
    fitted = f"on {Path(args.calibration_text).name}" if args.calibration_text else "in their calibration files"
    return task, [
        *caption,
        "bits/element: of sealed blocks as allocated for this model; vs bf16: perplexity; KL: nats per token; "
        f"GiB: whole cache of one row of {args.tokens:,} tokens at {args.shape}; seconds: compilation included",
        f"model {args.model} ({model.dtype}); presets with constants fitted {fitted}",
    ]


def context_of(args: argparse.Namespace, model: Any) -> int:
    """Tokens per window; refuses those, and batches, that cannot be."""
    context = min(DEFAULT_CONTEXT, model.config.max_positions) if args.context is None else args.context
    if context > model.config.max_positions:
        raise ValueError(
            f"`context={context}` is beyond the model's {model.config.max_positions} positions; use at most those."
        )
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"`batch={args.batch}` must be at least 1.")
    return context


def writable(path: str) -> Path:
    """The directory, made if need be; one that cannot be written to is told before the work."""
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"`out={path}` is a file; name a directory.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"`out={path}` cannot be written to ({error.strerror}); name another directory.") from None
    return folder


def check_calibration_text(path: str | None, names: list[str]) -> str | None:
    """The digest of --calibration-text; refuses one that cannot be read, or that the only preset has no use for."""
    if path is None:
        return None
    if len(names) == 1 and not preset(names[0]).is_fitted:
        raise ValueError(f"`calibration-text={path}`: `quant={names[0]}` needs no calibration; leave it out.")
    return digest_of(path)


def policy(name: str, model: Any, calibration_text: str | None) -> kvjax.Policy:
    """A preset for the model, fitted to the text if it is one of those that are fitted."""
    return kvjax.policy(name, model, text=calibration_text if preset(name).is_fitted else None)


def digest_of(path: str) -> str:
    """Names the contents of a calibration text."""
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise OSError(f"`calibration-text={path}` cannot be read ({error.strerror}); pass a UTF-8 text file.") from None


def write(out: Path, rows: list[dict[str, Any]], notes: list[str], command: str) -> None:
    """compare.json, compare.csv and compare.md; each is replaced whole."""
    tables = [report.to_markdown(report.columns(rows))]
    if depths := report.passkey_columns(rows):
        tables.append("Passkeys recalled, by depth:\n\n" + report.to_markdown(depths))
    listed = "".join(f"- {note}\n" for note in notes)
    for name, content in (
        ("compare.json", json.dumps(rows, indent=2) + "\n"),
        ("compare.csv", report.to_csv(rows)),
        ("compare.md", "\n".join([*tables, f"`{command}`\n", listed])),
    ):
        part = out / f".{name}.part"
        part.write_text(content, encoding="utf-8")
        os.replace(part, out / name)


def summary(outcome: Outcome, journal: Journal, plots: list[Path]) -> list[str]:
    """How the run went."""
    files = ["results.jsonl", "compare.json", "compare.csv", "compare.md", *(plot.name for plot in plots)]
    lines = [f"{count(len(outcome.records), 'result')}, {outcome.skipped} of them from an earlier run"]
    lines.append(f"in {journal.path.parent}: {', '.join(files)}")
    if outcome.others:
        lines.append(f"{count(outcome.others, 'result')} of other settings or presets in {journal.path.name} left out")
    if outcome.errors:
        lines.append(
            f"{count(len(outcome.errors), 'preset')} failed: {', '.join(outcome.errors)}; the same command tries again"
        )
    return lines
