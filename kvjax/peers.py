"""The processes of one run: who takes part, whether they do the same, and who is still there.

Every process holds one TCP connection to process 0, from before JAX starts until the end. JAX's own coordination
service aborts with a stack trace where a process does not come, comes twice or was told another number of processes,
and notices a death after a heartbeat's timeout. The connections say it in one line and at once: the kernel closes those
of a process that ends, however it ends, and keepalive those of a host that is gone. A process that is stopped but not
dead is left to JAX's heartbeats.

Messages are JSON objects, one per line. To process 0: hello, facts, failed. From it: agreed, end.
"""

import abc
import contextlib
import os
import socket
import threading
import time
from typing import Any

from kvjax.links import Link, close, connect, listen

LINGER_SECONDS = 3.0  # process 0 leaves last: when it goes, JAX aborts whoever is still there


class Group(abc.ABC):
    """What one process knows of the others.

    Until `arm` an end of the group is raised by whichever method waits; from then on it ends this process: one line on
    stderr and exit code 1, whatever the process is doing (it may be waiting in a collective that will never finish).

    Attributes:
      process: this one's number.
      processes: how many there are.
      ended: why the group ended, in one line; None while it has not.
    """

    def __init__(self, process: int, processes: int):
        self.process, self.processes = process, processes
        self.ended: str | None = None
        self._changed = threading.Condition()
        self._round = self._agreed = 0
        self._value: Any = None
        self._armed = self._over = False
        self._readers: list[threading.Thread] = []

    def agree(self, facts: dict[str, Any], value: Any = None, *, seconds: float | None = None) -> Any:
        """Waits until all processes have come to this point; all must state the same facts.

        Args:
          facts: what must be the same, by the name that an error is to use.
          value: process 0's is returned everywhere.
          seconds: to wait at most; None where a death is the only reason why a process would not come.

        Raises:
          ValueError: where a fact differs, or a process failed before.
          TimeoutError: for those that did not come.
        """
        self._round += 1
        self._state({name: str(fact) for name, fact in facts.items()}, value)
        with self._changed:
            came = self._changed.wait_for(lambda: self._agreed >= self._round or self.ended, seconds)
            if not came:
                self.ended = f"{self._missing()} did not come within {seconds:.0f} s; start all of the processes"
            ended, value = self.ended, self._value
        if ended and not came:
            self._tell_others(ended)
            raise TimeoutError(ended)
        if ended:
            raise ValueError(ended)
        return value

    def arm(self) -> None:
        """From now on this process ends where another one does."""
        with self._changed:
            self._armed = True
        if self.ended:
            self._leave()

    def finish(self) -> None:
        """Waits until all processes have done their work; from then on they may go."""
        self.agree({}, "finish")

    def fail(self, reason: str) -> bool:
        """Ends the others because this process fails; False where the group had ended before."""
        with self._changed:
            if self.ended:
                return False
            self.ended = reason
        self._tell_others(reason)
        return True

    def wait_for_end(self, seconds: float) -> None:
        """Returns after `seconds` where nobody else has ended: an armed process does not come back where one has."""
        with self._changed:
            self._changed.wait_for(lambda: self.ended, seconds)
        if self.ended:
            time.sleep(2 * LINGER_SECONDS)  # another thread is about to leave

    @abc.abstractmethod
    def _state(self, facts: dict[str, str], value: Any) -> None:
        """Says that this process has come to round `_round`."""

    @abc.abstractmethod
    def _missing(self) -> str:
        """Who has not come to round `_round`."""

    @abc.abstractmethod
    def _tell_others(self, reason: str) -> None:
        """Says why this process ends."""

    @abc.abstractmethod
    def _pass_on(self, line: str) -> None:
        """Passes on why the group ends."""

    @abc.abstractmethod
    def _leave(self) -> None:
        """Ends this process."""

    def _end(self, line: str) -> None:
        with self._changed:
            if self.ended or self._over:
                return
            self.ended = line
            self._changed.notify_all()
        self._pass_on(line)
        if self._armed:
            self._leave()

    def _set_agreed(self, number: int, value: Any) -> None:
        with self._changed:
            self._agreed, self._value, self._over = number, value, value == "finish"
            self._changed.notify_all()

    def _start(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._readers.append(thread)
        thread.start()


class Hub(Group):
    """Process 0: the others connect to it."""

    def __init__(self, processes: int, server: socket.socket):
        super().__init__(0, processes)
        self._server = server
        self._links: dict[int, Link] = {}
        self._names = {0: f"process 0 ({here()})"}
        self._stated: dict[int, dict[int, dict[str, str]]] = {}  # round -> process -> facts
        self._values: dict[int, Any] = {}  # round -> value
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the server is closed when all are here
            while True:
                self._start(self._serve, Link(self._server.accept()[0]))

    def _serve(self, link: Link) -> None:
        """One process, from its hello to its end; strangers are turned away without a word."""
        hello = link.read().get("hello")
        if not isinstance(hello, dict) or self._agreed:  # nobody comes late
            return link.close()
        process, name = hello["process"], f"process {hello['process']} ({hello['name']})"
        with self._changed:
            twin = self._names.get(process)
            self._names.setdefault(process, name)
            self._links[process if not twin else len(self._links) + self.processes] = link
            ended = self.ended
        if ended:  # before this one came
            link.send(end=ended)
        if hello["processes"] != self.processes:
            return self._end(f"{name} was told of {hello['processes']} processes, process 0 of {self.processes}")
        if twin:
            return self._end(f"{name} and {twin} have the same number; give each its own, 0 to {self.processes - 1}")
        while message := link.read():
            if "failed" in message:
                return self._end(f"{name} failed: {message['failed']}")
            self._take(process, message["round"], message["facts"])
        return self._end(f"{name} is gone: it was killed or crashed, or its host is down; see its own output")

    def _state(self, facts: dict[str, str], value: Any) -> None:
        self._values[self._round] = value
        self._take(0, self._round, facts)

    def _take(self, process: int, number: int, facts: dict[str, str]) -> None:
        with self._changed:
            stated = self._stated.setdefault(number, {})
            stated[process] = facts
            complete = len(stated) == self.processes
            others = {i: theirs for i, theirs in stated.items() if 0 in stated and theirs != stated[0]}
        for i, theirs in others.items():
            return self._end(f"{self._names[i]} {_difference(theirs, stated[0])}")
        if complete:
            close(self._server)
            value = self._values.pop(number)
            del self._stated[number]
            for link in self._links.values():
                link.send(agreed=number, value=value)
            self._set_agreed(number, value)
        return None

    def _missing(self) -> str:
        came = self._stated.get(self._round, {})
        return ", ".join(self._names.get(i, f"process {i}") for i in range(self.processes) if i not in came)

    def _pass_on(self, line: str) -> None:
        for link in list(self._links.values()):
            link.send(end=line)

    def _tell_others(self, reason: str) -> None:
        self._pass_on(f"{self._names[0]} failed: {reason}")
        self._linger()

    def _leave(self) -> None:
        say(self.ended or "")
        self._linger()
        os._exit(1)

    def _linger(self) -> None:
        deadline = time.monotonic() + LINGER_SECONDS
        for thread in self._readers:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))


class Spoke(Group):
    """Any other process."""

    def __init__(self, process: int, processes: int, connection: socket.socket, hub: str):
        super().__init__(process, processes)
        self._hub = f"process 0 (at {hub})"
        self._link = Link(connection)
        self._link.send(hello={"process": process, "processes": processes, "name": here()})
        self._start(self._listen)

    def _listen(self) -> None:
        while message := self._link.read():
            if "end" in message:
                return self._end(message["end"])
            self._set_agreed(message["agreed"], message["value"])
        return self._end(f"{self._hub} is gone: it was killed or crashed, or its host is down; see its own output")

    def _state(self, facts: dict[str, str], value: Any) -> None:
        self._link.send(round=self._round, facts=facts)

    def _missing(self) -> str:
        return self._hub

    def _tell_others(self, reason: str) -> None:
        self._link.send(failed=reason)

    def _pass_on(self, line: str) -> None:
        pass  # it came from process 0

    def _leave(self) -> None:
        say(self.ended or "")
        os._exit(1)


def meet(host: str, port: int, process: int, processes: int, seconds: float) -> Group:
    """Joins the others: process 0 opens a port for them, the rest connect to it.

    Raises:
      OSError: one line, where the port cannot be opened, or process 0 not be reached within `seconds`.
    """
    if process == 0:
        return Hub(processes, listen(host, port))
    return Spoke(process, processes, connect(host, port, seconds), f"{host}:{port}")


def say(line: str) -> None:
    """One line on stderr, past Python's buffers, which another thread may hold."""
    os.write(2, f"error: {line}\n".encode())


def here() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"


def _difference(theirs: dict[str, str], ours: dict[str, str]) -> str:
    name = next(name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name))
    return (
        f"has {name} {theirs.get(name, 'unset')}, process 0 {ours.get(name, 'unset')}; start all of them with the same "
        "arguments, files and versions"
    )
