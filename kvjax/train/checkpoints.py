"""Checkpoints of a run: model, optimizer, step and place in the data, written in the background by Orbax.

Orbax writes to a temporary folder and renames it when whole, so a run that is killed at any moment finds the last
complete checkpoint.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from kvjax.saving.facts import differences
from kvjax.saving.store import quiet
from kvjax.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run stands between two steps.

    Attributes:
      step: steps done.
      position: tokens that `Passages` handed out. Everything else that is random follows from seed and step.
      seconds: spent training so far, over all sittings.
    """

    step: int = 0
    position: int = 0
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints in a folder; the newest two are kept. Open with `open_checkpoints`."""

    def __init__(self, manager: ocp.CheckpointManager):
        self._manager = manager

    def save(self, place: Place, state: TrainState) -> None:
        """Copies the state and returns; the files are written meanwhile."""
        if self._manager.latest_step() == place.step:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_plain(state)),
            place=ocp.args.JsonSave(dataclasses.asdict(place)),
        )
        self._manager.save(place.step, args=items, force=True)

    def restore(self, like: TrainState) -> tuple[Place, TrainState] | None:
        """The newest checkpoint, placed on the devices as `like` is; None where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),
            place=ocp.args.JsonRestore(),
        )
        found = self._manager.restore(step, args=items)
        moments = [leaf for _, leaf in sorted(found["state"]["optimizer"].items())]
        optimizer = jax.tree.unflatten(jax.tree.structure(like.optimizer), moments)
        return Place(**found["place"]), TrainState(found["state"]["params"], optimizer)


def _plain(state: TrainState) -> dict[str, Any]:
    """Weights by name and moments by number: a layout on disk that no library's class decides."""
    moments = {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state.optimizer))}
    return {"params": state.params, "optimizer": moments}


@contextlib.contextmanager
def open_checkpoints(folder: Path) -> Iterator[Checkpoints]:
    """Opens, or makes, a folder of checkpoints; leaving waits until the last one is whole."""
    quiet()
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        yield Checkpoints(manager)
        manager.wait_until_finished()


def check_identity(file: Path, identity: dict, resume: bool) -> dict:
    """Checks that a run begins in a free folder, or goes on with what it was begun with.

    Args:
      file: JSON that `write_json` left in the run's folder.
      identity: recipe and digests of the data.
      resume: whether to go on.

    Returns:
      `identity` for a new run, else the content of the file, which may hold more.

    Raises:
      ValueError: a run begins where one stands already, or goes on where none stands or with another identity.
    """
    if not resume:
        if file.exists():
            raise ValueError(f"`{file.parent}` holds a run already; give --resume to go on, or another --out.")
        return identity
    if not file.is_file():
        raise ValueError(f"`{file.parent}` holds no run to resume; leave --resume out to begin one.")
    stored = json.loads(file.read_text())
    for key, now, before in differences(json.loads(json.dumps(identity)), stored):
        raise ValueError(
            f"`{file.parent}` was begun with {key}={before!r}, and now it is {now!r}; "
            f"resume with the same settings and texts, or give another --out."
        )
    return stored


def write_json(file: Path, content: dict) -> None:
    """Replaces a JSON file in one move, so that a killed run leaves the old or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.rename(file)
