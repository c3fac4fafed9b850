"""AsymKV's exhaustive search over (l_k, l_v) (arXiv 2410.13212, sections 4 and 5): every pair of prefixes, measured."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kvjax.analysis.mixture import Mixture
from kvjax.evaluate.progress import bar
from kvjax.model.llama import LoadedModel
from kvjax.policy import bind, preset


@dataclasses.dataclass(frozen=True)
class Point:
    """One pair of prefixes; quality as in `kvjax.evaluate.perplexity.Result`."""

    quant: str
    key_layers: int
    value_layers: int
    bits_per_element: float
    nll: float
    perplexity: float
    kl: float
    top1_agreement: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def search(
    model: LoadedModel,
    windows: np.ndarray,
    *,
    high: int = 2,
    low: int = 1,
    suffix: str = "",
    known: Iterable[Point] = (),
    on_point: Callable[[Point], None] | None = None,
    batch: int | None = None,
    progress: bool = True,
) -> list[Point]:
    """Measures AsymKV-high/low-l_k/l_v for all l_k and l_v, 0 to the number of layers, by protocol "all".

    Args:
      model: from `kvjax.load`.
      windows: `[n, S]` tokens.
      high, low: bits of the first l_k (l_v) layers and of the others.
      suffix: of the presets' names, as "-g64" or "-twomean".
      known: points of an earlier run with the same settings; they are not measured again.
      on_point: called with each new point.
      batch: windows at a time.
      progress: show a bar with the time left.

    Returns:
      All points, in order of l_k, then l_v.
    """
    if not low < high:
        raise ValueError(f"`low={low}` must be fewer bits than `high={high}`.")
    layers = model.config.layers
    # All layers low, and all of them high.
    family = "asymkv-" if (high, low) == (2, 1) else f"asymkv-{high}/{low}-"
    names = [f"{family}{n}-{n}{suffix}" for n in (0, layers)]
    options = [bind(name, preset(name), layers) for name in names]
    bits = bits_of_options(model, [(p.segments[0].k_codec, p.segments[0].v_codec) for p in options])
    mixture = Mixture(model, options, options, windows, batch=batch)
    points = {(point.key_layers, point.value_layers): point for point in known}
    wanted = [(k, v) for k in range(layers + 1) for v in range(layers + 1)]
    with bar(progress, "points") as shown:
        task = shown.add_task("search", total=len(wanted), completed=sum(pair in points for pair in wanted))
        for pair in wanted:
            if pair in points:
                continue
            choice = np.arange(layers)[:, None] < np.array(pair)
            quality = mixture.measure(choice)
            spent = float(np.mean([bits[side][int(c)] for row in choice for side, c in enumerate(row)]))
            points[pair] = Point(f"{family}{pair[0]}-{pair[1]}{suffix}", *pair, spent, **vars(quality))
            if on_point:
                on_point(points[pair])
            shown.update(task, advance=1, description=f"l_k={pair[0]}, l_v={pair[1]}")
    return [points[pair] for pair in wanted]


def bits_of_options(model: LoadedModel, options: Sequence[tuple[Any, Any]], block: int = 128) -> np.ndarray:
    """True bits per element of options (codec of keys, codec of values), `[2, options]`."""
    shape = (block, model.config.kv_heads, model.config.head_dim)
    return np.array([[pair[side].bits_per_element(*shape) for pair in options] for side in (0, 1)])


def best_by_bits(points: Iterable[Point]) -> list[Point]:
    """The point of least KL at each number of bits, in order of bits."""
    best: dict[float, Point] = {}
    for point in points:
        bits = round(point.bits_per_element, 9)
        if bits not in best or point.kl < best[bits].kl:
            best[bits] = point
    return [best[bits] for bits in sorted(best)]


def pareto(points: Iterable[Point]) -> list[Point]:
    """Those of `best_by_bits` that no point of fewer bits equals or beats."""
    front: list[Point] = []
    for point in best_by_bits(points):
        if not front or point.kl < front[-1].kl:
            front.append(point)
    return front
