"""Numbered saves in a directory: arrays by name and a JSON of facts, written in the background by Orbax.

    DIRECTORY/cache_3/leaves    the arrays, each device's part by itself
    DIRECTORY/cache_3/facts     what they are, and a checksum of each
    DIRECTORY/cache_3/files.json    the files and their sizes

A save is written beside the former one, under a temporary name, and takes its place when it is whole: whatever is
killed, and whenever, leaves the newest complete save readable. Arrays are checked bit by bit when they are read.
"""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from kvjax.saving.facts import FORMAT
from kvjax.saving.leaves import digests

# A file's unit of reading: devices of another mesh read parts of what one device wrote.
_CHUNK_BYTES = 32 * 2**20
_TIMEOUT_S = 24 * 3600  # Orbax gives up after 20 minutes, which is 1.2 TB at 1 GB/s
_FILES = "files.json"
_UNFINISHED = "_CHECKPOINT_METADATA"  # Orbax adds the time of the end

_running: dict[str, "Saving"] = {}


class Saving:
    """A save on its way to the disk.

    Attributes:
      directory: where to.
      seconds: from the call until all was written; 0 until then.
      nbytes: on disk; 0 until then, and on other disks than this machine's (gs://).
    """

    def __init__(self, directory: epath.Path, kind: str):
        self.directory = directory
        self.seconds, self.nbytes = 0.0, 0
        self._begin = time.perf_counter()
        options = ocp.AsyncOptions(timeout_secs=_TIMEOUT_S, post_finalization_callback=self._written)
        try:
            manager = _manager(directory, kind, max_to_keep=1, cleanup_tmp_directories=True, async_options=options)
        except OSError as error:
            raise self._failed(error) from None
        self._manager: ocp.CheckpointManager | None = manager
        self._step = (manager.latest_step() or 0) + 1
        self._place = directory / f"{kind}_{self._step}"

    def begin(self, items: ocp.args.Composite) -> None:
        """Copies the arrays; they are written meanwhile."""
        assert self._manager is not None
        try:
            self._manager.save(self._step, args=items, force=True)
        except OSError as error:
            raise self._failed(error) from None
        _running[str(self.directory)] = self

    def _failed(self, error: BaseException) -> OSError:
        return OSError(f"`directory={self.directory}` could not be written ({_reason(error)}).")

    def _written(self) -> None:
        """Called by Orbax when all is written; the save is given its name afterwards."""
        self.nbytes = _list_files(self._place)
        self.seconds = time.perf_counter() - self._begin

    def wait(self) -> None:
        """Returns when the save is complete; raises OSError in one line where it could not be written."""
        if self._manager is None:
            return
        manager, self._manager = self._manager, None
        _running.pop(str(self.directory), None)
        try:
            manager.wait_until_finished()
        except Exception as error:  # of the file system, of tensorstore, and time-outs
            raise self._failed(error) from error
        finally:
            manager.close()


def write(directory: Any, kind: str, leaves: Mapping[str, Any], facts: Mapping[str, Any], wait: bool) -> Saving:
    """Writes the next save of a kind, and then removes the former.

    When this returns the arrays are copied: they may be donated, while the files are being written.

    Args:
      kind: "cache" or "model"; a directory may hold one of each.
      leaves: name to array, on any mesh; every process gives all of them.
      facts: plain values; `leaves` and the versions are added here.
      wait: return when the save is complete.
    """
    check_directory(directory)
    directory = _path(directory)
    if former := _running.get(str(directory)):
        former.wait()  # a manager removes what unfinished saves left behind
    saving = Saving(directory, kind)
    sums = digests(leaves)
    table = {n: {"shape": list(x.shape), "dtype": str(x.dtype), "sum": sums[n]} for n, x in leaves.items()}
    options = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), dict(leaves))
    items = ocp.args.Composite(
        leaves=ocp.args.PyTreeSave(dict(leaves), save_args=options),
        facts=ocp.args.JsonSave({"format": FORMAT, "kind": kind, **facts, "leaves": table}),
    )
    saving.begin(items)
    if wait:
        saving.wait()
    return saving


def check_directory(directory: Any) -> None:
    """Raises ValueError where nothing can be saved to."""
    path = _path(directory)
    if path.exists() and not path.is_dir():
        raise ValueError(f"`directory={directory}` is a file; give a directory, which is made where there is none.")


class Save:
    """The newest complete save of a kind; its `facts` are read when it is opened."""

    def __init__(self, directory: Any, kind: str):
        """Raises one-line ValueError or FileNotFoundError where there is none that can be read."""
        self.directory = _path(directory)
        if not self.directory.exists():
            raise FileNotFoundError(f"`directory={directory}` does not exist; give one that save_{kind} wrote.")
        if not self.directory.is_dir():
            raise ValueError(f"`directory={directory}` is a file; give the directory that save_{kind} wrote.")
        self._manager = _manager(self.directory, kind, read_only=True)
        step = self._manager.latest_step()
        if step is None:
            found = ", ".join(sorted(p.name for p in self.directory.iterdir())[:3]) or "nothing"
            raise ValueError(f"`directory={directory}` holds no saved {kind} (it has {found}); write one first.")
        self._step: int = step
        self._place = self.directory / f"{kind}_{step}"
        self.nbytes = _check_files(self._place)
        self.facts = self._restore(facts=ocp.args.JsonRestore())["facts"]
        if not isinstance(self.facts, dict) or self.facts.get("format") != FORMAT or self.facts.get("kind") != kind:
            version = self.facts.get("format") if isinstance(self.facts, dict) else None
            raise ValueError(
                f"`directory={directory}` holds a {kind} in format {version!r}, and this version of kvjax reads "
                f"{FORMAT}; save it again with this one."
            )

    def __enter__(self) -> "Save":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def check(self, name: str, shape: Sequence[int], dtype: Any) -> None:
        """Raises where an array of that name, shape and type was not saved."""
        found = self.facts["leaves"].get(name)
        if found is None or found["dtype"] != str(dtype) or found["shape"] != list(shape):
            came = "no " + name if found is None else f"{name} as {found['dtype']} {found['shape']}"
            raise ValueError(
                f"`directory={self.directory}` holds {came}, and this version of kvjax wants {dtype} {list(shape)}; "
                "save it again with this one."
            )

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Arrays by name, each device's part read straight to it, and checked bit by bit.

        Args:
          wanted: with shardings, or without for the default device. Where a shape is larger than the one that was
            saved, the array is filled up with zeros at the end of its axes.

        Raises:
          ValueError: one line, for a save that is damaged.
        """
        args = {name: _restore_args(want) for name, want in wanted.items()}
        items = ocp.args.PyTreeRestore(dict(wanted), restore_args=args, partial_restore=True)
        found = self._restore(leaves=items)["leaves"]
        for name, want in wanted.items():
            if want.sharding is None:
                found[name] = _on_default_device(found[name], want.shape)
        for name, value in digests(found).items():
            if value != self.facts["leaves"][name]["sum"]:
                raise self._damaged(f"the bits of {name} are not those that were saved")
        return found

    def _restore(self, **items: Any) -> Any:
        try:
            return self._manager.restore(self._step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and tensorstore raise many types for damaged files, Exception among them
            raise self._damaged(_reason(error)) from None

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"`directory={self.directory}`: {self._place.name} is damaged ({reason}); save it again.")


def _restore_args(want: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if want.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=want.dtype)
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array, dtype=want.dtype, sharding=want.sharding, global_shape=want.shape, strict=False
    )


def _on_default_device(x: np.ndarray, shape: Sequence[int]) -> jax.Array:
    """As `jnp.zeros` would place it, not bound to a device as Orbax does: bound arguments compile another program."""
    if x.shape != tuple(shape):
        x = np.pad(x, [(0, new - old) for old, new in zip(x.shape, shape)])
    return jnp.array(x, copy=True)


def quiet() -> None:
    """Keeps Orbax's warnings about its own options off the terminal; its errors pass."""
    logger = logging.getLogger("absl")
    if _passes not in logger.filters:
        logger.addFilter(_passes)


def _passes(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or "orbax" not in record.pathname


def _manager(directory: epath.Path, kind: str, **options: Any) -> ocp.CheckpointManager:
    quiet()
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    arrays, plain = ocp.PyTreeCheckpointHandler(), ocp.JsonCheckpointHandler()
    for name, handler, args in (
        ("leaves", arrays, (ocp.args.PyTreeSave, ocp.args.PyTreeRestore)),
        ("facts", plain, (ocp.args.JsonSave, ocp.args.JsonRestore)),
    ):
        for kind_of_args in args:
            registry.add(name, kind_of_args, handler)
    return ocp.CheckpointManager(
        directory, options=ocp.CheckpointManagerOptions(step_prefix=kind, **options), handler_registry=registry
    )


def _path(directory: Any) -> epath.Path:
    """Absolute where it is on this machine; gs:// and the like as they are."""
    path = epath.Path(directory).expanduser()
    return path if "://" in str(directory) else epath.Path(os.path.abspath(path))


def _list_files(place: epath.Path) -> int:
    """Leaves the sizes of a save's files in it, so that what is missing later is named before it is read.

    Returns:
      Their sum.
    """
    if jax.process_index() or "://" in str(place):
        return 0
    total = 0
    for root in Path(place.parent).glob(place.name + ".*"):
        files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.name != _UNFINISHED]
        sizes = {str(p.relative_to(root)): p.stat().st_size for p in files}
        (root / _FILES).write_text(json.dumps(sizes))
        total = sum(sizes.values())
    return total


def _check_files(place: epath.Path) -> int:
    """Raises where a file is missing or was cut; the sum of their sizes."""
    root = Path(place)
    if "://" in str(place):
        return 0
    try:
        sizes = json.loads((root / _FILES).read_text())
    except (OSError, ValueError):
        sizes = {_FILES: "all"}
    for name, size in sizes.items():
        path = root / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            came = "is missing" if found is None else f"has {found} of its {size} bytes"
            raise ValueError(f"`directory={root.parent}`: {root.name}/{name} {came}; save it again.")
    return sum(sizes.values())


def _reason(error: BaseException) -> str:
    """The first line of an error, cut where tensorstore goes on for pages."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:160]}" if line else type(error).__name__
