"""What `scripts/plan.py` prints: plans as tables, JSON and a plot."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from kvjax.chips import GPU_FRACTION
from kvjax.evaluate import labels
from kvjax.evaluate.report import plotting
from kvjax.plan import PARTS, Plan
from kvjax.plan_search import Question

_NAMES = {"outliers": "outlier slots", "recent": "recent tokens", "tables": "tables, counters"}
_DEFAULT_GPU_FRACTION = 0.75  # what XLA's allocator takes unless told


@dataclasses.dataclass(frozen=True)
class Row:
    """A plan and what was searched around it; None in `break_even` for never."""

    plan: Plan
    largest_context: int
    break_even: int | None
    way_out: str


def parts_table(rows: Sequence[Row]) -> Table:
    """Bytes of one device by part, a column for each plan."""
    table = Table(box=None, pad_edge=False)
    table.add_column("GiB per device")
    for row in rows:
        table.add_column(row.plan.quant, justify="right")
    for part in PARTS:
        if any(row.plan.parts[part] for row in rows):
            table.add_row(_NAMES.get(part, part), *(gib(row.plan.parts[part]) for row in rows))
    table.add_section()
    table.add_row("needed", *(gib(row.plan.needed) for row in rows))
    table.add_row("usable", *(gib(row.plan.chip.memory) for row in rows))
    table.add_row("spare", *(gib(row.plan.spare) for row in rows))
    return table


def plans_table(rows: Sequence[Row]) -> Table:
    """A line for each plan: what it needs, how far it reaches, how fast it can be."""
    table = Table(box=None, pad_edge=False)
    columns = (
        "quant", "bits", "devices", "mesh", "fits", "cache GiB", "longest context", "less than bf16 from",
        "ms/token", "memory", "compute", "links", "all-reduces", "latency",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column in ("quant", "mesh", "fits") else "right", no_wrap=True)
    for row in rows:
        p, times = row.plan, row.plan.times()
        table.add_row(
            p.quant, f"{p.bits_per_element:.2f}", str(p.devices), mesh_text(p.mesh), "yes" if p.fits else "no",
            f"{p.nbytes / 2**30:,.1f}", f"{row.largest_context:,}", _break_even(row), f"{1e3 * times.total:.2f}",
            f"{1e3 * times.memory:.2f}", f"{1e3 * times.compute:.2f}", f"{1e3 * times.interconnect:.3f}",
            str(sum(count for count, _ in p.sent.values())), f"{1e3 * times.latency:.2f}",
        )  # fmt: skip
    return table


def _break_even(row: Row) -> str:
    if row.plan.quant == "bf16":
        return ""
    return "never" if row.break_even is None else f"{row.break_even:,}"


def notes(rows: Sequence[Row]) -> list[str]:
    """Lines below the tables: what does not fit and what would, paths without kernels, settings that it takes."""
    said = []
    for row in rows:
        p = row.plan
        if not p.fits:
            said.append(f"{p.quant} does not fit by {-p.spare / 2**30:.2f} GiB per device; what does: {row.way_out}.")
    for row in rows:
        slow = [line for line in row.plan.path.splitlines() if ": reference" in line]
        if slow and row.plan.chip.target != "reference":
            said.append(f"{row.plan.quant}: {'; '.join(slow)}")
    chip = rows[0].plan.chip
    limit = chip.memory * _DEFAULT_GPU_FRACTION / GPU_FRACTION
    if chip.target.startswith("gpu") and any(row.plan.fits and row.plan.needed > limit for row in rows):
        said.append(
            f"Set XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_FRACTION}: JAX takes {_DEFAULT_GPU_FRACTION} unless told."
        )
    said.append(
        "ms/token: the larger of memory and compute, plus links and latency, all at the data sheet's figures, so a "
        "lower bound; the latency of all-reduces is an estimate, and kernels bound by instructions take longer."
    )
    return said


def as_json(row: Row) -> dict[str, Any]:
    p, times = row.plan, row.plan.times()
    return {
        "quant": p.quant,
        "bits_per_element": p.bits_per_element,
        "devices": p.devices,
        "mesh": dict(p.mesh),
        "tokens": p.tokens,
        "batch": p.batch,
        "capacity": p.capacity,
        "parts_bytes": dict(p.parts),
        "needed_bytes": p.needed,
        "usable_bytes": p.chip.memory,
        "spare_bytes": p.spare,
        "fits": p.fits,
        "way_out": row.way_out,
        "cache_bytes": p.nbytes,
        "largest_context": row.largest_context,
        "break_even_tokens": row.break_even,
        "read_bytes": p.read,
        "flops": p.flops,
        "all_reduces": {axis: {"count": count, "bytes": size} for axis, (count, size) in p.sent.items()},
        "ms_per_token": {k: 1e3 * v for k, v in dataclasses.asdict(times).items()} | {"total": 1e3 * times.total},
        "path": p.path,
    }


def mesh_text(mesh: Mapping[str, int]) -> str:
    """ "seq=4,tensor=8"; axes of 1 are left out."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.2f}" if abs(nbytes) >= 1 << 25 or not nbytes else f"{nbytes / 2**30:.4f}"


def plot(path: Path, question: Question, rows: Sequence[Row], title: str) -> None:
    """Memory of a device against the context, a curve for each plan on its own mesh."""
    pyplot = plotting()
    tokens = rows[0].plan.tokens
    top = max([tokens, *(row.largest_context for row in rows)]) * 2
    contexts = np.unique(np.geomspace(min(4096, tokens), top, 60).astype(int))
    with pyplot.rc_context({"font.size": 9, "svg.hashsalt": "kvjax"}):
        figure, axis = pyplot.subplots(figsize=(9, 5.5))
        ends = []
        for row in rows:
            p = row.plan
            needed = [question.plan(p.quant, int(n), p.devices, p.mesh).needed / 2**30 for n in contexts]
            (line,) = axis.plot(contexts, needed, lw=1.4)
            ends.append((needed[-1], line.get_color(), f"{p.quant} ({row.largest_context:,} on {mesh_text(p.mesh)})"))
        usable = rows[0].plan.chip.memory / 2**30
        axis.axhline(usable, color="0.3", ls="--", lw=1)
        axis.text(contexts[0] * 1.1, usable * 1.05, f"usable: {usable:.2f} GiB", color="0.3")
        axis.axvline(tokens, color="0.6", ls=":", lw=1)
        axis.set(
            xscale="log", yscale="log", xlim=(contexts[0], contexts[-1]), title=title,
            xlabel="tokens in each row's cache; in brackets: the most that fit", ylabel="memory of one device, GiB",
        )  # fmt: skip
        axis.xaxis.set_major_formatter(lambda value, _: tokens_text(value))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.grid(True, color="0.92")
        heights = [axis.transData.transform((contexts[-1], end))[1] for end, _, _ in ends]
        for (end, colour, name), at, height in zip(ends, labels.spread(heights, 13 * figure.dpi / 72), heights):
            axis.annotate(
                name, (contexts[-1], end), (8, (at - height) * 72 / figure.dpi), textcoords="offset points",
                color=colour, va="center", annotation_clip=False,
            )  # fmt: skip
        figure.savefig(
            path, dpi=130, bbox_inches="tight", metadata={"Software": None} if path.suffix == ".png" else None
        )
        pyplot.close(figure)


def tokens_text(count: float) -> str:
    """A number of tokens, short: 10M, 128k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size and math.isclose(count / size, round(count / size, 2)):
            return f"{count / size:g}{unit}"
    return f"{count:,.0f}"
