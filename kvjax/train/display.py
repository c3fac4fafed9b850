"""What a run shows while it trains, and the log that it keeps."""

import collections
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 30.0  # between lines where the output is no terminal


class Log:
    """One JSON object per step in a `.jsonl` file; steps from `first` on are dropped when a run goes on from there."""

    def __init__(self, file: Path, first: int):
        kept = file.read_text().splitlines() if file.is_file() else []
        # A killed run can leave half a line, and steps that came after its last checkpoint.
        lines = [line for line in kept if _step(line) < first]
        partial = file.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in lines))
        partial.rename(file)
        self._file = file.open("a")

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


class Display:
    """A progress bar with loss, speed and time left; plain lines now and then where there is no terminal."""

    def __init__(self, steps: int, start: int, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._steps = steps
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=20)
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("{task.fields[phase]}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=start, phase="", loss=float("nan"), speed=0.0)

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, entry: dict[str, Any]) -> None:
        """Shows a log entry."""
        now = time.monotonic()
        self._recent.append((now, entry["tokens"]))
        (then, before), done = self._recent[0], entry["step"] + 1
        speed = (entry["tokens"] - before) / (now - then) if now > then else 0.0
        self._bar.update(self._task, completed=done, phase=entry["phase"], loss=entry["loss"], speed=speed)
        due = now - self._last_line > PLAIN_SECONDS or done == self._steps
        if not self._console.is_terminal and due and len(self._recent) > 1:
            self._last_line = now
            left = (self._steps - done) * (now - then) / max(1, len(self._recent) - 1)
            self.say(
                f"step {done}/{self._steps} ({entry['phase']}): loss {entry['loss']:.3f}, "
                f"{speed:,.0f} tokens/s, {left / 60:.1f} min left"
            )
