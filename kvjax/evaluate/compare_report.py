"""What a comparison leaves behind: rows, as JSON, CSV, Markdown and a table for the terminal."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from kvjax.cache import CacheShape
from kvjax.evaluate.compare import PASSKEY, Outcome, Task
from kvjax.evaluate.memory import Footprint, footprint
from kvjax.evaluate.perplexity import REFERENCE
from kvjax.policy import preset

_STATISTICS = ("nll", "perplexity", "kl", "top1_agreement", "tokens", "without_slot", "seconds")
PROTOCOLS = ("all", "decode")


def rows(
    task: Task, names: Sequence[str], outcome: Outcome, shape: CacheShape, shape_name: str, tokens: int
) -> list[dict[str, Any]]:
    """One flat dict per preset, all with the same keys; what was not measured is None.

    `vs_bf16` is the relative increase in perplexity; `shape_*` are of a cache of `tokens` tokens at `shape`, and
    `passkey` is a list of `{length, depth, trials, correct, recall}`.
    """
    out = []
    for name in dict.fromkeys([REFERENCE, *names]):
        found = {part: outcome.records[name, part] for part in task.parts if (name, part) in outcome.records}
        measured = {part: record["result"] for part, record in found.items()}
        row: dict[str, Any] = {"quant": name}
        row["bits_per_element"] = next((r["bits_per_element"] for r in measured.values()), None)
        row["bits_read"] = measured.get("decode", {}).get("bits_read")
        cost = cost_of(name, shape, tokens)
        row |= {"shape": shape_name, "shape_tokens": tokens}
        if isinstance(cost, Footprint):
            row |= {"shape_bits_per_element": cost.bits_per_element, "shape_bytes": cost.nbytes, "shape_note": None}
        else:
            row |= {"shape_bits_per_element": None, "shape_bytes": None, "shape_note": cost}
        for protocol in PROTOCOLS:
            result = measured.get(protocol, {})
            row |= {f"{protocol}_{key}": result.get(key) for key in _STATISTICS}
            base = outcome.records.get((REFERENCE, protocol))
            row[f"{protocol}_vs_bf16"] = (
                result["perplexity"] / base["result"]["perplexity"] - 1 if result and base else None
            )
        cells = [cell for part, result in measured.items() if part.startswith(PASSKEY) for cell in result["cells"]]
        row["passkey"] = cells
        row["passkey_recall"] = float(np.mean([cell["recall"] for cell in cells])) if cells else None
        row["seconds"] = round(sum(record["seconds"] for record in found.values()), 3) if found else None
        row["error"] = outcome.errors.get(name)
        out.append(row)
    return out


def cost_of(name: str, shape: CacheShape, tokens: int) -> Footprint | str:
    """A preset's footprint at a shape, or why it has none."""
    try:
        return footprint(name, preset(name), shape, tokens)
    except (ValueError, NotImplementedError, OSError) as error:
        return " ".join(str(error).split())


def to_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows, with one column of recall for each passkey length and depth; empty for what was not measured."""
    cells = list(dict.fromkeys((cell["length"], cell["depth"]) for row in table for cell in row["passkey"]))
    plain = [key for key in table[0] if key != "passkey"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *(f"passkey_{length}_{depth:g}" for length, depth in cells)])
    for row in table:
        recall = {(cell["length"], cell["depth"]): cell["recall"] for cell in row["passkey"]}
        writer.writerow([*("" if row[key] is None else row[key] for key in plain), *(recall.get(c, "") for c in cells)])
    return text.getvalue()


def columns(table: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Heading to cells, as shown: columns that no row has are left out."""
    lengths = list(dict.fromkeys(cell["length"] for row in table for cell in row["passkey"]))
    shown: dict[str, list[str]] = {"quant": [row["quant"] for row in table]}

    def column(heading: str, key: str, form: str) -> None:
        if any(row[key] is not None for row in table):
            shown[heading] = ["" if row[key] is None else form.format(row[key]) for row in table]

    column("bits/element", "bits_per_element", "{:.3f}")
    column("read", "bits_read", "{:.3f}")
    first = table[0]
    at = f"{first['shape']}, {first['shape_tokens']:,}"
    shown[f"bits at {at}"] = [_or_na(row["shape_bits_per_element"], "{:.3f}") for row in table]
    shown["GiB"] = [_or_na(row["shape_bytes"] and row["shape_bytes"] / 2**30, "{:.2f}") for row in table]
    for protocol in PROTOCOLS:
        column(f"perplexity ({protocol})", f"{protocol}_perplexity", "{:.3f}")
        for heading, key, form in (("vs bf16", "vs_bf16", "{:+.2%}"), ("KL", "kl", "{:.5f}"),
                                   ("top-1", "top1_agreement", "{:.2%}")):  # fmt: skip
            column(f"{heading} ({protocol})", f"{protocol}_{key}", form)
    for length in lengths:
        shown[f"passkey {length}"] = [_recalled(row, length) for row in table]
    column("seconds", "seconds", "{:.1f}")
    if any(row["error"] for row in table):
        shown["error"] = ["failed, see below" if row["error"] else "" for row in table]
    return shown


def _or_na(value: float | None, form: str) -> str:
    return "n/a" if value is None else form.format(value)


def _recalled(row: Mapping[str, Any], length: int) -> str:
    cells = [cell for cell in row["passkey"] if cell["length"] == length]
    return f"{sum(c['correct'] for c in cells)}/{sum(c['trials'] for c in cells)}" if cells else ""


def passkey_columns(table: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Prompts recalled by preset and length, a column for each depth; empty without passkey."""
    depths = list(dict.fromkeys(cell["depth"] for row in table for cell in row["passkey"]))
    lines = list(dict.fromkeys((row["quant"], cell["length"]) for row in table for cell in row["passkey"]))
    found = {
        (row["quant"], cell["length"], cell["depth"]): f"{cell['correct']}/{cell['trials']}"
        for row in table
        for cell in row["passkey"]
    }
    if not lines:
        return {}
    return {"quant": [quant for quant, _ in lines], "length": [str(length) for _, length in lines]} | {
        f"{depth:.1%}": [found.get((*line, depth), "") for line in lines] for depth in depths
    }


def to_table(shown: Mapping[str, Sequence[str]]) -> Table:
    """For the terminal; headings break at blanks, numbers never."""
    table = Table(box=None, pad_edge=False)
    for heading, cells in shown.items():
        words = [*heading.split(), *cells]
        table.add_column(heading, justify="left" if heading == "quant" else "right", min_width=max(map(len, words)))
    for cells in zip(*shown.values()):
        table.add_row(*cells)
    return table


def to_markdown(shown: Mapping[str, Sequence[str]]) -> str:
    lines = [list(shown), ["---"] * len(shown), *map(list, zip(*shown.values()))]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def remarks(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table's cells cannot hold: failures, shapes that do not fit, saturated outliers."""
    notes = [f"{row['quant']} failed: {row['error']}" for row in table if row["error"]]
    notes += [f"{row['quant']} at {row['shape']}: n/a, {row['shape_note']}" for row in table if row["shape_note"]]
    shares = [(row["quant"], row["all_without_slot"]) for row in table if row["all_without_slot"]]
    if shares:
        listed = ", ".join(f"{quant} {share:.3%}" for quant, share in shares)
        notes.append(f"elements outside their range without an outlier slot (first window; they saturate): {listed}")
    return notes


def paths(outcome: Outcome) -> list[str]:
    """The path that each protocol took, with the presets that took it."""
    taken: dict[tuple[str, str], list[str]] = {}
    for (name, part), record in outcome.records.items():
        kind = "all" if part == "all" else "decode and passkey"
        for line in record["path"]:
            presets = taken.setdefault((kind, line), [])
            if name not in presets:
                presets.append(name)
    return [f"{kind}: {line}: {', '.join(presets)}" for (kind, line), presets in taken.items()]
