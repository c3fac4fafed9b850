"""Places labels of plots where they cover neither each other nor the points."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Where a label may go, in points from its own: near and beside it first, then farther with a line that leads to it.
_NEAR = ((6, 0), (-6, 0), (0, 7), (0, -7), (6, 7), (-6, 7), (6, -7), (-6, -7))
_FAR = tuple((x * step, y * step) for step in (2.5, 4, 6, 8) for x, y in (*_NEAR[4:], *_NEAR[:4]))

Box = tuple[float, float, float, float]


def place(axis: Any, points: Sequence[tuple[float, float]], names: Sequence[str], colours: Sequence[str]) -> None:
    """Labels `points` (data coordinates), each at the first place that is free; call it when the layout is final."""
    from matplotlib import patheffects  # optional, as all that draws

    figure = axis.figure
    renderer = figure.canvas.get_renderer()
    pixels = figure.dpi / 72
    at = axis.transData.transform(np.asarray(points, float)) if len(points) else []
    taken: list[Box] = [(x - 4 * pixels, y - 4 * pixels, x + 4 * pixels, y + 4 * pixels) for x, y in at]
    inside = axis.get_window_extent(renderer).extents
    for (x, y), point, name, colour in sorted(zip(at, points, names, colours), key=lambda item: -item[0][1]):
        text = axis.annotate(name, point, (0, 0), textcoords="offset points", fontsize=8, color=colour, zorder=4)
        left, bottom, right, top = text.get_window_extent(renderer).extents
        width, height = right - left, top - bottom

        def box(offset: tuple[float, float], x=x, y=y, width=width, height=height) -> Box:
            dx, dy = offset[0] * pixels, offset[1] * pixels
            left = x + dx - (0 if dx > 0 else width if dx < 0 else width / 2)
            bottom = y + dy - (0 if dy > 0 else height if dy < 0 else height / 2)
            return left, bottom, left + width, bottom + height

        free = [o for o in (*_NEAR, *_FAR) if _within(box(o), inside) and not any(_overlap(box(o), t) for t in taken)]
        offset = free[0] if free else _NEAR[0]
        taken.append(box(offset))
        text.remove()
        across, up = ((0.0 if o > 0 else 1.0 if o < 0 else 0.5) for o in offset)
        leader = {"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 1, "shrinkB": 3, "relpos": (across, up)}
        axis.annotate(
            name, point, offset, textcoords="offset points", fontsize=8, color=colour, zorder=4,
            ha="left" if offset[0] > 0 else "right" if offset[0] < 0 else "center",
            va="bottom" if offset[1] > 0 else "top" if offset[1] < 0 else "center",
            path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],  # lines stop at letters
            arrowprops=None if offset in _NEAR else leader,
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float) -> np.ndarray:
    """The positions nearest to `wanted` (least squares) that keep its order and lie at least `gap` apart.

    Less `gap` for each place in the order, positions must only not fall: isotonic regression, by pooling neighbours.
    """
    order = np.argsort(wanted, kind="stable")
    pools: list[tuple[float, int]] = []  # mean, members
    for value in np.asarray(wanted, float)[order] - gap * np.arange(len(order)):
        pools.append((value, 1))
        while len(pools) > 1 and pools[-1][0] < pools[-2][0]:
            (b, m), (a, n) = pools.pop(), pools.pop()
            pools.append(((a * n + b * m) / (n + m), n + m))
    out = np.empty(len(order))
    out[order] = np.repeat([mean for mean, _ in pools], [n for _, n in pools]) + gap * np.arange(len(order))
    return out


def _within(box: Box, outer: Any) -> bool:
    return box[0] >= outer[0] and box[1] >= outer[1] and box[2] <= outer[2] and box[3] <= outer[3]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
