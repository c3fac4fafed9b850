"""Plots of a comparison: quality against true bits, memory against context, recall by length and depth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.cache import CacheShape
from kvjax.evaluate import labels
from kvjax.evaluate.compare import family
from kvjax.evaluate.compare_report import PROTOCOLS, cost_of
from kvjax.evaluate.memory import Footprint
from kvjax.evaluate.report import plotting

CONTEXTS = (*(4096 << i for i in range(12)), 10_000_000)  # tokens: 4K to 8M, and 10M
DEVICE_BYTES = 80 << 30  # what is sold as 80 GB
_UNCOMPRESSED = "uncompressed"

COLOURS = {
    "kvquant": "#1f77b4", "kivi": "#ff7f0e", "asymkv": "#d62728", "alignedkv": "#2ca02c", "int": "#9467bd",
    "nf": "#e377c2", "fp": "#8c564b", "atom": "#17a2b8", "flexgen": "#b8860b", "pair": "#000000", _UNCOMPRESSED: "0.45",
}  # fmt: skip

Rows = Sequence[Mapping[str, Any]]


def plot_all(rows: Rows, shape: CacheShape, folder: Path) -> list[Path]:
    """Writes quality, memory and passkey as PNG and SVG, where the rows hold them; the files that were written."""
    pyplot, written = plotting(), []
    # The same rows make the same bytes: no date, no random ids.
    with pyplot.rc_context({"svg.hashsalt": "kvjax", "font.size": 9}):
        for name, figure in (("quality", quality(rows)), ("memory", memory(rows, shape)), ("passkey", passkey(rows))):
            if figure is None:
                continue
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                written.append(folder / f"{name}.{suffix}")
                figure.savefig(written[-1], dpi=150, metadata=metadata, bbox_inches="tight")
            pyplot.close(figure)
    return written


def quality(rows: Rows) -> Any:
    """Increase in perplexity and KL against true bits, a row of panels for each protocol; None without either."""
    protocols = [p for p in PROTOCOLS if any(row[f"{p}_kl"] is not None for row in _compressed(rows))]
    if not protocols:
        return None
    pyplot, colour = plotting(), _colours(rows)
    height = 5.0 * len(protocols) + 0.5
    figure, axes = pyplot.subplots(len(protocols), 2, figsize=(13, height), squeeze=False)
    shown = [f for f in colour if any(family(row["quant"]) == f for row in _compressed(rows))]
    handles = [pyplot.Line2D([], [], marker="o", ls="", color=colour[f], label=f) for f in shown]
    handles.append(pyplot.Line2D([], [], color="0.6", lw=1, label="Pareto front"))
    handles.append(pyplot.Line2D([], [], marker="v", color="0.6", ls="", label="not above bf16"))
    figure.legend(handles=handles, loc="upper center", ncols=min(len(handles), 10), frameon=False)
    points = {}
    for line, protocol in zip(axes, protocols):
        points[line[0]] = _panel(line[0], rows, f"{protocol}_vs_bf16", colour)
        points[line[1]] = _panel(line[1], rows, f"{protocol}_kl", colour)
        line[0].set(title=f"protocol {protocol}", ylabel="increase in perplexity over bf16, %")
        line[1].set(title=f"protocol {protocol}", ylabel="KL(bf16 || preset), nats per token")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / height))
    for axis, found in points.items():  # only now is it known where there is room
        labels.place(axis, [p[:2] for p in found], [p[2] for p in found], [colour[family(p[2])] for p in found])
    return figure


def memory(rows: Rows, shape: CacheShape) -> Any:
    """Bytes of one row's cache against its tokens, 4K to 10M; presets of equal cost share a line."""
    pyplot, colour = plotting(), _colours(rows)
    curves: dict[tuple[int, ...], list[str]] = {}
    for row in rows:
        costs = [cost_of(row["quant"], shape, tokens) for tokens in CONTEXTS]
        if all(isinstance(cost, Footprint) for cost in costs):
            curves.setdefault(tuple(cost.nbytes for cost in costs), []).append(row["quant"])  # type: ignore[union-attr]
    if not curves:
        return None
    figure, axis = pyplot.subplots(figsize=(10, max(6, 0.24 * len(curves) + 1.5)))
    for nbytes, names in curves.items():
        axis.plot(CONTEXTS, np.array(nbytes) / 2**30, color=colour[family(names[0])], lw=1.3)
    axis.axhline(DEVICE_BYTES / 2**30, color="0.3", ls="--", lw=1)
    axis.text(1.1 * CONTEXTS[0], DEVICE_BYTES / 2**30 * 1.06, "80 GB device", color="0.3")
    axis.set(
        xscale="log", yscale="log", xlim=(CONTEXTS[0], CONTEXTS[-1]), xlabel="tokens in the cache of one row",
        ylabel="cache, GiB", title=f"memory at {rows[0]['shape']}; in brackets: tokens that fit in 80 GiB",
    )  # fmt: skip
    ticks = [4096 << i for i in range(0, 12, 2)]
    axis.set_xticks([*ticks, CONTEXTS[-1]], [*(f"{t >> 10}K" if t < 1 << 20 else f"{t >> 20}M" for t in ticks), "10M"])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.grid(True, color="0.92")
    figure.tight_layout(rect=(0, 0, 0.8, 1))
    ends = [axis.transData.transform((CONTEXTS[-1], nbytes[-1] / 2**30))[1] for nbytes in curves]
    places = labels.spread(ends, 11 * figure.dpi / 72)
    for (nbytes, names), end, at in zip(curves.items(), ends, places):
        tint = colour[family(names[0])]
        axis.annotate(
            f"{', '.join(names)} ({_tokens(_fitting(nbytes))})", (CONTEXTS[-1], nbytes[-1] / 2**30),
            (18, (at - end) * 72 / figure.dpi), textcoords="offset points", fontsize=8, color=tint, va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": tint, "lw": 0.5, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)},
        )  # fmt: skip
    return figure


def passkey(rows: Rows) -> Any:
    """Recall as a grid: presets down, lengths and in each the depths across; None without passkey."""
    having = [row for row in rows if row["passkey"]]
    if not having:
        return None
    pyplot = plotting()
    lengths = list(dict.fromkeys(cell["length"] for row in having for cell in row["passkey"]))
    depths = list(dict.fromkeys(cell["depth"] for row in having for cell in row["passkey"]))
    found = {(row["quant"], c["length"], c["depth"]): c for row in having for c in row["passkey"]}
    width = max(2.0, 0.34 * len(depths))
    figure, axes = pyplot.subplots(
        1, len(lengths), figsize=(2.6 + (width + 0.3) * len(lengths), 1.3 + 0.26 * len(having)), squeeze=False,
        sharey=True, layout="constrained",
    )  # fmt: skip
    for axis, length in zip(axes[0], lengths):
        grid = [[found.get((row["quant"], length, d), {}).get("recall", np.nan) for d in depths] for row in having]
        image = axis.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        for (y, row), (x, depth) in ((a, b) for a in enumerate(having) for b in enumerate(depths)):
            if cell := found.get((row["quant"], length, depth)):
                dark = cell["recall"] < 0.6
                axis.text(x, y, cell["correct"], ha="center", va="center", fontsize=7, color="w" if dark else "k")
        axis.set(title=f"{length:,} tokens", xticks=range(len(depths)), yticks=range(len(having)))
        axis.set_xticklabels([f"{100 * d:.3g}" for d in depths], fontsize=7)
        axis.set_yticklabels([row["quant"] for row in having])
        axis.tick_params(length=0)
        axis.set_xlabel("depth, %")
    trials = having[0]["passkey"][0]["trials"]
    figure.colorbar(image, ax=list(axes[0]), label="recall", pad=0.01)
    figure.suptitle(f"passkeys recalled, of {trials} in each cell", fontsize=10)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, lowest first coordinate first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _panel(axis: Any, rows: Rows, key: str, colour: Mapping[str, str]) -> list[tuple[float, float, str]]:
    """Draws one panel; the points to be labelled, `(x, y, preset)`."""
    scale = 100 if key.endswith("vs_bf16") else 1
    measured = [(r["bits_per_element"], scale * r[key], r["quant"]) for r in _compressed(rows) if r[key] is not None]
    above = [(x, y) for x, y, _ in measured if y > 0]
    # What is not above the reference has no logarithm: it is drawn at the lower edge, as a triangle.
    floor = min((y for _, y in above), default=1.0) / 2
    points = [(x, y if y > 0 else floor, name) for x, y, name in measured]
    for (x, y, name), (_, value, _) in zip(points, measured):
        axis.plot(x, y, "o" if value > 0 else "v", ms=6, color=colour[family(name)], zorder=3)
    if above:
        axis.plot(*zip(*pareto(above)), color="0.6", lw=1, zorder=1)
    # Both axes logarithmic: half of all methods lie between 2 and 4 bits.
    axis.set(xscale="log", yscale="log", xlabel="bits per element, as allocated")
    axis.margins(0.12, 0.1)
    left, right = axis.get_xlim()
    steps = [s for s in (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 10, 12) if left <= s <= right]
    axis.set_xticks(steps, [f"{s:g}" for s in steps])
    axis.xaxis.set_minor_locator(plotting().NullLocator())
    axis.grid(True, color="0.93")
    axis.set_axisbelow(True)
    low, high = axis.get_ylim()
    subs = (1,) if high / low > 1e4 else (1, 3) if high / low > 300 else (1, 2, 5)
    axis.yaxis.set_major_locator(plotting().matplotlib.ticker.LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(plotting().NullFormatter())
    return points


def _compressed(rows: Rows) -> list[Mapping[str, Any]]:
    return [row for row in rows if family(row["quant"]) != _UNCOMPRESSED]


def _colours(rows: Rows) -> dict[str, str]:
    """A colour for each family that is there: known ones have their own in every plot, grey is for the uncompressed."""
    others = [f for f in dict.fromkeys(family(row["quant"]) for row in _compressed(rows)) if f not in COLOURS]
    spare = ("#7b4173", "#637939", "#393b79", "#843c39")
    return COLOURS | {f: spare[i % len(spare)] for i, f in enumerate(others)}


def _fitting(nbytes: Sequence[int]) -> float:
    """Tokens whose cache takes `DEVICE_BYTES`: on the line through the curve's ends, which its steps follow."""
    slope = (nbytes[-1] - nbytes[0]) / (CONTEXTS[-1] - CONTEXTS[0])
    return CONTEXTS[0] + (DEVICE_BYTES - nbytes[0]) / slope


def _tokens(count: float) -> str:
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"
