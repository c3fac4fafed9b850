"""The progress bars of long evaluations."""

import contextlib
import datetime
import time
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)  # fmt: skip
from rich.text import Text


def bar(shown: bool, unit: str) -> Progress:
    """A bar on stderr with count, time spent and time left; nothing is left of it at the end."""
    return Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not shown,
    )


def growing_bar(shown: bool) -> Progress:
    """A bar like `bar` whose tasks say their own speed and time left, in the fields `speed` and `left`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens  {task.fields[speed]} "),
        TimeElapsedColumn(),
        TextColumn("left {task.fields[left]}"),
        console=Console(stderr=True),
        transient=True,
        disable=not shown,
    )


def seconds_left(calls: Sequence[tuple[int, float]], total: int) -> float:
    """Of a prefill whose tokens cost a + b * position each: the last calls' speed alone would promise too much.

    Args:
      calls: tokens and seconds since the start, first (0, 0.0), then at the end of each call.
    """
    tokens, seconds = np.asarray(calls, np.float64).T
    if len(calls) < 3:
        return float(seconds[-1] / tokens[-1] * (total - tokens[-1]))
    centre, cost = (tokens[1:] + tokens[:-1]) / 2, np.diff(seconds) / np.diff(tokens)
    b, a = np.polyfit(centre, cost, 1)
    return max(0.0, float((total - tokens[-1]) * (a + b * (total + tokens[-1]) / 2)))


def clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


class Units:
    """A bar over units of work of several kinds, whose time left comes from the units of each kind that are done.

    Speed alone would mislead: a passkey prompt, a window and a window of decode steps cost minutes or seconds.
    """

    def __init__(self, shown: bool, total: int, done: Sequence[tuple[str, float]] = ()):
        """`done`: kind and seconds of every unit that an earlier run finished."""
        self._seconds: dict[str, list[float]] = {}
        for kind, seconds in done:
            self._seconds.setdefault(kind, []).append(seconds)
        self._left: list[str] = []
        self._began: float | None = None
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[units]} units"),
            TimeElapsedColumn(),
            TextColumn("left"),
            _Left(self),
            console=Console(stderr=True),
            transient=True,
            disable=not shown,
        )
        self._row = self._progress.add_task("", total=total, completed=len(done), units=f"{len(done)}/{total}")
        self._total, self._done = total, len(done)

    def __enter__(self) -> "Units":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def plan(self, kinds: Sequence[str]) -> None:
        """Tells the kinds of the units that are to come, in order."""
        self._left = list(kinds)

    @contextlib.contextmanager
    def unit(self, name: str, kind: str) -> Iterator[None]:
        """A unit that is worked on; it counts as done when its block ends."""
        self._progress.update(self._row, description=name)
        self._began = began = time.perf_counter()
        yield
        self._seconds.setdefault(kind, []).append(time.perf_counter() - began)
        self._began = None
        self._left.remove(kind)
        self._done += 1
        self._progress.update(self._row, completed=self._done, units=f"{self._done}/{self._total}")

    def within(self, done: int, total: int) -> None:
        """Moves the bar inside a unit."""
        self._progress.update(self._row, completed=self._done + done / total)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the bar away while something else shows one."""
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()

    def seconds_left(self) -> float | None:
        """Mean seconds of its kind for every unit to come, less those spent on the present one; None if unknown."""
        if any(kind not in self._seconds for kind in self._left):
            return None
        left = sum(sum(self._seconds[kind]) / len(self._seconds[kind]) for kind in self._left)
        spent = 0.0 if self._began is None else time.perf_counter() - self._began
        return max(left - spent, 0.0)


class _Left(ProgressColumn):
    def __init__(self, units: Units):
        super().__init__()
        self._units = units

    def render(self, task: object) -> Text:
        seconds = self._units.seconds_left()
        return Text("-:--:--" if seconds is None else clock(seconds))
