"""Shared memory of a block of 128 threads in numpy, watched: who reads and writes what between two barriers.

Times are *epochs*: each barrier of all threads begins one. Warps of an epoch may run in any order, the copy engine and
the tensor cores see what was written before the last fence and barrier, and nobody sees a copy before it is waited for.
What breaks that is a finding, whatever the order in which it was run here.
"""

import dataclasses

import numpy as np

THREADS = 128
WARP = np.arange(THREADS) // 32
SIZE, BASE = 227 << 10, 1 << 10  # of a block, and where it begins: aligned as on a device
WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SWIZZLED = {16: 0, 32: 1, 64: 3, 128: 7}  # by bytes: which bits of a line's number chunks of 16 bytes are exchanged by


def swizzle(at: np.ndarray, size: int) -> np.ndarray:
    return at ^ ((at >> 7 & SWIZZLED[size]) << 4)


@dataclasses.dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have."""

    count: int
    pending: int = 0
    bytes: int = 0
    phase: int = 0

    def __post_init__(self):
        self.pending = self.count

    def settle(self) -> None:
        assert self.pending >= 0
        if self.pending == self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count


@dataclasses.dataclass
class TensorMap:
    """What a copy of a box takes, as `cuTensorMapEncodeTiled` is told; sizes and strides in elements."""

    array: np.ndarray  # bytes
    itemsize: int
    sizes: list
    strides: list
    box: list
    swizzle: int

    def __post_init__(self):
        inner = self.box[-1] * self.itemsize
        assert len(self.box) <= 5 and max(self.box) <= 256 and inner % 16 == 0 and self.strides[-1] == 1
        assert all(s * self.itemsize % 16 == 0 for s in self.strides[:-1])
        assert self.swizzle == 16 or inner == self.swizzle

    def read(self, start: list) -> np.ndarray:
        """The bytes of the box; zeros beyond the array."""
        at, inside = np.zeros(1, np.int64), np.ones(1, bool)
        for size, stride, count, first in zip(self.sizes, self.strides, self.box, start, strict=True):
            i = first + np.arange(count)
            at, inside = (at[:, None] + i * stride).ravel(), (inside[:, None] & (i >= 0) & (i < size)).ravel()
        items = self.array.reshape(-1, self.itemsize)[np.where(inside, at, 0)]
        return np.where(inside[:, None], items, np.uint8(0)).ravel()


class Shared:
    """Addresses are as in the program; 2 bytes are watched together."""

    def __init__(self):
        self.bytes = np.full(BASE + SIZE, 0xFF, np.uint8)  # NaN, until written
        size = len(self.bytes) // 2
        self.written, self.read = np.full(size, -1), np.full(size, -1)  # the last epoch
        self.writer, self.readers = np.zeros(size, int), np.zeros(size, int)  # a warp, and a bit for each
        self.unfenced = np.zeros(size, int)  # 2: not fenced, 1: no barrier since
        self.under_way = np.zeros(size, int)  # the address of the barrier of the copy
        self.epoch = 0
        self.barriers: dict[int, Barrier] = {}
        self.findings: set[str] = set()
        self.where = ""

    def find(self, bad, what: str) -> None:
        if np.any(bad):
            self.findings.add(f"{what}: {self.where}")

    def _pieces(self, at: np.ndarray, size: int) -> np.ndarray:
        assert at.min() >= BASE and at.max() + size <= len(self.bytes), self.where
        assert not (at % size).any(), self.where
        return at[:, None] // 2 + np.arange(max(1, size // 2))

    def load(self, at: np.ndarray, size: int, count: int, active: np.ndarray) -> list[np.ndarray]:
        """`count` words of `size` bytes at each active thread's address."""
        pieces, warp = self._pieces(at[active], size * count), WARP[active]
        self.find(self.under_way[pieces] > 0, "read before its copy is waited for")
        self.find((self.written[pieces] == self.epoch) & (self.writer[pieces] != warp[:, None]), "read of a race")
        for w in range(4):
            mine = pieces[warp == w]
            self.readers[mine] = np.where(self.read[mine] == self.epoch, self.readers[mine], 0) | 1 << w
            self.read[mine] = self.epoch
        at = np.where(active, at, BASE)
        words = self.bytes[at[:, None] + np.arange(size * count)].view(WORD[size])
        return list(words.T)

    def store(self, at: np.ndarray, words: list[np.ndarray], size: int, active: np.ndarray) -> None:
        pieces, warp = self._pieces(at[active], size * len(words)), WARP[active, None]
        self.find(self.under_way[pieces] > 0, "write where a copy is under way")
        self.find((self.written[pieces] == self.epoch) & (self.writer[pieces] != warp), "writes that race")
        others = self.readers[pieces] & ~(1 << warp)
        self.find((self.read[pieces] == self.epoch) & (others > 0), "write of what others read")
        self.written[pieces], self.writer[pieces], self.unfenced[pieces] = self.epoch, warp, 2
        content = np.stack([w.astype(WORD[size]) for w in words], 1).view(np.uint8)
        self.bytes[at[active][:, None] + np.arange(size * len(words))] = content[active]

    def fence(self) -> None:
        self.unfenced[self.unfenced == 2] = 1

    def barrier(self) -> None:
        self.epoch += 1
        self.unfenced[self.unfenced == 1] = 0

    def copy(self, source: TensorMap, start: list, at: int, barrier: int) -> None:
        """The copy engine's, started by a thread of warp 0."""
        content = source.read(start)
        assert at % (128 if source.swizzle == 16 else 8 * source.swizzle) == 0 and at + len(content) <= len(self.bytes)
        pieces = np.arange(at // 2, (at + len(content)) // 2)
        self.find(self.under_way[pieces] > 0, "two copies to the same place")
        self.find((self.read[pieces] == self.epoch) & (self.readers[pieces] > 1), "copy over what others read")
        self.find((self.written[pieces] == self.epoch) | (self.unfenced[pieces] > 0), "copy over what is not fenced")
        self.bytes[swizzle(at + np.arange(len(content)), source.swizzle)] = content
        self.under_way[pieces] = barrier
        self.barriers[barrier].bytes -= len(content)
        self.barriers[barrier].settle()

    def wait(self, barrier: int, parity: int) -> None:
        assert self.barriers[barrier].phase != parity, f"waits forever: {self.where}"
        self.under_way[self.under_way == barrier] = 0

    def operand(self, descriptor: int, rows: int) -> np.ndarray:
        """The right operand `[rows, 16]` of `wgmma`, 16-bit patterns, its depth along lines of 128 bytes."""
        start, between, mode = ((descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4, descriptor >> 62)
        assert mode == 1 and descriptor >> 49 & 7 == 0, "swizzled by 128 bytes, and lines begin where they do"
        row = np.arange(rows)[:, None]
        at = swizzle(start + row // 8 * between + row % 8 * 128 + np.arange(32), 128)
        assert at.min() >= BASE and at.max() < len(self.bytes)
        pieces = at // 2
        self.find(self.under_way[pieces] > 0, "product before a copy is waited for")
        self.find((self.unfenced[pieces] > 0) | (self.written[pieces] == self.epoch), "product of what is not fenced")
        self.read[pieces], self.readers[pieces] = self.epoch, 15
        return self.bytes[at].view(np.uint16)

    def leave(self) -> None:
        self.find(self.under_way > 0, "nobody waits for a copy")
        self.find([b.pending != b.count or b.bytes for b in self.barriers.values()], "a barrier is left half-way")
