"""Tables and plots of `bench.attention`'s rows, and the words for `bench.headline`'s figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from kvjax.evaluate import labels
from kvjax.evaluate.compare import family
from kvjax.evaluate.compare_plots import COLOURS
from kvjax.evaluate.report import plotting

Rows = Sequence[Mapping[str, Any]]
_STYLES = ("-", "--", "-.", ":")


def timed(rows: Rows) -> list[Mapping[str, Any]]:
    return [row for row in rows if "us" in row]


def time_table(rows: Rows) -> Table:
    """A line for each storage and context, with its speed-up over every reference that was timed beside it."""
    rows = sorted(timed(rows), key=lambda row: row["context"])
    against = list(dict.fromkeys(name for row in rows for name in row["speedup"]))
    table = Table(box=None, pad_edge=False)
    columns = ("tokens", "storage", "us", "spread", "MiB", "GB/s", "of read")
    for column in (*columns, *(f"x {name}" for name in against), "error", "of"):
        table.add_column(column, justify="left" if column == "storage" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['context']:,}", row["storage"], f"{row['us']:,.1f}", f"{row['spread']:.1%}",
            f"{row['total_bytes'] / 2**20:,.2f}", f"{row['gb_per_s']:,.1f}", f"{row['share_of_read']:.0%}",
            *(f"{row['speedup'][name]:.2f}" if name in row["speedup"] else "-" for name in against),
            *(f"{row[name]:.1e}" if name in row else "" for name in ("error", "bound")),
        )  # fmt: skip
    return table


def bytes_table(rows: Rows) -> Table:
    """MiB of each part that a step moves, at the largest context of each storage."""
    largest = {row["storage"]: row for row in sorted(timed(rows), key=lambda row: row["context"]) if "bytes" in row}
    parts = list(dict.fromkeys(part for row in largest.values() for part in row["bytes"]))
    table = Table(box=None, pad_edge=False)
    for column in ("MiB per step", "tokens", *parts, "sum", "bits per element"):
        table.add_column(column, justify="left" if column == "MiB per step" else "right", no_wrap=True)
    for name, row in largest.items():
        stored = sum(row["bytes"][part] for part in parts if part not in ("query", "outputs"))
        tokens = -(-row["context"] // row["block"]) * row["block"]
        elements = 2 * row["batch"] * tokens * row["heads"] * row["channels"]
        figures = (*(row["bytes"][part] for part in parts), row["total_bytes"])
        cells = (f"{x / 2**20:,.3f}" for x in figures)
        table.add_row(name, f"{row['context']:,}", *cells, f"{8 * stored / elements:.3f}")
    return table


def notes(rows: Rows) -> list[str]:
    """Ceilings of each context, and why a storage has no time."""
    said = []
    for context in sorted({row["context"] for row in timed(rows)}):
        row = next(row for row in timed(rows) if row["context"] == context)
        said.append(
            f"{context:,} tokens: ceilings {row['read_gb_per_s']:,.1f} GB/s read, {row['copy_gb_per_s']:,.1f} copied; "
            f"a step of the loop without attention {row['empty_step_us']:,.1f} us"
        )
    for row in rows:
        if row["status"] != "ok":
            where = f" at {row['context']:,} tokens" if "context" in row else ""
            said.append(f"{row['storage']}{where}: {row['status']}: {row['reason']}")
    return said


def headline_lines(figures: Mapping[str, Any]) -> list[str]:
    gib = {name: figures[name] / 2**30 for name in figures if name.endswith("_bytes") and figures[name] is not None}
    peak = f"peak {gib['peak_bytes']:.2f}" if "peak_bytes" in gib else "peak not told by this device"
    return [
        f"{figures['model']} ({figures['layers']} layers), {figures['quant']}, one row of {figures['tokens']:,} tokens",
        f"{figures['ms_per_token']:.2f} ms per token (median of {figures['rounds']}, {figures['ms_fastest']:.2f} to "
        f"{figures['ms_slowest']:.2f}; one of them seals a block); first step {figures['first_step_s']:.1f} s",
        f"{figures['read_gb_per_step']:.1f} GB of weights and cache per step, {figures['gb_per_s']:,.1f} GB/s, "
        f"{figures['share_of_read']:.0%} of the read ceiling of {figures['ceiling_gb_per_s']:,.1f} GB/s",
        f"memory in GiB: {peak} of {gib['memory_limit_bytes']:.2f}; cache {gib['cache_bytes']:.2f} "
        f"({figures['bits_per_element']:.2f} bits per element; bf16 {gib['bf16_cache_bytes']:.2f}), "
        f"weights {gib['weight_bytes']:.2f}; compiled step: arguments {gib['argument_bytes']:.2f}, "
        f"temporaries {gib['temporary_bytes']:.3f}",
        figures["path"],
    ]


def plot(rows: Rows, title: str, path: Path) -> None:
    """Time, speed-up over bf16 and share of the read ceiling against context, a line for each storage."""
    rows = timed(rows)
    if not rows:
        raise ValueError(f"`plot={path}`: nothing was timed, so there is nothing to draw.")
    pyplot = plotting()
    names = list(dict.fromkeys(row["storage"] for row in rows))
    looks = _looks(names, rows)
    panels = (
        ("time of a layer's attention, us", lambda row: row["us"], True),
        ("speed-up over our bf16", lambda row: row["speedup"].get("bf16"), False),
        ("share of the read ceiling, %", lambda row: 100 * row["share_of_read"], False),
    )
    with pyplot.rc_context({"svg.hashsalt": "kvjax", "font.size": 9}):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(16, max(5.0, 0.24 * len(names) + 1.5)))
        figure.suptitle(title, fontsize=9)
        figure.tight_layout(rect=(0, 0, 0.98, 1), w_pad=12)  # room for the names at the right of each panel
        for axis, (label, value, logarithmic) in zip(axes, panels):
            _panel(axis, rows, looks, value, logarithmic)
            axis.set(xlabel="tokens", ylabel=label)
        figure.savefig(path, dpi=150, bbox_inches="tight")
        pyplot.close(figure)


def _looks(names: Sequence[str], rows: Rows) -> dict[str, dict[str, Any]]:
    """Colour by method, line by its order within the method; what is not ours is black."""
    ours = {row["storage"] for row in rows if row["implementation"] != "rival"}
    looks: dict[str, dict[str, Any]] = {}
    for name in names:
        group = family(name) if name in ours else ""
        fellows = sum(look["group"] == group for look in looks.values())
        tint = COLOURS.get(group, "#17becf") if name in ours else "#000000"
        looks[name] = {"group": group, "color": tint, "ls": _STYLES[fellows % 4], "marker": "os^D"[fellows // 4 % 4]}
    return looks


def _panel(axis: Any, rows: Rows, looks: Mapping[str, Mapping[str, Any]], value: Any, logarithmic: bool) -> None:
    """One panel, every line named at its right end."""
    ends = {}
    for name, look in looks.items():
        points = [(row["context"], value(row)) for row in rows if row["storage"] == name and value(row) is not None]
        if points:
            style = {key: look[key] for key in ("color", "ls", "marker")}
            axis.plot(*zip(*sorted(points)), ms=3, lw=1.2, **style)
            ends[name] = max(points)
    axis.set(xscale="log", yscale="log" if logarithmic else "linear")
    if not logarithmic:
        axis.set_ylim(bottom=0)
    contexts = sorted({row["context"] for row in rows})
    axis.set_xticks(contexts, [_tokens(n) for n in contexts])
    axis.minorticks_off()
    if logarithmic:
        axis.yaxis.set_major_locator(plotting().matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda number, _: f"{number:,g}")
    axis.grid(True, color="0.92")
    heights = [axis.transData.transform(end)[1] for end in ends.values()]
    dots = axis.figure.dpi / 72
    for (name, end), at, place in zip(ends.items(), heights, labels.spread(heights, 10 * dots)):
        tint = looks[name]["color"]
        axis.annotate(
            name, end, (28, (place - at) / dots), textcoords="offset points", fontsize=8, color=tint, va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": tint, "lw": 0.5, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)},
        )  # fmt: skip


def _tokens(count: int) -> str:
    """4096 as 4K, 1048576 as 1M, 100003 as 100,003."""
    for shift, unit in ((20, "M"), (10, "K")):
        if count >= 1 << shift and count % (1 << shift) == 0:
            return f"{count >> shift}{unit}"
    return f"{count:,}"
