"""Reads the listings of the TPU and GPU compilers: how many instructions a kernel costs, and of which kind.

A TPU executes one *bundle* per cycle, with slots for several units in it; libtpu writes the schedule, and the slots
used per bundle. Counts are static: stalls for memory are not in them, waits for a unit's latency are (empty bundles).
A GPU's machine code (SASS) is one instruction per line and warp. Both are plain text that changes between versions.
"""

import collections
import dataclasses
import functools
import math
import re

Counts = collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class Loop:
    """Bundles or instructions `start` to `stop` (not included) of a listing; how often it runs, if that is constant."""

    start: int
    stop: int
    trips: int | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A TPU kernel's code.

    Attributes:
      slots: per bundle, slots used by unit: MXU, XLU (shuffles), VALU, EUP (exp, ...), VPOP (results of these), VLOAD,
        VSTORE, SALU (scalars) and, beside the loads and stores, VLOAD:FILL and VSTORE:SPILL.
      loops: outer before inner; the first is over the grid.
      branches: what is jumped over where a condition does not hold, in order.
    """

    slots: tuple[Counts, ...]
    loops: tuple[Loop, ...]
    branches: tuple[Loop, ...] = ()

    @property
    def spills(self) -> int:
        """Spills to and fills from memory, in the code."""
        return sum(row["VSTORE:SPILL"] + row["VLOAD:FILL"] for row in self.slots)

    @functools.cached_property
    def step(self) -> Counts:
        """Slots used by one step of the grid, with "bundles", each inner loop counted as often as it runs.

        Everything predicated counts, so what only the first and last step of a row do is in it. The difference of two
        schedules that differ in the tokens per step is free of that.

        Raises:
          ValueError: for a loop whose number of iterations is not constant.
        """
        times = [1] * len(self.slots)
        for loop in self.loops[1:]:
            if loop.trips is None:
                raise ValueError(f"the loop at bundle {loop.start:#x} has no constant number of iterations")
            for i in range(loop.start, loop.stop):
                times[i] *= loop.trips
        total: Counts = collections.Counter()
        for row, n in zip(self.slots, times):
            total["bundles"] += n
            for unit, used in row.items():
                total[unit] += n * used
        return total

    def count(self, loop: Loop, left_out: tuple[Loop, ...] = ()) -> Counts:
        """Slots used by one iteration of a loop, with "bundles", without some of its parts."""
        total: Counts = collections.Counter()
        for i in range(loop.start, loop.stop):
            if not any(part.start <= i < part.stop for part in left_out):
                total["bundles"] += 1
                total.update(self.slots[i])
        return total


def schedule(slots: str, code: str) -> Schedule:
    """A kernel's schedule from libtpu's listings `*-final_hlo-static-per-bundle-utilization` and `*-final_bundles`.

    Raises:
      ValueError: where the two do not describe the same bundles.
    """
    rows = _slots(slots)
    bundles = _bundles(code)
    if len(rows) != len(bundles):
        raise ValueError(f"{len(rows)} rows of slots, but {len(bundles)} bundles of code")
    return Schedule(tuple(rows), tuple(_tpu_loops(bundles)), tuple(_tpu_branches(bundles)))


def _slots(text: str) -> list[Counts]:
    lines = text.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("MXU"))
    units = [name.strip() for name in lines[header].split(",")]
    rows = (
        line.split() for line in lines[header + 2 :] if re.fullmatch(r"[\d ]+", line)
    )  # a row of capacities is skipped
    return [collections.Counter({unit: int(n) for unit, n in zip(units, row) if n != "0"}) for row in rows]


_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) *(?:[A-Z]{2})? *: *(>*) *\{", re.MULTILINE)
_BRANCH = re.compile(r"sbr\.rel \(!?%\w+\) target = \$region(\d+)")
_EXIT = re.compile(r"= scmp\.ge\.s32\.totalorder (%s\w+), (\d+) /\* loop exit test")


def _bundles(code: str) -> list[str]:
    """The text of each bundle, in order."""
    starts = list(_BUNDLE.finditer(code))
    ends = [m.start() for m in starts[1:]] + [len(code)]
    return [code[m.end() : end] for m, end in zip(starts, ends)]


def _tpu_loops(bundles: list[str]) -> list[Loop]:
    """A loop is a region of the program that a branch in it leads back to the start of."""
    starts: dict[str, int] = {}
    stops: dict[str, int] = {}
    back: dict[str, int] = {}
    for i, text in enumerate(bundles):
        for kind, name in re.findall(r"(Start|End|Start/End empty) region (\d+)", text):
            if kind != "End":
                starts[name] = i
            if kind != "Start":
                stops[name] = i + 1
        back |= {name: i + 1 for name in _BRANCH.findall(text) if name in starts}
    # An end is not always told; what follows the branch back then, in its delay slots, is left out.
    spans = sorted({(starts[r], stops.get(r, after)) for r, after in back.items()}, key=lambda s: (s[0], -s[1]))
    loops = []
    for start, stop in spans:
        inner = [span for span in spans if start <= span[0] and span[1] <= stop and span != (start, stop)]
        own = (i for i in range(start, stop) if not any(a <= i < b for a, b in inner))
        loops.append(Loop(start, stop, _trips("".join(bundles[i] for i in own))))
    return loops


def _tpu_branches(bundles: list[str]) -> list[Loop]:
    """A branch leads forward to where a region starts."""
    starts = {
        name: i for i, text in enumerate(bundles) for name in re.findall(r"Start(?:/End empty)? region (\d+)", text)
    }
    jumps = ((i, starts.get(name, 0)) for i, text in enumerate(bundles) for name in _BRANCH.findall(text))
    return [Loop(i + 1, stop, 1) for i, stop in jumps if stop > i]


def _trips(body: str) -> int | None:
    """Iterations of a loop that counts from 0 in constant steps to a constant."""
    test = _EXIT.search(body)
    if not test:
        return None
    step = re.search(rf"{re.escape(test[1])} = sadd\.s32 (\d+), ", body)
    return -(-int(test[2]) // int(step[1])) if step else None


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """A GPU kernel's code.

    Attributes:
      registers: per thread.
      spill_bytes: stored to and loaded from local memory, per thread, in the code.
      shared_bytes: shared memory per block: what the kernel asks for when launched, and what is fixed.
      opcodes: of each instruction, in order, modifiers included.
      loops: inner loops may share a start with outer ones.
      branches: what is jumped over, by whatever condition, in order.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    opcodes: tuple[str, ...]
    loops: tuple[Loop, ...]
    branches: tuple[Loop, ...] = ()

    def count(self, loop: Loop | None = None, left_out: tuple[Loop, ...] = ()) -> Counts:
        """Instructions by opcode (without modifiers) in all of the code or in a loop, without some of its parts and
        without no-ops.

        Loops in it that run a constant number of times count as often.
        """
        start, stop = (loop.start, loop.stop) if loop else (0, len(self.opcodes))
        inner = [x for x in self.loops if x.trips and x != loop and start <= x.start and x.stop <= stop]
        total: Counts = collections.Counter()
        for i in range(start, stop):
            if self.opcodes[i] != "NOP" and not any(part.start <= i < part.stop for part in left_out):
                times = math.prod(x.trips or 1 for x in inner if x.start <= i < x.stop)
                total[self.opcodes[i].split(".")[0]] += times
        return total


def gpu_kernels(printed: str) -> dict[str, GpuKernel]:
    """The kernels in what Mosaic GPU prints: lists of resources, then ptxas's report and the code of each kernel."""
    resources = [int(n) for n in re.findall(r"Resources\(smem_scratch_bytes=(\d+)", printed)]
    parts = re.split(r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?' for", printed)[1:]
    names, texts = parts[::2], parts[1::2]
    if len(resources) < len(names):
        raise ValueError(f"{len(names)} kernels, but resources of {len(resources)}")
    # A kernel that is traced twice lists its resources twice.
    return {name: _gpu_kernel(text, shared) for name, text, shared in zip(names, texts, resources)}


def _gpu_kernel(text: str, shared: int) -> GpuKernel:
    """`text` is ptxas's report and the code; `shared` the shared memory that is asked for at launch."""
    report, _, sass = text.partition(".target")
    registers = re.search(r"[Uu]sed (\d+) registers", report)
    if registers is None:
        raise ValueError("ptxas reports no registers")
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    fixed = max((int(n) for n in re.findall(r"(\d+) bytes smem", report)), default=0)
    opcodes, loops, branches = _sass(sass)
    spilled = int(spills[1]) + int(spills[2]) if spills else 0
    return GpuKernel(int(registers[1]), spilled, shared + fixed, opcodes, loops, branches)


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_COMPARISON = re.compile(r"\bU?ISETP\.NE\S* U?P\d, U?PT, (U?R\d+), 0x([0-9a-f]+),")


def _sass(text: str) -> tuple[tuple[str, ...], tuple[Loop, ...], tuple[Loop, ...]]:
    """Opcodes, the loops (branches back to a label) and what other branches jump over."""
    labels: dict[str, int] = {}
    code: list[tuple[str, str, str]] = []  # predicate, opcode, operands
    spans, ahead = [], []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.search(line):
            target = re.search(r"`\((\.L_x_\w+)\)", found[3])
            if found[2].startswith("BRA") and target and target[1] in labels:
                spans.append((labels[target[1]], len(code) + 1))
            elif found[2].startswith("BRA") and target:
                ahead.append((len(code) + 1, target[1]))
            code.append((found[1] or "", found[2], found[3]))
    spans.sort(key=lambda span: (span[0], -span[1]))
    loops = []
    for start, stop in spans:
        leaf = not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in spans)
        body = "\n".join(opcode + rest for _, opcode, rest in code[start:stop])
        loops.append(Loop(start, stop, _sass_trips(body, code[stop - 1][0]) if leaf else None))
    branches = (Loop(start, labels[name], 1) for start, name in ahead if name in labels)
    return tuple(opcode for _, opcode, _ in code), tuple(loops), tuple(branches)


def _sass_trips(body: str, again: str) -> int | None:
    """Iterations of an innermost loop that counts a register from 0 in constant steps until it equals a constant.

    Two iterations are told by a flag: copied to the predicate `again` of the branch back, it is cleared for the second.
    """
    if again and (flag := re.search(rf"\bPLOP3\.LUT {again}, PT, PT, PT, (U?P\d), 0x80, 0x0", body)):
        cleared = rf"\bU?PLOP3\.LUT {flag[1]}, U?PT, U?PT, U?PT, U?PT, 0x40, 0x0"
        if re.search(cleared, body[flag.end() :]):
            return 2
    for register, bound in _COMPARISON.findall(body):
        step = re.search(rf"\b(?:U?IADD3|VIADD) {register}, {register}, 0x([0-9a-f]+)\b", body)
        if step and int(bound, 16) % int(step[1], 16) == 0:
            return int(bound, 16) // int(step[1], 16)
    return None
