"""One row of packed codes as float32, in LLVM's own vectors: what its loops do not become by themselves.

numba makes 64 bits of two 32-bit integers, and LLVM no permutation of a table that is read in a loop: AVX-512 permutes
16 float32 by 4 bits of an index, AVX2 8 by 3 bits. Elsewhere a tree of selects, one bit after the other.
"""

import dataclasses
import math
from collections.abc import Callable

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pallas_kernels.native_cpu import JIT

I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
WIDEST = 16
_PERMUTATIONS = {"avx512f": (16, "llvm.x86.avx512.permvar.sf.512"), "avx2": (8, "llvm.x86.avx2.permps")}


def permutation() -> tuple[int, str] | None:
    """Lanes and name of this machine's permutation of float32, if it has one."""
    features = llvmlite.binding.get_host_cpu_features()
    return next((found for feature, found in _PERMUTATIONS.items() if features.get(feature)), None)


@dataclasses.dataclass(frozen=True)
class Row:
    """`out[h] = scale * value + zero`, where value is the code or `levels[code]`.

    Attributes:
      bits: 1, 2, 3, 4 or 8.
      channels: H.
      levels: whether there are levels; `2**bits` of them, repeated to 16.
      straddles: whether the upper bits of the codes are in other words (3 bits).
      group: channels that share a scale and a zero; 0: each has its own.
      stride: elements from one group's scale to the next one's.
    """

    bits: int
    channels: int
    levels: bool
    straddles: bool
    group: int
    stride: int

    @property
    def permutation(self) -> tuple[int, str] | None:
        """What looks the levels up, if rows are whole registers of it."""
        found = permutation() if self.levels and self.bits <= 4 else None
        return found if found and math.gcd(found[0], self.channels, self.group) == found[0] else None

    @property
    def width(self) -> int:
        """Lanes: the permutation's, or at most 16 that a row and a group are whole multiples of."""
        return self.permutation[0] if self.permutation else math.gcd(WIDEST, self.channels, self.group)

    def compile(self) -> Callable:
        """`decode(out, words, after, right, left, levels, scale, zero)` on the addresses of arrays.

        A code is in `words[h] >> right`, and where it straddles in `after[h] << left` above that.
        """

        @intrinsic
        def emit(typing, out, words, after, right, left, levels, scale, zero):
            def build(context, builder, signature, args):
                _Emitter(builder, self).row(*args)
                return context.get_dummy_value()

            i64, u32 = types.int64, types.uint32
            return types.void(i64, i64, i64, u32, u32, i64, i64, i64), build

        @numba.njit(**JIT)
        def decode(out, words, after, right, left, levels, scale, zero):
            emit(out, words, after, right, left, levels, scale, zero)

        return decode


class _Emitter:
    """Writes the instructions of a row."""

    def __init__(self, builder: ir.IRBuilder, row: Row):
        self.b, self.of, width = builder, row, row.width
        self.words, self.floats = ir.VectorType(I32, width), ir.VectorType(F32, width)
        self.permute = row.permutation

    def row(self, out, words, after, right, left, levels, scale, zero) -> None:
        b = self.b
        rights, lefts = self._all(right), self._all(left)
        tables = self._tables(levels) if self.of.levels else []
        for at in range(0, self.of.channels, self.of.width):
            code = b.lshr(self._load(words, at, self.words), rights)
            if self.of.straddles:
                code = b.or_(code, b.shl(self._load(after, at, self.words), lefts))
            value = self._level(tables, code) if tables else self._number(code)
            value = self._multiply_add(value, self._constant(scale, at), self._constant(zero, at))
            b.store(value, self._place(out, at, self.floats), align=4)

    def _number(self, code):
        code = self.b.and_(code, self._word(2**self.of.bits - 1))
        return self.b.sitofp(code, self.floats)

    def _tables(self, levels) -> list:
        if self.permute:
            return [self._load(levels, at, self.floats) for at in range(0, 2 ** max(self.of.bits, 3), self.of.width)]
        return [self._broadcast(levels, i) for i in range(2**self.of.bits)]

    def _level(self, tables, code):
        if not self.permute:
            return self._select(tables, code, 0)
        # The bits of an index beyond the lanes are not looked at, and the table repeats what the code's bits reach.
        kind = ir.FunctionType(self.floats, [self.floats, self.words])
        function = self._function(self.permute[1], kind)
        return self._select([self.b.call(function, [table, code]) for table in tables], code, self.of.bits - 1)

    def _select(self, values, code, bit):
        """The value whose number is `code >> bit`."""
        while len(values) > 1:
            is_set = self.b.icmp_unsigned("!=", self.b.and_(code, self._word(1 << bit)), self._word(0))
            values = [self.b.select(is_set, high, low) for low, high in zip(values[::2], values[1::2])]
            bit += 1
        return values[0]

    def _constant(self, address, at):
        if not self.of.group:
            return self._load(address, at, self.floats)
        return self._broadcast(address, at // self.of.group * self.of.stride)

    def _multiply_add(self, a, b, c):
        kind = ir.FunctionType(self.floats, [self.floats] * 3)
        return self.b.call(self._function(f"llvm.fmuladd.v{self.of.width}f32", kind), [a, b, c])

    def _function(self, name: str, kind: ir.FunctionType) -> ir.Function:
        return self.b.module.globals.get(name) or ir.Function(self.b.module, kind, name)

    def _place(self, address, at: int, kind):
        return self.b.inttoptr(self.b.add(address, ir.Constant(I64, 4 * at)), kind.as_pointer())

    def _load(self, address, at: int, kind):
        return self.b.load(self._place(address, at, kind), align=4)

    def _broadcast(self, address, at: int):
        return self._all(self.b.load(self._place(address, at, F32), align=4))

    def _all(self, scalar):
        kind = ir.VectorType(scalar.type, self.of.width)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, one, self._word(0))

    def _word(self, value: int) -> ir.Constant:
        return ir.Constant(self.words, [value] * self.of.width)
