"""Moves and products of one warpgroup (128 threads) that Hopper's decode attention is made of.

A tile has 64 rows: its registers are the A operand of `wgmma`, whose B operand is in shared memory. The interpreter of
Mosaic GPU has neither that nor loads written in Mosaic itself; each helper therefore has a plain form for it.
"""
# (It checks against the oldest JAX admitted, which lacks what this file is written for.)

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

ROWS = 64  # of a tile: what one wgmma takes
WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value per row of a tile
COLUMN = WGMMA.reduce(0)  # one value per column


def swizzled(rows: int, bits: int):
    """Transforms of a shared-memory tile whose rows arrive `rows` at a time, or are read by `wgmma`."""
    return plgpu.TilingTransform((rows, 1024 // bits)), plgpu.SwizzleTransform(128)


def load(ref, layout, interpret: bool, optimized: bool = True) -> jax.Array:
    return ref[...] if interpret else plgpu.load(ref, layout=layout, optimized=optimized)


def load_transposed(ref, interpret: bool) -> jax.Array:
    """`ref[64, C]` of 32-bit words, or of 16-bit values, as a tile `[C, 64]`."""
    return ref[...].T if interpret else plgpu.load(ref.T, layout=WGMMA, optimized=False)


def store_transposed(ref, x: jax.Array, interpret: bool) -> None:
    """Stores a tile `x[64, N]` as `ref[N, 64]`, the B operand of a product over its rows."""
    if interpret:
        ref[...] = x.T
        return
    transforms = swizzled(8, 16)

    # Written in Mosaic itself, because a plain store waits for all warps before and after.
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), WGMMA))
    def store(_, ref, x):
        x.store_tiled(mgpu.utils.memref_transpose(ref, (1, 0, 3, 2)), swizzle=128)

    store(ref, x)


def full(shape: tuple[int, ...], value: float, interpret: bool) -> jax.Array:
    x = jnp.full(shape, value, jnp.float32)
    return x if interpret else plgpu.layout_cast(x, WGMMA if len(shape) == 2 else COLUMN)


def over_rows(column: jax.Array, rows: int) -> jax.Array:
    """`[N]` as `[rows, N]`."""
    return jax.lax.broadcast_in_dim(column, (rows, *column.shape), (1,))


def over_columns(row: jax.Array, columns: int) -> jax.Array:
    """`[64]` as `[64, columns]`."""
    return jax.lax.broadcast_in_dim(row, (*row.shape, columns), (0,))


def product(pairs: list, columns: int, interpret: bool) -> jax.Array:
    """The sum of `a @ b.T` over pairs of registers `a[M, depth]` and shared memory `b[columns, depth]`, float32."""
    if interpret:
        return sum(jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32).T, precision="highest") for a, b in pairs)

    def multiply(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b.T)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((pairs[0][0].shape[0], columns), jnp.float32))


def parts(channels: int) -> list[range]:
    """Channels 128 at a time, or registers do not suffice."""
    return [range(i, min(i + 128, channels)) for i in range(0, channels, 128)]


def snapshot(plan, refs, which: tuple[int, ...]) -> list:
    """When interpreted, where each read of a ref is a call to the host: some of them read once."""
    return [x[...] if plan.interpret and i in which else x for i, x in enumerate(refs)]


def gather(ref, shape: tuple[int, ...], at, layout) -> jax.Array:
    """float16 bit patterns of `ref` (any rank) at `at(*indices of the result)`, which computes by `+ * // %`."""
    out = plgpu.ShapeDtypeStruct(shape, jnp.float16, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=out)
    def read(_, ref):
        fragment = layout.to_mgpu()
        f16, i16 = ir.F16Type.get(), ir.IntegerType.get_signless(16)
        registers = []
        for indices in fragment.thread_idxs(shape):
            where = [_value(i) for i in at(*map(_Index, indices))]
            bits = vector.load(ir.VectorType.get((fragment.vector_length,), i16), ref, where)
            registers.append(vector.bitcast(ir.VectorType.get((fragment.vector_length,), f16), bits))
        import numpy as np

        array = np.empty(len(registers), dtype=object)
        array[:] = registers
        return mgpu.FragmentedArray(
            _registers=array.reshape(fragment.registers_shape(shape)), _layout=fragment, _is_signed=None
        )

    return read(ref)


class _Index:
    """An index of the generated program; unsigned arithmetic."""

    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        return _Index(arith.addi(self.value, _value(other)))

    def __mul__(self, other):
        return _Index(arith.muli(self.value, _value(other)))

    def __floordiv__(self, other):
        return _Index(arith.divui(self.value, _value(other)))

    def __mod__(self, other):
        return _Index(arith.remui(self.value, _value(other)))


def _value(x):
    if isinstance(x, _Index):
        return x.value
    return arith.constant(ir.IndexType.get(), x) if isinstance(x, int) else x
