"""Tables and plots of the analysis: errors by layer, the search, an allocation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from kvjax.analysis.asymmetry import LayerErrors
from kvjax.analysis.search import Point, best_by_bits, pareto
from kvjax.calibrate.allocation_file import Allocation
from kvjax.evaluate.report import plotting


def _table(columns: Sequence[str], left: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def errors_table(rows: Sequence[LayerErrors]) -> Table:
    """One row per layer; errors relative to the exact thing."""
    table = _table(
        ("layer", "K off by", "V off by", "logits (nats)", "out from K", "law", "out from V", "law", "both", "K^2/V^2",
         "theorem", "as printed")
    )  # fmt: skip
    for row in rows:
        shares = (row.k_error, row.v_error)
        output = (row.from_keys, row.law_from_keys, row.from_values, row.law_from_values, row.from_both)
        table.add_row(
            str(row.layer),
            *(f"{x:.1%}" for x in shares),
            f"{row.logit_error:.3f}",
            *(f"{x:.1%}" for x in output),
            f"{row.ratio:.2f}",
            f"{row.theorem:.0e}",
            f"{row.printed:.2f}",
        )
    return table


def plot_errors(rows: Sequence[LayerErrors], path: Any) -> None:
    """Output error by layer from keys and from values, measured and by the variance law."""
    pyplot = plotting()
    figure, axis = pyplot.subplots(figsize=(6, 3.5))
    layers = [row.layer for row in rows]
    for side, color in (("keys", "tab:red"), ("values", "tab:blue")):
        measured = [getattr(row, f"from_{side}") for row in rows]
        law = [getattr(row, f"law_from_{side}") for row in rows]
        axis.plot(layers, measured, "o-", color=color, label=side)
        axis.plot(layers, law, "x--", color=color, alpha=0.6, label=f"{side}, variance law")
    axis.set(xlabel="layer", ylabel="relative error of the attention output", yscale="log", xticks=layers)
    axis.legend()
    _save(pyplot, figure, path)


def search_table(points: Sequence[Point], count: int | None = None) -> Table:
    """Points by bits, then by KL; `*`: on the Pareto front. At most `count` rows per number of bits."""
    table = _table(("quant", "l_k", "l_v", "bits/element", "perplexity", "KL (nats)", "top-1", ""), ("quant",))
    front = pareto(points)
    shown: dict[float, int] = {}
    for point in sorted(points, key=lambda p: (round(p.bits_per_element, 9), p.kl)):
        bits = round(point.bits_per_element, 9)
        shown[bits] = shown.get(bits, 0) + 1
        if count is not None and shown[bits] > count:
            continue
        table.add_row(
            point.quant,
            str(point.key_layers),
            str(point.value_layers),
            f"{point.bits_per_element:.3f}",
            f"{point.perplexity:.3f}",
            f"{point.kl:.5f}",
            f"{point.top1_agreement:.2%}",
            "*" if point in front else "",
        )
    return table


def plot_search(points: Sequence[Point], path: Any) -> None:
    """KL and perplexity over (l_k, l_v), and KL against bits with the best prefix of each number of bits."""
    pyplot = plotting()
    size = 1 + max(point.key_layers for point in points)
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    for axis, name in zip(axes, ("kl", "perplexity")):
        grid = np.full((size, size), np.nan)
        for point in points:
            grid[point.key_layers, point.value_layers] = getattr(point, name)
        image = axis.imshow(grid, origin="lower", cmap="viridis_r")
        axis.set(
            title={"kl": "KL (nats)"}.get(name, name), xlabel="l_v, value layers high", ylabel="l_k, key layers high"
        )
        figure.colorbar(image, ax=axis)
        if size <= 10:
            middle = np.nanmean(grid)
            for point in points:
                value = getattr(point, name)
                axis.text(
                    point.value_layers, point.key_layers, f"{value:.3g}", ha="center", va="center", fontsize=7,
                    color="white" if value > middle else "black",
                )  # fmt: skip
    axes[2].scatter([p.bits_per_element for p in points], [p.kl for p in points], s=12, color="grey", label="prefix")
    best, front = best_by_bits(points), pareto(points)
    axes[2].plot(
        [p.bits_per_element for p in front], [p.kl for p in front], "o-", color="tab:red", label="Pareto front"
    )
    if len(best) <= 12:
        for p in best:
            axes[2].annotate(
                f"{p.key_layers}/{p.value_layers}", (p.bits_per_element, p.kl), fontsize=7, xytext=(2, -9),
                textcoords="offset points",
            )  # fmt: skip
    axes[2].set(xlabel="true bits per element", ylabel="KL (nats)", yscale="log")
    axes[2].legend()
    _save(pyplot, figure, path)


def allocation_table(allocation: Allocation) -> Table:
    """One row per layer: what keys and values take, and what storing them so costs alone."""
    table = _table(("layer", "keys", "KL alone", "values", "KL alone"), ("keys", "values"))
    for layer, (k, v) in enumerate(zip(allocation.keys, allocation.values)):
        k_loss = allocation.k_sensitivity[layer][allocation.options.index(k)]
        v_loss = allocation.v_sensitivity[layer][allocation.options.index(v)]
        table.add_row(str(layer), k, f"{k_loss:.5f}", v, f"{v_loss:.5f}")
    return table


def sensitivity_table(allocation: Allocation) -> Table:
    """KL (nats) of every option of every matrix, with all others exact; `*`: chosen."""
    table = _table(("matrix", *allocation.options), ("matrix",))
    for side, chosen, sensitivity in (
        ("K", allocation.keys, allocation.k_sensitivity),
        ("V", allocation.values, allocation.v_sensitivity),
    ):
        for layer, row in enumerate(sensitivity):
            cells = (f"{x:.5f}{'*' if o == chosen[layer] else ' '}" for o, x in zip(allocation.options, row))
            table.add_row(f"{side} {layer}", *cells)
    return table


def plot_allocation(allocation: Allocation, bits: np.ndarray, path: Any) -> None:
    """Bits by layer of keys and values, and the sensitivities behind them.

    Args:
      bits: true bits of the options, `[2, O]`.
    """
    pyplot = plotting()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 3.8))
    layers = np.arange(allocation.layers)
    sides = (
        ("keys", allocation.keys, allocation.k_sensitivity, "tab:red", -0.2),
        ("values", allocation.values, allocation.v_sensitivity, "tab:blue", 0.2),
    )
    for side, (name, chosen, sensitivity, color, shift) in enumerate(sides):
        index = [allocation.options.index(option) for option in chosen]
        left.bar(layers + shift, bits[side][index], 0.4, color=color, label=name)
        table = np.array(sensitivity)
        for option, label in enumerate(allocation.options):
            style = ("o-", "s--", "^:", "v-.", "d-", "x--", "+:", "*-.")[option % 8]
            right.plot(layers, table[:, option], style, color=color, alpha=0.7, label=f"{name} {label}", markersize=4)
    left.axhline(allocation.bits_per_element, color="grey", linewidth=0.8, label="mean")
    left.set(xlabel="layer", ylabel="true bits per element", title=allocation.name, xticks=layers)
    right.set(xlabel="layer", ylabel="KL alone (nats)", yscale="log", xticks=layers)
    left.legend(loc="lower left")
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    _save(pyplot, figure, path)


def _save(pyplot: Any, figure: Any, path: Any) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
