"""Stored numbers as float32 in LLVM's own vectors, compiled by numba: what its loops do not become by themselves.

numba makes 64 bits of two 32-bit integers, and LLVM no permutation of a table that is read in a loop: AVX-512 permutes
16 float32 by 4 bits of an index, AVX2 8 by 3 bits. Elsewhere a tree of selects, one bit after the other.
"""

import contextlib
import dataclasses
import math
import platform
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils

from pallas_kernels import packing
from pallas_kernels.decode_attention.formats import Codebook, Dense, Format, shape_of

I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
SMALLEST, LARGEST = 4, 16  # lanes
_PERMUTATIONS = {"avx512f": (16, "llvm.x86.avx512.permvar.sf.512"), "avx2": (8, "llvm.x86.avx2.permps")}


def permutation() -> tuple[int, str] | None:
    """Lanes and name of this machine's permutation of float32, if it has one."""
    features = llvmlite.binding.get_host_cpu_features()
    return next((found for feature, found in _PERMUTATIONS.items() if features.get(feature)), None)


def lanes() -> int:
    """Of this machine's vector registers."""
    found = permutation()
    return found[0] if found else SMALLEST


def registers() -> int:
    """How many vectors this machine holds."""
    return 16 if platform.machine().lower() in ("x86_64", "amd64") and lanes() < LARGEST else 32


def in_parts(count: int, most: int) -> list[range]:
    """The numbers below `count`, in the fewest parts of at most so many, about equal."""
    parts = -(-count // most)
    return [range(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """One block and head of stored keys or values, in *cells*, each with several *fields*: the numbers of one token.

    Attributes:
      kind: what is stored: numbers, codes, or codes of `2**bits` levels (repeated to 16).
      bits: of a number.
      tokens, channels: T, H.
    """

    kind: Literal["bfloat16", "float16", "codes", "levels"]
    bits: int
    tokens: int
    channels: int

    @classmethod
    def of(cls, fmt: Format) -> "Numbers":
        *_, T, H = shape_of(fmt)
        if isinstance(fmt, Dense):
            return cls(fmt.dtype, 16, T, H)
        return cls("levels" if isinstance(fmt, Codebook) else "codes", fmt.bits, T, H)

    @property
    def packed(self) -> bool:
        return self.kind in ("codes", "levels")

    @property
    def fields(self) -> int:
        return packing.codes_per_cell(self.bits) if self.packed else math.gcd(8, self.tokens)

    @property
    def cells(self) -> int:
        return self.tokens // self.fields

    @property
    def steps(self) -> tuple[int, int]:
        """Tokens from a field to the next, and from a cell to the next."""
        return (self.cells, 1) if self.packed else (1, self.fields)

    @property
    def itemsize(self) -> int:
        """Bytes that stand for a channel in a row."""
        return 4 if self.packed else 2

    @property
    def rows(self) -> tuple[int, int, int]:
        """Rows of a cell, and how many rows it is from one to the next, and from a cell to the next."""
        return (self.fields * self.bits // 32, self.cells, 1) if self.packed else (self.fields, 1, self.fields)

    @property
    def nbytes(self) -> int:
        return self.tokens * self.bits // 8 * self.channels


class Emitter:
    """Writes instructions that read `Numbers`, a register of channels at a time.

    Args:
      channels: that are read from where a row begins: whole registers of `width` channels.
    """

    def __init__(self, builder: ir.IRBuilder, numbers: Numbers, channels: int):
        self.b, self.numbers, self.width = builder, numbers, math.gcd(lanes(), channels)
        self.words, self.floats = ir.VectorType(I32, self.width), ir.VectorType(F32, self.width)
        found = permutation()
        self.permute = found[1] if found and found[0] == self.width else None

    # Loops and memory. Addresses and offsets are numbers of 64 bits or Python's.

    @contextlib.contextmanager
    def loop(self, count: int, step: int = 1) -> Iterator[Any]:
        """0, step, 2 * step, ..."""
        with cgutils.for_range(self.b, ir.Constant(I64, count)) as loop:
            yield self.times(loop.index, step)

    def carried(self, values: list) -> list:
        """Memory of a loop's variables, which LLVM turns into registers."""
        places = [cgutils.alloca_once(self.b, x.type) for x in values]
        self.store_all(values, places)
        return places

    def load_all(self, places: list) -> list:
        return [self.b.load(x) for x in places]

    def store_all(self, values: list, places: list) -> None:
        for x, place in zip(values, places):
            self.b.store(x, place)

    def times(self, x, n: int):
        return self.b.mul(x, ir.Constant(I64, n))

    def sum(self, *terms):
        values = [ir.Constant(I64, x) if isinstance(x, int) else x for x in terms]
        total = values[0]
        for x in values[1:]:
            total = self.b.add(total, x)
        return total

    def load(self, kind, *address):
        return self.b.load(self.place(kind, *address), align=2 if kind == self._halves else 4)

    def place(self, kind, *address):
        return self.b.inttoptr(self.sum(*address), kind.as_pointer())

    def broadcast(self, *address):
        return self._all(self.load(F32, *address))

    def zero(self):
        return ir.Constant(self.floats, [0.0] * self.width)

    def prefetch(self, *address) -> None:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), I32, I32, I32])
        function, how = self._function("llvm.prefetch.p0i8", kind), [ir.Constant(I32, n) for n in (0, 3, 1)]
        self.b.call(function, [self.place(ir.IntType(8), *address), *how])

    # Numbers.

    def tables(self, levels) -> list:
        """Levels in registers, if there are any."""
        if self.numbers.kind != "levels":
            return []
        if self.permute:
            return [self.load(self.floats, levels, 4 * i) for i in range(0, 2 ** max(self.numbers.bits, 3), self.width)]
        return [self.broadcast(levels, 4 * i) for i in range(2**self.numbers.bits)]

    def cell(self, base, cell):
        """Where a cell's first row is."""
        return self.sum(base, self.times(cell, self.numbers.rows[2] * self.numbers.channels * self.numbers.itemsize))

    def prefetch_cell(self, cell, channel, ahead) -> None:
        """Asks for what lies `ahead` bytes from the rows of a cell, at a register's channels."""
        for i in range(self.numbers.rows[0]):
            self.prefetch(cell, self.times(channel, self.numbers.itemsize), ahead, i * self._row_step)

    def reader(self, tables: list, cell, channel) -> Callable[[int], Any]:
        """`number(field)`: float32 of a cell's channels from `channel` on."""
        start, held = self.sum(cell, self.times(channel, self.numbers.itemsize)), {}

        def row(i: int):
            if i not in held:
                held[i] = self.load(self.words if self.numbers.packed else self._halves, start, i * self._row_step)
            return held[i]

        if not self.numbers.packed:
            number = self._brain if self.numbers.kind == "bfloat16" else self.half
            return lambda field: number(self.b.zext(row(field), self.words))
        return lambda field: self._decoded(tables, field, row)

    def _decoded(self, tables: list, field: int, word: Callable[[int], Any]):
        b, bits = self.b, self.numbers.bits
        index, right = divmod(field * bits, 32)
        code = b.lshr(word(index), self.word(right)) if right else word(index)
        if right + bits > 32:  # at 3 bits: the rest is in the next word
            code = b.or_(code, b.shl(word(index + 1), self.word(32 - right)))
        if not tables:
            return b.sitofp(b.and_(code, self.word(2**bits - 1)), self.floats)
        if not self.permute:
            return self._select(tables, code, 0)
        # The bits of an index beyond the lanes are not looked at, and the table repeats what the code's bits reach.
        function = self._function(self.permute, ir.FunctionType(self.floats, [self.floats, self.words]))
        return self._select([b.call(function, [table, code]) for table in tables], code, bits - 1)

    def _select(self, values, code, bit):
        """The value whose number is `code >> bit`."""
        while len(values) > 1:
            is_set = self.b.icmp_unsigned("!=", self.b.and_(code, self.word(1 << bit)), self.word(0))
            values = [self.b.select(is_set, high, low) for low, high in zip(values[::2], values[1::2])]
            bit += 1
        return values[0]

    def half(self, bits):
        """float32 of float16 bits in the lower halves of words; what is not finite may become so."""
        b = self.b
        if llvmlite.binding.get_host_cpu_features().get("f16c"):
            halves = b.bitcast(b.trunc(bits, self._halves), ir.VectorType(ir.HalfType(), self.width))
            return b.fpext(halves, self.floats)
        size = b.and_(bits, self.word(0x7FFF))
        # Subnormal ones as integers: XLA's threads take subnormal float32 for 0.
        scale = ir.Constant(self.floats, [2.0**-24] * self.width)
        small = b.bitcast(b.fmul(b.sitofp(size, self.floats), scale), self.words)
        value = b.add(b.shl(size, self.word(13)), self.word((127 - 15) << 23))
        value = b.select(b.icmp_unsigned("<", size, self.word(0x400)), small, value)
        return b.bitcast(b.or_(value, b.shl(b.and_(bits, self.word(0x8000)), self.word(16))), self.floats)

    def _brain(self, bits):
        return self.b.bitcast(self.b.shl(bits, self.word(16)), self.floats)

    # Arithmetic.

    def multiply_add(self, a, b, c):
        kind = ir.FunctionType(self.floats, [self.floats] * 3)
        return self.b.call(self._function(f"llvm.fmuladd.v{self.width}f32", kind), [a, b, c])

    def sums(self, vectors: list) -> list:
        """The sum of the lanes of each vector, one number each, in order.

        16 of 16 lanes take 45 instructions, a third of what they take one by one.
        """
        count = len(vectors)
        vectors = vectors + [ir.Constant(self.floats, ir.Undefined)] * (-count % self.width)
        for left, right in _stages(self.width):
            vectors = [
                self.b.fadd(*(self.b.shuffle_vector(a, b, ir.Constant(self.words, x)) for x in (left, right)))
                for a, b in zip(vectors[::2], vectors[1::2])
            ]
        numbers = (divmod(i, self.width) for i in range(count))
        return [self.b.extract_element(vectors[n], ir.Constant(I32, lane)) for n, lane in numbers]

    @property
    def _row_step(self) -> int:
        """Bytes from one of a cell's rows to the next."""
        return self.numbers.rows[1] * self.numbers.channels * self.numbers.itemsize

    @property
    def _halves(self) -> ir.VectorType:
        return ir.VectorType(I16, self.width)

    def _function(self, name: str, kind: ir.FunctionType) -> ir.Function:
        return self.b.module.globals.get(name) or ir.Function(self.b.module, kind, name)

    def _all(self, scalar):
        kind = ir.VectorType(scalar.type, self.width)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, one, self.word(0))

    def word(self, value: int) -> ir.Constant:
        return ir.Constant(self.words, [value] * self.width)


def _stages(width: int) -> list[tuple[list[int], list[int]]]:
    """Which lanes of two vectors, side by side, are added to which, until each lane is the sum of another vector.

    Within 128 bits first, then quarters of a register: for both there are instructions without a table.
    """
    quarters = range(0, width, 4)
    single = [i for q in quarters for i in (q, width + q, q + 1, width + q + 1)]
    double = [i for q in quarters for i in (q, q + 1, width + q, width + q + 1)]
    stages = [(x, [i + 2 for i in x]) for x in (single, double)]

    def of_both(starts: Iterable[int]) -> list[int]:
        return [side + start + i for side in (0, width) for start in starts for i in range(4)]

    if width == 16:
        stages.append((of_both((0, 4)), of_both((8, 12))))
    if width >= 8:
        stages.append((of_both(range(0, width, 8)), of_both(range(4, width, 8))))
    return stages
