"""What the scripts share."""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

import kvjax
from kvjax.policy import preset


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


@contextlib.contextmanager
def one_line_errors():
    """Ends the script with one line on stderr and exit code 2 where the library refuses its input."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def check_targets(args: argparse.Namespace, *options: str) -> None:
    """Raises OSError, with the option's name, for a file that cannot be written: now, and not after an hour of work."""
    for option in options:
        path = getattr(args, option)
        if path is None:
            continue
        folder = Path(path).resolve().parent
        if Path(path).is_dir():
            raise IsADirectoryError(f"`{option}={path}` is a directory; name a file in it.")
        if not folder.is_dir():
            raise FileNotFoundError(f"`{option}={path}`: its directory does not exist; create it first.")
        if not os.access(path if Path(path).exists() else folder, os.W_OK):
            raise PermissionError(f"`{option}={path}` cannot be written; name another file.")


def check_folder(args: argparse.Namespace, option: str) -> None:
    """Raises OSError, with the option's name, for a folder that cannot be made or written to."""
    path = Path(getattr(args, option)).expanduser()
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"`{option}={path}`: {there} is a file; name a directory.")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"`{option}={path}` cannot be written to; name another directory.")


def versions() -> dict[str, str]:
    """What a report must name to be repeated."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {"kvjax": kvjax.__version__, "python": platform.python_version()} | packages


def environment() -> str:
    """Date, machine and versions, in one line."""
    from kvjax.evaluate import report  # not every script evaluates

    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{datetime.date.today()}, {report.machine()}; {packages}"


def compilers() -> str:
    """Versions of the compilers of TPUs and GPUs, as far as they are installed."""
    found = {}
    for name in ("libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvjitlink"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return "".join(f", {name} {version}" for name, version in found.items())


def show(parts: Sequence[Table | str]) -> None:
    """Tables and notes on stdout. Numbers are never cut: a table wider than the terminal wraps there."""
    for part in parts:
        if isinstance(part, str):
            Console(highlight=False).print(part, style="dim", soft_wrap=True, markup=False)
        else:
            widest = Console(width=1000).measure(part).maximum
            Console(highlight=False, width=max(Console().width, widest)).print(part)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def integers(value: str) -> list[int]:
    """The type of an option that takes numbers with commas between."""
    return [int(part) for part in value.split(",") if part]


def seed(value: str) -> int:
    """The type of --seed: JAX makes keys of 32 bits, so a larger number would draw the same as a smaller one."""
    if not (value.isascii() and value.isdigit()) or int(value) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{value!r} is no seed; write a whole number from 0 to {(1 << 32) - 1}")
    return int(value)


def tokens(value: str) -> int:
    """The type of an option that takes a number of tokens: 1048576, 10M (decimal), 128k, 1Mi (binary)."""
    units = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)([kKMG]i?|)", value.strip(), re.ASCII)
    number = float(re.sub("[_,]", "", found[1])) * units[found[2] if found[2] != "K" else "k"] if found else 0
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"{value!r} is no number of tokens; write 1048576, 10M, 128k or 1Mi")
    return int(number)


def presets(value: str) -> list[str]:
    """The names in a comma-separated list, each once; an unknown one is told before the model is loaded."""
    names = list(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    if not names:
        raise ValueError(f"`quant={value!r}` names no preset; pass e.g. --quant kvquant4,kvquant3.")
    for name in names:
        preset(name)
    return names
