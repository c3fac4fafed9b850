"""Many processes as one JAX program: joining them, and ending all of them when one ends.

    with distributed.start("host0:8476", processes=4, process=i) as run:
        mesh = sharding.make_mesh("seq=4")              # over the devices of all processes
        model = kvjax.load("tiny", mesh=mesh)
        ...                                             # every process makes the same calls in the same order
        if run.main: print(...)

On a TPU pod, under Slurm and under Open MPI `start()` needs no arguments. Elsewhere it takes them, or
KVJAX_COORDINATOR, KVJAX_PROCESSES and KVJAX_PROCESS from the environment. JAX_LOCAL_DEVICE_IDS (such as "0,1") gives a
process some of a host's GPUs; without it (and without Slurm or Open MPI, which give it one) it takes all.

A process that leaves the `with` block with an error, or is killed at any time, ends all others at once, with one line
on stderr that names it (`kvjax.peers`); a host that no longer answers does after 20 s, a process that is stopped after
HEARTBEAT_SECONDS, by JAX. Nothing sees a process that runs but never comes to a collective.
"""

import contextlib
import dataclasses
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NoReturn

import jax

from kvjax import __version__, links, peers

JOIN_SECONDS = 50.0
HEARTBEAT_SECONDS = 30
# After the work all processes shut JAX down together; a death in that moment is found by this alone.
SHUTDOWN_SECONDS = 20
# A collective fails where a process died; whose end it was arrives at about the same time.
GRACE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands: `host:port` of process 0, how many there are, which one this is."""

    host: str
    port: int
    processes: int
    process: int


class Run:
    """A joined group of processes, as a context manager. The others end with this process unless it leaves normally.

    Attributes:
      process, processes: as for `start`.
      main: whether this is process 0, the one that prints.
    """

    def __init__(self, process: int = 0, processes: int = 1, group: peers.Group | None = None):
        self.process, self.processes, self._group = process, processes, group

    @property
    def main(self) -> bool:
        return self.process == 0

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Waits for the others; raises ValueError where a fact, by the name it has there, is not the same in all."""
        if self._group is not None:
            self._group.agree(dict(facts))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._group is None:
            return
        if error is None or (isinstance(error, SystemExit) and not error.code):
            try:
                self._group.finish()
                return
            except ValueError as late:
                error = late
        _end_with(self._group, error)


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    cpu_devices: int | None = None,
    facts: Mapping[str, Any] | None = None,
    join_seconds: float | None = None,
) -> Run:
    """Joins the processes of one program and starts JAX on all of them. Call it before anything asks for a device.

    Args:
      coordinator: HOST:PORT where process 0 listens, reachable from all; JAX's own service takes a free port beside it.
      processes: how many there are.
      process: the number of this one, 0 to processes - 1.
      cpu_devices: of all processes together, where they run on CPU; None leaves JAX's setting.
      facts: what must be the same everywhere, as strings, by the names that an error is to use.
      join_seconds: to wait for the others; None for `KVJAX_JOIN_SECONDS`, or 50.

    Raises:
      ValueError: one line, where the arguments do not fit each other, where there is nothing to join, and where the
        processes disagree.
      OSError: one line, where process 0 cannot be reached or others do not come (TimeoutError).
    """
    place = find_place(coordinator, processes, process)
    if cpu_devices is not None:
        if cpu_devices % place.processes:
            raise ValueError(
                f"`cpu_devices={cpu_devices}` cannot be shared evenly by {place.processes} processes; make the mesh a "
                "multiple of them."
            )
        set_cpu_devices(cpu_devices // place.processes)
    if place.processes == 1:
        return Run()
    seconds = join_seconds or _seconds(os.environ.get("KVJAX_JOIN_SECONDS"))
    group = peers.meet(place.host, place.port, place.process, place.processes, seconds)
    port = _free_port(place.host) if place.process == 0 else None
    same = {"kvjax": __version__, "jax": jax.__version__} | dict(facts or {})
    # Whoever connected in the last second waits as long as process 0 waits for those that never will.
    port = group.agree(same, port, seconds=seconds + (0 if place.process == 0 else peers.LINGER_SECONDS))
    group.arm()
    try:
        _start_jax(place, port)
    except BaseException as error:
        _end_with(group, error)
    return Run(place.process, place.processes, group)


def set_cpu_devices(count: int) -> None:
    """Gives this process as many devices on CPU; does nothing where JAX has started, has more, or XLA_FLAGS say it."""
    flagged = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not flagged and jax.config.jax_num_cpu_devices < count:  # type: ignore[attr-defined]
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def find_place(coordinator: str | None, processes: int | None, process: int | None) -> Place:
    """Completes what is given from the environment, then from the cluster that JAX finds.

    Raises:
      ValueError: one line, for what is missing or makes no sense.
    """
    coordinator = coordinator or os.environ.get("KVJAX_COORDINATOR") or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number("processes", "KVJAX_PROCESSES", processes)
    process = _number("process", "KVJAX_PROCESS", process)
    if None in (coordinator, processes, process):
        coordinator, processes, process = _detect(coordinator, processes, process)
    missing = [
        name
        for name, value in (("coordinator", coordinator), ("processes", processes), ("process", process))
        if value is None
    ]
    if coordinator is None or processes is None or process is None:
        raise ValueError(
            "`distributed` finds nothing to join: this is no TPU pod, Slurm step or Open MPI run; give --coordinator "
            "HOST:PORT --processes N --process I (or KVJAX_COORDINATOR, KVJAX_PROCESSES, KVJAX_PROCESS)."
            if len(missing) == 3
            else f"`{'`, `'.join(missing)}` must be given too: --coordinator HOST:PORT, --processes N and --process I."
        )
    if processes < 1:
        raise ValueError(f"`processes={processes}` must be at least 1.")
    if not 0 <= process < processes:
        raise ValueError(f"`process={process}` must be 0 to {processes - 1}: there are {processes} processes.")
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
        raise ValueError(f"`coordinator={coordinator}` must be HOST:PORT of process 0, such as 10.0.0.1:8476.")
    return Place(host.strip("[]"), int(port), processes, process)


def _number(name: str, variable: str, given: int | None) -> int | None:
    text = os.environ.get(variable)
    if given is not None or not text:
        return given
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"`{name}`: {variable}={text!r} in the environment must be a number.")
    return int(text)


def _seconds(text: str | None) -> float:
    try:
        return float(text or JOIN_SECONDS)
    except ValueError:
        raise ValueError(f"`join_seconds`: KVJAX_JOIN_SECONDS={text!r} in the environment must be a number.") from None


def _detect(
    coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str | None, int | None, int | None]:
    """What a TPU pod, Slurm or Open MPI say, as `jax.distributed.initialize` would find it."""
    from jax._src.clusters import ClusterEnv  # there is no public way to ask before starting the service

    try:
        return ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, processes, process, None, None, int(JOIN_SECONDS)
        )[:3]
    except Exception as error:  # each kind of cluster has its own
        raise ValueError(
            f"`distributed`: the cluster does not say how to join it ({' '.join(str(error).split())}); give "
            "--coordinator HOST:PORT --processes N --process I."
        ) from None


def _free_port(host: str) -> int:
    """A port for JAX's service on this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1" if links.is_loopback(host) else "", 0))
        return probe.getsockname()[1]


def _start_jax(place: Place, port: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It catches SIGTERM for programs that save and go; this one shall end.
    jax.config.update("jax_enable_preemption_service", False)
    host = f"[{place.host}]" if ":" in place.host else place.host
    jax.distributed.initialize(
        f"{host}:{port}",
        place.processes,
        place.process,
        coordinator_bind_address=f"{host}:{port}" if links.is_loopback(place.host) else None,
        initialization_timeout=int(JOIN_SECONDS),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


def _end_with(group: peers.Group, error: BaseException) -> NoReturn:
    """Ends the others and this process: a normal exit would wait for them in JAX's shutdown."""
    if _is_of_collective(error):
        group.wait_for_end(GRACE_SECONDS)
    code, line = _outcome(error)
    if group.fail(line):
        if code == 1 and isinstance(error, Exception):
            traceback.print_exception(error)
        peers.say(line)
    else:
        group.wait_for_end(0)  # another thread is about to end this process
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _outcome(error: BaseException) -> tuple[int, str]:
    """Exit code, and what happened in one line."""
    if isinstance(error, SystemExit):
        return (error.code, f"exit code {error.code}") if isinstance(error.code, int) else (1, str(error.code))
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    line = " ".join(str(error).split()) or type(error).__name__
    return (2 if isinstance(error, (ValueError, OSError, NotImplementedError)) else 1), line


def _is_of_collective(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
