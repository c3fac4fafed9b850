"""What evaluations print: tables, how they came about, and a plot of recall."""

import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from kvjax.evaluate import ladder, passkey, perplexity
from kvjax.evaluate.text import Text


def perplexity_table(results: Sequence[perplexity.Result], text: Text) -> Table:
    """One row per method; bits per byte of text beside perplexity, for it compares models of different vocabulary."""
    table = Table(box=None, pad_edge=False)
    columns = (
        "quant",
        "bits/element",
        "perplexity",
        "vs bf16",
        "bits/byte",
        "KL (nats)",
        "top-1",
        "no slot",
        "seconds",
    )
    some_read = any(result.bits_read is not None for result in results)
    for column in columns + ("bits read",) * some_read:
        table.add_column(column, justify="left" if column == "quant" else "right", no_wrap=True)
    for result in results:
        read = ["-" if result.bits_read is None else f"{result.bits_read:.3f}"] * some_read
        table.add_row(result.quant, *_numbers(result, results[0], text), _share(result), f"{result.seconds:.1f}", *read)
    return table


def ladder_table(rows: Sequence[ladder.Row], text: Text) -> Table:
    """One row per step, with its difference in perplexity to the step it changes."""
    table = Table(box=None, pad_edge=False)
    columns = ("step", "bits/element", "perplexity", "vs bf16", "bits/byte", "KL (nats)", "top-1", "delta", "to")
    for column in columns:
        table.add_column(column, justify="left" if column in ("step", "to") else "right", no_wrap=column != "to")
    reference = rows[0].result
    for row in rows:
        delta = "" if row.delta is None else f"{row.delta:+.2f}"
        table.add_row(row.result.quant, *_numbers(row.result, reference, text), delta, row.against or "")
    return table


def _numbers(result: perplexity.Result, reference: perplexity.Result, text: Text) -> tuple[str, ...]:
    bits_per_byte = result.nll / math.log(2) * len(text.tokens) / text.nbytes
    return (
        f"{result.bits_per_element:.3f}",
        f"{result.perplexity:.3f}",
        f"{result.perplexity / reference.perplexity - 1:+.2%}",
        f"{bits_per_byte:.4f}",
        f"{result.kl:.5f}",
        f"{result.top1_agreement:.2%}",
    )


def _share(result: perplexity.Result) -> str:
    return f"{result.without_slot:.3%}" if result.without_slot else "-"


def passkey_table(results: Sequence[passkey.Result]) -> Table:
    """One row per method and length; recall by depth, then over all depths."""
    depths = list(dict.fromkeys(result.depth for result in results))
    table = Table(box=None, pad_edge=False)
    for column in ("quant", "bits/element", "length", *(f"{depth:.0%}" for depth in depths), "recall"):
        table.add_column(column, justify="left" if column == "quant" else "right", no_wrap=True)
    for quant, length in dict.fromkeys((result.quant, result.length) for result in results):
        part = [result for result in results if (result.quant, result.length) == (quant, length)]
        correct, trials = sum(r.correct for r in part), sum(r.trials for r in part)
        cells = [str(result.correct) for result in part]
        table.add_row(quant, f"{part[0].bits_per_element:.3f}", str(length), *cells, f"{correct}/{trials}")
    return table


def plot_recall(results: Sequence[passkey.Result], path: Any) -> None:
    """Recall by length and depth, a panel per method, as an image."""
    pyplot = plotting()
    quants = list(dict.fromkeys(result.quant for result in results))
    lengths = list(dict.fromkeys(result.length for result in results))
    depths = list(dict.fromkeys(result.depth for result in results))
    recall = {(r.quant, r.length, r.depth): r.recall for r in results}
    figure, axes = pyplot.subplots(1, len(quants), figsize=(1 + 2.5 * len(quants), 3.5), squeeze=False, sharey=True)
    for axis, quant in zip(axes[0], quants):
        grid = [[recall[quant, length, depth] for length in lengths] for depth in depths]
        image = axis.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
        axis.set(title=quant, xlabel="tokens", xticks=range(len(lengths)), xticklabels=lengths)
        axis.set(yticks=range(len(depths)), yticklabels=[f"{depth:.0%}" for depth in depths])
    axes[0][0].set_ylabel("depth of the key")
    figure.colorbar(image, ax=list(axes[0]), label="recall")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def plotting(path: Any = None, option: str = "plot") -> Any:
    """matplotlib's pyplot, drawing to files only.

    Raises:
      ValueError: one line, where it is not installed, and where `path` (of `option`) ends in no format that it writes.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError(f"`{option}` needs matplotlib; pip install 'kvjax[plots]'.") from None
    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.backend_bases import FigureCanvasBase

    if path is not None and Path(path).suffix.lower()[1:] not in FigureCanvasBase.filetypes:
        raise ValueError(f"`{option}={path}` must end in a format of pictures: .png, .svg or .pdf.")
    return pyplot


def machine() -> str:
    """The device that computed, and what it is made of."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.platform} ({device.device_kind})"
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2] for line in info.read_text().splitlines() if line.startswith("model name")] if (
        info.is_file()
    ) else []  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu ({' '.join((names[0] if names else platform.processor()).split())}, {cores} cores)"
