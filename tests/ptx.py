"""Runs the PTX of a Mosaic GPU kernel in numpy, a block of 128 threads at a time, by the PTX ISA.

Each register is an array of all threads'. Threads that branch apart run on from the lowest address on, until they meet.
"""

import itertools
import operator
import re

import numpy as np
from ptx_shared import BASE, THREADS, WARP, WORD, Barrier, Shared

u16, u32, u64, f16, f32, f64 = np.uint16, np.uint32, np.uint64, np.float16, np.float32, np.float64
THREAD = np.arange(THREADS)
GROUP, LANE4 = THREAD % 32 // 4, THREAD % 4
TYPES = {f"{kind}{bits}": np.dtype(f"{sign}{bits // 8}") for kind, sign in (("u", "u"), ("b", "u"), ("s", "i"))
         for bits in (8, 16, 32, 64)} | {"f32": np.dtype(f32)}  # fmt: skip
REGISTERS = {"%rs": u16, "%rd": u64}  # by their names' beginning, others have 32 bits
PARAMETER, PARAMETERS = 1 << 20, 1 << 60  # how far apart they are, and where
SPACE = 36  # bits of an address in an array
BOTH = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "max": np.maximum,
    "min": np.minimum,
}  # fmt: skip
FLOAT = BOTH | {"fma": lambda a, b, c: a * b + c, "ex2": np.exp2, "lg2": np.log2}
INTEGER = BOTH | {
    "mad": lambda a, b, c: a * b + c, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "not": operator.invert,
}  # fmt: skip
WAIT = re.compile(r"\{[^{}]*mbarrier\.try_wait\.parity\.shared\.b64 P1, \[(\S+)\], (\S+), \S+;[^{}]*\}")


class Program:
    """An entry of a PTX module: statements `(guard, opcode, operands)`, and where labels are."""

    def __init__(self, text: str):
        head, body = text[text.index(".visible .entry") :].split("\n{", 1)
        self.parameters = len(re.findall(r"\.param \.u64", head))
        body = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*$", "", body, flags=re.M)
        open_scopes = itertools.accumulate((1 if x[0] == "{" else -1 for x in re.finditer(r"[{}]", body)), initial=1)
        closed = list(re.finditer(r"[{}]", body))[list(open_scopes).index(0) - 1]
        body = WAIT.sub(r"wait \1, \2;", body[: closed.start()])
        self.statements: list[tuple] = []
        self.labels: dict[str, int] = {}
        for part in re.split(r";", body):
            # Before a statement: labels, and where scopes of inline assembly begin and end.
            while before := re.match(r"\s*(?:(\$?\w+):(?!:)|[{}])\s*", part):
                if before[1]:
                    self.labels[before[1]] = len(self.statements)
                part = part[before.end() :]
            part = part.strip()
            if not part or part.startswith("."):
                continue
            guard, opcode, operands = re.fullmatch(r"(@!?[%\w]+\s+)?(\S+)\s*(.*)", part, re.S).groups()
            operands = re.findall(r"[^\s,{}\[\]|]+|\{[^{}]*\}|\[[^\]]*\]", operands.replace("\n", " "))
            self.statements.append(((guard or "").strip()[1:], opcode, operands))


class Block:
    """One block of a grid."""

    def __init__(self, program: Program, parameters: list[np.ndarray], maps: list, place: tuple[int, int, int]):
        self.program, self.arrays, self.maps = program, parameters, maps
        self.shared, self.registers = Shared(), {"%tid.x": THREAD.astype(u32)}
        self.registers |= {f"%ctaid.{x}": np.full(THREADS, i, u32) for x, i in zip("xyz", place)}

    def run(self) -> set[str]:
        """What was found to break rules."""
        at, end = np.zeros(THREADS, int), len(self.program.statements)
        while (here := at.min()) < end:
            active, (guard, opcode, operands) = at == here, self.program.statements[here]
            self.shared.where = f"{here} {opcode} {', '.join(operands)}"[:120]
            at[active] += 1
            chosen = active & self.predicate(guard) if guard else active
            if opcode.startswith("bra"):
                at[chosen] = self.program.labels[operands[0]]
            elif opcode == "ret":
                at[chosen] = end
            elif opcode == "bar.sync":
                assert chosen.all(), f"not all threads come to {self.shared.where}"
                self.shared.barrier()
            elif chosen.any():
                first, *rest = opcode.split(".")
                with np.errstate(all="ignore"):
                    getattr(self, f"_{first}", self._compute)(first, rest, operands, chosen)
        self.shared.leave()
        return self.shared.findings

    # Operands

    def predicate(self, name: str) -> np.ndarray:
        return ~self.registers[name[1:]] if name[0] == "!" else self.registers[name]

    def get(self, name: str, kind=u32) -> np.ndarray:
        kind = np.dtype(kind)
        if name in self.registers:
            x = self.registers[name]
            return (x.astype(WORD[kind.itemsize]) if x.itemsize > kind.itemsize else x).view(kind)
        if name.startswith("__dynamic_shmem__"):
            return np.full(THREADS, BASE, kind)
        if "_param_" in name:
            return np.full(THREADS, PARAMETERS + PARAMETER * int(name.rsplit("_", 1)[1]), kind)
        bits = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return np.full(THREADS, bits & (1 << 8 * kind.itemsize) - 1, WORD[kind.itemsize]).view(kind)

    def set(self, name: str, x: np.ndarray, active: np.ndarray) -> None:
        if x.dtype != bool:
            x = np.ascontiguousarray(x).view(WORD[x.itemsize])
        if not active.all() and name in self.registers:
            x = np.where(active, x, self.registers[name])
        self.registers[name] = x

    def address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        return self.get(base, self.registers[base].dtype if base in self.registers else u64).astype(int) + int(
            offset or 0
        )

    @staticmethod
    def names(operand: str) -> list[str]:
        return re.findall(r"[^\s,{}]+", operand)

    def halves(self, name: str, kind: str = "f16") -> tuple[np.ndarray, np.ndarray]:
        """Both 16-bit floats of a register as float64."""
        words = self.get(name)
        parts = (words & u32(0xFFFF), words >> u32(16))
        if kind == "bf16":
            return tuple((x << u32(16)).view(f32).astype(f64) for x in parts)
        return tuple(x.astype(u16).view(f16).astype(f64) for x in parts)

    # Moves

    def _ignore(self, first, kinds, operands, active) -> None:
        pass

    _prefetch = _ignore

    def _mov(self, first, kinds, operands, active) -> None:
        target, source = operands
        if kinds[-1] == "pred":
            return self.set(
                target, self.registers[source] if source in self.registers else self.get(source) > 0, active
            )
        kind = TYPES[kinds[-1]]
        half = np.dtype(f"u{kind.itemsize // 2}")
        shift = kind.type(4 * kind.itemsize)
        if source[0] == "{":
            low, high = (self.get(x, half).astype(kind) for x in self.names(source))
            self.set(target, low | high << shift, active)
        elif target[0] == "{":
            for name, x in zip(self.names(target), (self.get(source, kind), self.get(source, kind) >> shift)):
                self.set(name, x.astype(half), active)
        else:
            self.set(target, self.get(source, kind), active)

    def _cvta(self, first, kinds, operands, active) -> None:
        self.set(operands[0], self.get(operands[1], u64), active)

    def _ld(self, first, kinds, operands, active) -> None:
        names, size = self.names(operands[0]), TYPES[kinds[-1]].itemsize
        if kinds[0].startswith("param"):
            number = int(operands[1].strip("[]").rsplit("_", 1)[1])
            return self.set(names[0], np.full(THREADS, (number + 1) << SPACE, u64), active)
        at = self.address(operands[1])
        if "shared" in kinds:
            words = self.shared.load(at, size, len(names), active)
        else:
            array, at = self._array(at, size * len(names), active)
            words = list(array[at[:, None] + np.arange(size * len(names))].view(WORD[size]).T)
        for name, x in zip(names, words):
            wide = np.dtype(REGISTERS.get(name[:3], u32))
            self.set(
                name, np.ascontiguousarray(x).view(TYPES[kinds[-1]]).astype(wide) if wide.itemsize > size else x, active
            )

    def _st(self, first, kinds, operands, active) -> None:
        names, size = self.names(operands[1]), TYPES[kinds[-1]].itemsize
        words, at = [self.get(x, WORD[size]) for x in names], self.address(operands[0])
        if "shared" in kinds:
            return self.shared.store(at, words, size, active)
        array, at = self._array(at, size * len(names), active)
        array[at[active][:, None] + np.arange(size * len(names))] = np.stack(words, 1).view(np.uint8)[active]

    def _array(self, at: np.ndarray, size: int, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of addresses in device memory: the array they are in, as bytes, and where in it."""
        (number,) = set(at[active] >> SPACE)
        array, at = self.arrays[number - 1], np.where(active, at & (1 << SPACE) - 1, 0)
        assert at.max() + size <= len(array) and not (at % size).any(), self.shared.where
        return array, at

    # Between threads

    def _elect(self, first, kinds, operands, active) -> None:
        leader = active & (np.cumsum(active.reshape(4, 32), 1) == 1).ravel()
        self.set(operands[1], leader, active)

    def _shfl(self, first, kinds, operands, active) -> None:
        assert active.all()
        lane = THREAD % 32 ^ int(operands[2]) if kinds[1] == "bfly" else int(operands[2])
        self.set(operands[0], self.get(operands[1])[32 * WARP + lane], active)

    def _fence(self, first, kinds, operands, active) -> None:
        assert active.all()
        if kinds[0] == "proxy":
            self.shared.fence()

    def _mbarrier(self, first, kinds, operands, active) -> None:
        if kinds[0] == "init":
            (at,), (count,) = self.address(operands[0])[active], self.get(operands[1])[active]
            assert at not in self.shared.barriers
            self.shared.barriers[at] = Barrier(int(count))
            return
        (at,) = set(self.address(operands[1])[active])
        barrier = self.shared.barriers[at]
        barrier.bytes += int(self.get(operands[2])[active].sum())
        barrier.pending -= int(active.sum())
        barrier.settle()

    def _wait(self, first, kinds, operands, active) -> None:
        (at,), (parity,) = (set(x[active]) for x in (self.address(operands[0]), self.get(operands[1])))
        self.shared.wait(at, parity)

    def _cp(self, first, kinds, operands, active) -> None:
        (thread,) = np.flatnonzero(active)
        assert kinds[:3] == ["async", "bulk", "tensor"] and thread < 32
        name, *start = re.findall(r"[^\s,{}\[\]]+", operands[1])
        number, past = divmod(int(self.get(name, u64)[thread]) - PARAMETERS - PARAMETER * self.program.parameters, 128)
        start = [int(self.get(x, np.int32)[thread]) for x in reversed(start)]
        at, barrier = (int(self.address(x)[thread]) for x in (operands[0], operands[2]))
        assert past == 0
        self.shared.copy(self.maps[number], start, at, barrier)

    # Arithmetic

    def _setp(self, first, kinds, operands, active) -> None:
        kind = TYPES[kinds[-1]]
        found = getattr(operator, kinds[0])(*(self.get(x, kind) for x in operands[1:3]))
        if kinds[1:-1]:
            found = INTEGER[kinds[1]](found, self.predicate(operands[3]))
        self.set(operands[0], found, active)

    def _selp(self, first, kinds, operands, active) -> None:
        a, b = (self.get(x, WORD[TYPES[kinds[-1]].itemsize]) for x in operands[1:3])
        self.set(operands[0], np.where(self.predicate(operands[3]), a, b), active)

    def _shift(self, first, kinds, operands, active) -> None:
        kind = TYPES[kinds[-1]]
        x, by, bits = self.get(operands[1], kind), self.get(operands[2]).astype(int), 8 * kind.itemsize
        found = (np.left_shift if first == "shl" else np.right_shift)(x, np.minimum(by, bits - 1).astype(kind))
        self.set(operands[0], np.where((by >= bits) & (kind.kind == "u"), kind.type(0), found), active)

    _shl = _shr = _shift

    def _shf(self, first, kinds, operands, active) -> None:
        low, high, by = (self.get(x).astype(u64) for x in operands[1:])
        assert kinds[1] == "wrap"
        both, by = low | high << u64(32), by & u64(31)
        self.set(operands[0], (both >> by if kinds[0] == "r" else both << by >> u64(32)).astype(u32), active)

    def _prmt(self, first, kinds, operands, active) -> None:
        a, b, select = (self.get(x) for x in operands[1:])
        assert kinds == ["b32"]
        both = np.concatenate([x[:, None].view(np.uint8) for x in (a, b)], 1)
        nibbles = select[:, None] >> u32(4) * np.arange(4, dtype=u32) & u32(15)
        found = np.take_along_axis(both, (nibbles & 7).astype(int), 1)
        found = np.where(nibbles & 8, (found >> 7) * np.uint8(255), found)
        self.set(operands[0], found.view(u32)[:, 0], active)

    def _lop3(self, first, kinds, operands, active) -> None:
        inputs, table = [self.get(x) for x in operands[1:4]], int(operands[4], 0)
        found = np.zeros(THREADS, u32)
        for i in range(8):
            if table >> i & 1:
                a, b, c = (x if i >> 2 - j & 1 else ~x for j, x in enumerate(inputs))
                found |= a & b & c
        self.set(operands[0], found, active)

    def _cvt(self, first, kinds, operands, active) -> None:
        to, of = kinds[-2:]
        if to in ("f16x2", "bf16x2"):
            high, low = (_rounded(self.get(x, f32), to[:-2]) for x in operands[1:])
            found = low.astype(u32) | high.astype(u32) << u32(16)
        elif of == "f16":
            found = self.get(operands[1], u16).view(f16).astype(TYPES[to])
        elif to == "f16":
            found = self.get(operands[1], f32).astype(f16)
        else:
            found = self.get(operands[1], TYPES[of]).astype(TYPES[to])
        self.set(operands[0], found, active)

    def _compute(self, first, kinds, operands, active) -> None:
        target, *operands = operands
        if kinds[-1] == "f16x2":
            assert "ftz" not in kinds
            low, high = (FLOAT[first](*x).astype(f16).view(u16).astype(u32) for x in zip(*map(self.halves, operands)))
            return self.set(target, low | high << u32(16), active)
        if kinds[-1] == "f32":
            assert first not in ("max", "min") or "NaN" in kinds
            found = FLOAT[first](*(self.get(x, f32).astype(f64) for x in operands)).astype(f32)
            return self.set(
                target, np.where(abs(found) < 2.0**-126, f32(0), found) if "ftz" in kinds else found, active
            )
        if kinds[-1] == "pred":
            return self.set(target, INTEGER[first](*map(self.predicate, operands)), active)
        kind = TYPES[kinds[-1]]
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}") if {"wide", "hi"} & {*kinds} else kind
        found = INTEGER[first](
            *(self.get(x, kind).astype(wide) for x in operands[:2]), *(self.get(x, wide) for x in operands[2:])
        )
        if "hi" in kinds:
            found = (found >> wide.type(8 * kind.itemsize)).astype(kind)
        self.set(target, np.maximum(found, 0) if "relu" in kinds else found, active)

    # Matrices

    def _ldmatrix(self, first, kinds, operands, active) -> None:
        assert active.all()
        names = self.names(operands[0])
        given = np.less(THREAD % 32, 8 * len(names))  # lanes that name a row
        rows = self.shared.load(self.address(operands[1]), 4, 4, given)
        rows = np.stack(rows, 1).view(u16).reshape(4, 4, 8, 8)
        for i, name in enumerate(names):
            x = rows[:, i].swapaxes(1, 2) if "trans" in kinds else rows[:, i]
            low, high = (x[WARP, GROUP, 2 * LANE4 + j].astype(u32) for j in range(2))
            self.set(name, low | high << u32(16), active)

    def _stmatrix(self, first, kinds, operands, active) -> None:
        assert active.all()
        rows, names = np.zeros((4, 4, 8, 8), u16), self.names(operands[1])
        for i, name in enumerate(names):
            x = np.zeros((4, 8, 8), u16)
            for j, part in enumerate((self.get(name) & u32(0xFFFF), self.get(name) >> u32(16))):
                x[WARP, GROUP, 2 * LANE4 + j] = part
            rows[:, i] = x.swapaxes(1, 2) if "trans" in kinds else x
        words = rows.reshape(THREADS, 8).view(u32)
        self.shared.store(self.address(operands[0]), list(words.T), 4, np.less(THREAD % 32, 8 * len(names)))

    def _left(self, names: list[str], kind: str) -> np.ndarray:
        """`[64, 16]`, 16 rows of each warp."""
        x = np.zeros((64, 16))
        for i, name in enumerate(names):
            row, column = 16 * WARP + GROUP + 8 * (i % 2), 2 * LANE4 + 8 * (i // 2)
            x[row, column], x[row, column + 1] = self.halves(name, kind)
        return x

    def _mma(self, first, kinds, operands, active) -> None:
        assert active.all() and kinds[2:] == ["m16n8k16", "row", "col", "f32", "f16", "f16", "f32"]
        target, left, right, start = map(self.names, operands)
        b = np.zeros((4, 16, 8))
        for i, name in enumerate(right):
            row = 2 * LANE4 + 8 * i
            b[WARP, row, GROUP], b[WARP, row + 1, GROUP] = self.halves(name)
        found = (self._left(left, "f16").reshape(4, 16, 16) @ b).reshape(64, 8)
        for i, (name, x) in enumerate(zip(target, start)):
            here = found[16 * WARP + GROUP + 8 * (i // 2), 2 * LANE4 + i % 2]
            self.set(name, (here + self.get(x, f32)).astype(f32), active)

    def _wgmma(self, first, kinds, operands, active) -> None:
        assert active.all()
        if kinds[0] != "mma_async":  # fences and waits are in place: nothing is left under way
            return
        target, left, kind = self.names(operands[0]), self.names(operands[1]), kinds[-1]
        (descriptor,) = set(self.get(operands[2], u64))
        assert len(left) == 4 and operands[4:] == ["1", "1", "0"]
        bits = self.shared.operand(int(descriptor), 2 * len(target))
        right = (bits.astype(u32) << u32(16)).view(f32) if kind == "bf16" else bits.view(f16)
        found = self._left(left, kind) @ right.astype(f64).T
        for i, name in enumerate(target):
            here = found[16 * WARP + GROUP + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * LANE4 + i % 2]
            more = self.predicate(operands[3]).any()
            self.set(name, (here + self.get(name, f32) if more else here).astype(f32), active)


def _rounded(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 to the bits of a 16-bit float, to nearest even."""
    if kind == "f16":
        return x.astype(f16).view(u16)
    bits = x.view(u32)
    found = (bits + u32(0x7FFF) + (bits >> u32(16) & u32(1))) >> u32(16)
    return np.where(np.isnan(x), u32(0x7FFF), found).astype(u16)
