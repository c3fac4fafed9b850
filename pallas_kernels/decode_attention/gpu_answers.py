"""What a program of Hopper's decode attention leaves in device memory: what its queries fill, and no more.

Tiles have queries in columns, 8 at least, and channels in rows in whatever order suits the products. Stored are the
columns that queries fill, as `[G, H]` with channels in order, so that nothing is left to do around the kernel but to
join the splits. A plain store takes whole tiles only.
"""
# (It checks against the oldest JAX admitted, which lacks what this file is written for.)

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.decode_attention.gpu_codebook_lookup import Word
from pallas_kernels.decode_attention.gpu_tiles import COLUMN, ROWS, WGMMA


def store_tile(
    ref,
    x: jax.Array,
    channel: Callable,
    interpret: Any,
    added: Sequence[jax.Array] = (),
    group: int = ROWS,
    paired: bool = False,
) -> None:
    """Stores a tile `x[M, n * columns]` as its channels of `ref[G, H]`, float32 in device memory.

    Args:
      channel: `channel(row)` of anything that knows `+ * // %`; rows of channels beyond the last are left out.
      added: n arrays `[columns]`, each added to its columns; without them n is 1.
      group: channels that take the same of the n columns in turn: channel c those of number `c // group % n`.
      paired: the sum of columns 2 g and 2 g + 1 is stored for query g.
    """
    (queries, channels), parts, each = ref.shape, max(1, len(added)), 2 if paired else 1
    order = channel(np.arange(x.shape[0]))
    if interpret:
        first, count = int(order.min()), int(np.sum(order < channels))
        rows = jnp.argsort(channel(jnp.arange(x.shape[0], dtype=jnp.int32)))[:count]
        columns = x.reshape(x.shape[0], parts, -1)
        if added:
            columns = columns + jnp.stack(added)[None]
        own = columns[rows, channel(rows) // group % parts].reshape(count, -1, each).sum(-1)[:, :queries]
        ref[:, first : first + count] = own.T
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA, *[COLUMN] * len(added)))
    def store(_, ref, x, *added):
        warp, row8, pair = _thread()
        base = mgpu.utils.memref_ptr(ref)
        registers = x.registers.reshape(-1, parts, x.shape[1] // (8 * parts), 2)  # 64 rows, columns, 8 columns, 8 rows
        for tile, half in np.ndindex(registers.shape[0], 2):
            here = channel(warp * 16 + row8 + (ROWS * tile + 8 * half))
            inside = [_below(here, channels)] if order.max() >= channels else []
            for part, eight in np.ndindex(registers.shape[1:3]):
                own = [_equal(here // group % parts, part)] if parts > 1 else []
                numbers = _numbers(registers[tile, part, eight, half])
                if added:
                    numbers = [arith.addf(*both) for both in zip(numbers, _numbers(added[part].registers.flat[eight]))]
                numbers = [arith.addf(*numbers)] if paired else numbers
                for query, number, exists in _columns(pair, eight, numbers, queries):
                    _store(base, query * channels + here, number, [*exists, *own, *inside])

    store(ref, x, *added)


def store_column(ref, x: jax.Array, interpret: Any, paired: bool = False) -> None:
    """Stores `x[columns]` as `ref[G]`, float32 in device memory; `paired`: every second one."""
    (queries,) = ref.shape
    if interpret:
        ref[...] = x[:: 2 if paired else 1][:queries]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), COLUMN))
    def store(_, ref, x):
        warp, row8, pair = _thread()
        base, first = mgpu.utils.memref_ptr(ref), _equal(warp * 8 + row8, 0)  # all rows have the same
        for eight, register in enumerate(x.registers.flat):
            numbers = _numbers(register)[: 1 if paired else 2]
            for query, number, exists in _columns(pair, eight, numbers, queries):
                _store(base, query, number, [first, *exists])

    store(ref, x)


def _columns(pair: Word, eight: int, numbers: list, queries: int):
    """Of the numbers of a thread in eight columns, one per query: the query, the number, and the conditions under which
    there is such a query."""
    each = len(numbers)
    for i, number in enumerate(numbers):
        first = 4 * each * eight + i  # of four threads
        if first < queries:
            query = pair * each + first
            yield query, number, [_below(query, queries)] if first + 3 * each >= queries else []


def _thread() -> tuple[Word, Word, Word]:
    """Of a thread: the warp, and the row of eight and the pair of eight columns of a tile that it holds."""
    thread = Word(mgpu.utils.thread_idx()) & 127
    return thread >> 5, (thread >> 2) & 7, thread & 3


def _numbers(register) -> list:
    return [vector.extract(register, [], [i]) for i in range(2)]


def _below(x: Word, bound: int):
    return arith.cmpi(arith.CmpIPredicate.ult, x.value, x.like(bound).value)


def _equal(x: Word, y: int):
    return arith.cmpi(arith.CmpIPredicate.eq, x.value, x.like(y).value)


def _store(base, at: Word, number, conditions: list) -> None:
    """`base[at] = number`, where all conditions hold; without a branch."""
    pointer = mgpu.utils.getelementptr(base, [at.value], ir.F32Type.get())
    pointer = llvm.addrspacecast(llvm.PointerType.get(1), pointer)
    operands, text, kinds = [pointer, number], "st.global.f32 [$0], $1;", "l,f"
    if conditions:
        operands, text, kinds = [*operands, functools.reduce(arith.andi, conditions)], f"@$2 {text}", f"{kinds},b"
    llvm.inline_asm(None, operands, text, f"{kinds},~{{memory}}", has_side_effects=True)
