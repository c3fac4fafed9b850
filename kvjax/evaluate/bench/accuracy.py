"""Errors of an implementation on the device that is there, against the definition in float32 on the host.

An error is admitted up to twice that of plain bfloat16 arithmetic (query, keys, values and weights rounded, sums in
float32) on the same numbers, plus 1e-5.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.evaluate.bench import contents
from pallas_kernels.decode_attention import api, heads, reference, specs
from pallas_kernels.decode_attention.formats import Format, Partial, shape_of

_WHOLE = 8192  # tokens up to which a timed answer is checked whole
_END = 1000  # tokens that are checked at either end of longer ones; no multiple of a block


class Error(NamedTuple):
    """Of the output over its root mean square, and of the log of the sum of exp(score); the largest of each."""

    output: float
    log_sum: float

    def within(self, bound: "Error") -> bool:
        return self.output <= bound.output and self.log_sum <= bound.log_sum


def worst(errors: list[Error]) -> Error:
    return Error(max(e.output for e in errors), max(e.log_sum for e in errors))


def small_case(
    kinds: specs.Storage, shape: specs.Shape, implementation: api.Implementation, chip: str, joined: int = 1
) -> Callable[[], tuple[Error, Error]]:
    """A small case of two rows, in several ranges of tokens off the block, compiled and not run.

    Args:
      joined: heads that the storage keeps side by side as one (`pallas_kernels.joined`).

    Returns:
      a function that runs it: the error, and the error admitted.

    Raises:
      NotImplementedError: where the implementation does not do this storage, shape or chip.
    """
    size = specs.Shape(2, 2, 5, min(shape.heads, max(joined, 2)), shape.group, shape.channels, shape.tokens)
    rng = np.random.default_rng(0)
    k, v = (specs.make(kind, size, rng) for kind in (kinds.keys, kinds.values))
    q, full = specs.query(size, rng), size.blocks * size.tokens
    position = np.full(2, full + 37, np.int32)
    stored = contents.in_runs(*heads.join_formats(k, v, joined, kinds.pre_rope), shape.group, implementation, chip)
    device = [jax.tree.map(jnp.asarray, x) for x in (q, *stored)]

    def attend(q, k, v, first, last):
        rotation = contents.rotation(size.channels, position) if kinds.pre_rope else None
        return api.decode_attention(
            q, k, v, layer=jnp.int32(1), first=first, last=last, rotation=rotation, implementation=implementation,
            chip=chip,
        )  # fmt: skip

    rows = jax.ShapeDtypeStruct((2,), jnp.int32)
    program = jax.jit(attend).lower(*device, rows, rows).compile()
    prepare(q, k, v, kinds.pre_rope)

    def run() -> tuple[Error, Error]:
        errors, bounds = [], []
        for of_first_row, of_second in (((0, size.tokens + 1), (0, full)), ((37, full - 3), (0, 0))):
            first, last = (np.asarray(x, np.int32) for x in zip(of_first_row, of_second))
            got = program(*device, jnp.asarray(first), jnp.asarray(last))
            found = compare(got, q, k, v, 1, first, last, position if kinds.pre_rope else None)
            errors.append(found[0])
            bounds.append(found[1])
        return worst(errors), worst(bounds)

    return run


def windows(context: int) -> list[tuple[int, int]]:
    """Token ranges in which a storage of `context` tokens is checked: all of it, or its two ends."""
    return [(0, context)] if context <= _WHOLE else [(0, _END), (context - _END, context)]


def blocks_of(window: tuple[int, int], shape: specs.Shape) -> tuple[int, int]:
    """First of the blocks that hold a window, and their number: the same for all windows at an end."""
    most = -(-(window[1] - window[0]) // shape.tokens) + 1
    count = min(shape.blocks, most)
    return min(window[0] // shape.tokens, shape.blocks - count), count


def compare_window(
    got: Partial, q: Any, k: Format, v: Format, window: tuple[int, int], start: int, position: int | None
) -> tuple[Error, Error]:
    """As `compare` for an answer that saw the tokens `window` of all rows, with k and v cut from block `start` on."""
    before, rows = start * shape_of(k)[4], np.ones(len(q), np.int32)
    # Scores depend on the distance from the query alone, and angles are more exact near 0.
    moved = None if position is None else rows * (position - before)
    return compare(got, q, k, v, 0, rows * (window[0] - before), rows * (window[1] - before), moved)


def prepare(q: Any, k: Format, v: Format, rotates: bool) -> None:
    """Compiles `compare` for arrays of these shapes (abstract ones will do), so that it takes no time later."""
    with _host():
        q, k, v = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (q, k, v))
        row = jnp.zeros(len(q), jnp.int32)
        _both(jnp.int32(0), q, k, v, row, row, row if rotates else None)


def compare(
    got: Partial, q: Any, k: Format, v: Format, layer: int, first: Any, last: Any, position: Any
) -> tuple[Error, Error]:
    """The error of an answer, and the error admitted; `position[B]` of the query where keys are stored before RoPE."""
    with _host():
        arrays = [jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), x) for x in (q, k, v, first, last, position)]
        exact, plain = _both(jnp.int32(layer), *arrays)
    bound = error(plain, exact)
    return error(got, exact), Error(*(2 * e + 1e-5 for e in bound))


@jax.jit
def _both(layer, q, k, v, first, last, position) -> tuple[Partial, Partial]:
    """The definition, and the same in bfloat16."""
    layers, batch, blocks, heads, tokens, channels = shape_of(k)
    size = specs.Shape(layers, batch, blocks, heads, q.shape[2], channels, tokens)
    rotation = None if position is None else contents.rotation(size.channels, position)
    arguments = (q, k, v, layer, first, last, rotation)
    return reference.decode_attention(*arguments), _rounded(*arguments)


def error(got: Partial, exact: Partial) -> Error:
    """Infinite where something is not finite, or rows that see nothing are not empty."""
    acc, top, total = (np.asarray(x, np.float64) for x in got)
    acc0, top0, total0 = (np.asarray(x, np.float64) for x in exact)
    seen = total0 > 0
    empty = (acc[~seen] == 0).all() and (total[~seen] == 0).all() and (top[~seen] == np.float32(-1e30)).all()
    if not (empty and all(np.isfinite(x).all() for x in (acc, top, total)) and (total[seen] > 0).all()):
        return Error(np.inf, np.inf)
    if not seen.any():
        return Error(0.0, 0.0)
    out, out0 = acc[seen] / total[seen][:, None], acc0[seen] / total0[seen][:, None]
    log, log0 = np.log(total[seen]) + top[seen], np.log(total0[seen]) + top0[seen]
    return Error(float(np.abs(out - out0).max() / np.sqrt((out0**2).mean())), float(np.abs(log - log0).max()))


def _rounded(q, k, v, layer, first, last, rotation) -> Partial:
    """The definition with q, keys, values and weights in bfloat16, sums in float32."""
    _, batch, blocks, heads, tokens, channels = shape_of(k)
    keys, values = (
        reference.dequantize(x, layer).swapaxes(1, 2).reshape(batch, heads, blocks * tokens, channels) for x in (k, v)
    )
    token = jnp.arange(blocks * tokens, dtype=jnp.int32)
    if rotation is not None:
        keys = reference.rotate(keys, *(x[None, None] for x in rotation.angles(token)))
        q = reference.rotate(q, *(x[:, None, None] for x in rotation.angles(rotation.position)))
    q, keys, values = (x.astype(jnp.bfloat16) for x in (q, keys, values))
    scores = jnp.einsum("bkgh,bkth->bkgt", q, keys, preferred_element_type=jnp.float32)
    seen = ((token[None, :] >= first[:, None]) & (token[None, :] < last[:, None]))[:, None, None]
    top = jnp.where(seen, scores, reference.EMPTY).max(-1)
    p = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    acc = jnp.einsum("bkgt,bkth->bkgh", p.astype(jnp.bfloat16), values, preferred_element_type=jnp.float32)
    return Partial(acc, top, p.sum(-1))


def _host() -> Any:
    """The CPU as default device, where this process has it beside the accelerator."""
    try:
        return jax.default_device(jax.devices("cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()
