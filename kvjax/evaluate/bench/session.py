"""Everything in one command on a fresh machine: correctness, the table, the headline, each in a process of its own.

A kernel that hangs or crashes takes its process with it: then the check goes on with the next storage, and the
others are timed all the same. Every process writes its figures as it goes, so what a time limit cuts off is not lost.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DEVICE_LOST = 3  # exit code of a check whose device answers no more
_SILENCE_S = 150  # without a new row, after which a check hangs
_HEADLINE_S = 150


def run(
    script: str, options: Sequence[str], storages: Sequence[str], out: Path, seconds: float, headline: Sequence[str]
):
    """Runs the parts and returns the exit code of the whole: 0 where all of them ended well.

    Args:
      script: the benchmark's own file.
      options: for check and table, as on its command line.
      storages: to check, and to time where they are right.
      out: folder for check.json, attention.json, attention.png, headline.json.
      seconds: for everything.
      headline: options of the headline, which comes last; none to leave it out.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    rows = check(script, options, storages, out / "check.json")
    good = all(row["status"] in ("ok", "unsupported") for row in rows)
    reserve = _HEADLINE_S if headline else 0
    left = max(30.0, end - time.monotonic() - reserve)
    table = [*options, "--quant", ",".join(storages), "--checked", str(out / "check.json"), "--attention"]
    table += ["--json", str(out / "attention.json"), "--seconds", f"{left:.0f}"]
    if importlib.util.find_spec("matplotlib"):
        table += ["--plot", str(out / "attention.png")]
    good &= _part(script, table, left + 90) == 0
    if headline:
        arguments = ["--headline", *headline, "--json", str(out / "headline.json")]
        good &= (
            _part(script, arguments, max(60.0, end - time.monotonic()), {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".98"}) == 0
        )
    return 0 if good else 1


def check(script: str, options: Sequence[str], storages: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """Checks all storages, in as many processes as it takes; rows as of `attention.check`, which `path` holds."""
    rows: list[dict[str, Any]] = []
    together = True
    part = path.with_suffix(".part.json")
    while left := [name for name in storages if name not in {row["storage"] for row in rows}]:
        part.unlink(missing_ok=True)
        left = left if together else left[:1]
        arguments = [*options, "--check", "--quant", ",".join(left), "--json", str(part)]
        code = _part(script, arguments, _SILENCE_S, progress=lambda: len(_rows(part)))
        found = _rows(part)
        rows += found
        if len(found) < len(left) and (code != DEVICE_LOST or not found):
            if together and not found:  # any of them, while they were compiled
                together = False
                continue
            why = "no answer" if code is None else f"the process ended with code {code}"
            rows.append({"storage": left[len(found)], "status": "failed", "reason": why})
    report = json.loads(part.read_text()) if part.is_file() else {}
    path.write_text(json.dumps(report | {"rows": rows}, indent=2) + "\n", encoding="utf-8")
    part.unlink(missing_ok=True)
    return rows


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text())["rows"]
    except (OSError, ValueError):  # not there yet, or half written
        return []


def _part(
    script: str,
    arguments: Sequence[str],
    seconds: float,
    environment: dict[str, str] | None = None,
    progress: Callable[[], int] = lambda: 0,
) -> int | None:
    """The exit code of one part; None where it made no progress for `seconds` and was killed."""
    print(f"$ {Path(script).name} {' '.join(arguments)}", flush=True)
    process = subprocess.Popen([sys.executable, script, *arguments], env=os.environ | (environment or {}))
    seen, since = progress(), time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        if progress() != seen:
            seen, since = progress(), time.monotonic()
        if time.monotonic() - since > seconds:
            process.kill()
            process.wait()
            return None
    return process.returncode
