"""Many processes: the text of one, and an end for all when one ends. No wait here is without a limit."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import kvjax
from kvjax import distributed, peers

ROOT = Path(__file__).parents[1]
JOIN_SECONDS = 120  # importing JAX on a busy machine

# Joins, says so, and waits for the others in collectives; argv[1] says what the process with number VICTIM does then.
PROGRAM = """
import os, sys, time
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from kvjax import distributed

distributed.HEARTBEAT_SECONDS = 5
what, victim = sys.argv[1], int(sys.argv[2])
with distributed.start(cpu_devices=int(os.environ["KVJAX_PROCESSES"])) as run:
    mesh = Mesh(np.array(jax.devices()), ("seq",))
    x = jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, P("seq")), lambda i: np.ones(1, np.float32))
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))
    if what != "before":
        assert float(total(x)) == mesh.size
    print("ready", file=sys.stderr, flush=True)
    if what == "fails" and run.process == victim:
        open("/nowhere/prompt.txt")
    if what == "differs":
        run.agree({"a prompt": "b" if run.process == victim else "a"})
    if what == "sleeping":
        time.sleep(100)
    deadline = time.time() + 100
    while what != "ends" and time.time() < deadline:
        jax.block_until_ready(total(x))
        time.sleep(0.01)
"""


class Job:
    """Processes of one run on this machine; all are dead when it is left."""

    def __init__(self, folder: Path, count: int, *command: str, **environment: str):
        port = free_port()
        self.started: list[subprocess.Popen] = []
        self.folder = folder
        # With conftest's XLA_FLAGS: most of the time is XLA compiling small programs once.
        common = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        common["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        common |= {"KVJAX_JOIN_SECONDS": str(JOIN_SECONDS)} | environment
        for i in range(count):
            place = {"KVJAX_COORDINATOR": f"localhost:{port}", "KVJAX_PROCESSES": str(count), "KVJAX_PROCESS": str(i)}
            with open(folder / f"{i}.out", "w") as out, open(folder / f"{i}.err", "w") as err:
                self.started.append(
                    subprocess.Popen([sys.executable, *command], env=common | place, stdout=out, stderr=err, cwd=ROOT)
                )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        for process in self.started:
            process.kill()
        for process in self.started:
            process.wait(10)

    def errors(self, i: int) -> str:
        return (self.folder / f"{i}.err").read_text()

    def text(self, i: int) -> str:
        return (self.folder / f"{i}.out").read_text()

    def wait_until(self, seconds: float, ready) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, [self.errors(i) for i in range(len(self.started))]
            assert all(process.poll() is None for process in self.started), self.errors(0)
            time.sleep(0.05)

    def wait(self, seconds: float, but: int | None = None) -> list[int]:
        """Exit codes of all, or of all `but` one."""
        deadline = time.monotonic() + seconds
        rest = [p for i, p in enumerate(self.started) if i != but]
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in rest]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- which process this is


@pytest.fixture
def bare(monkeypatch):
    """No environment that says which process this is."""
    for name in list(os.environ):
        if name.startswith(("KVJAX_", "SLURM_", "OMPI_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_place_from_arguments_and_environment(bare):
    assert distributed.find_place("[::1]:80", 4, 3) == distributed.Place("::1", 80, 4, 3)
    bare.setenv("KVJAX_COORDINATOR", "host0:8476")
    bare.setenv("KVJAX_PROCESSES", "4")
    bare.setenv("KVJAX_PROCESS", "3")
    assert distributed.find_place(None, None, None) == distributed.Place("host0", 8476, 4, 3)
    assert distributed.find_place(None, None, 0).process == 0  # arguments come first


def test_place_under_slurm(bare):
    step = {"SLURM_JOB_ID": "5", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9"}
    for name, value in (step | {"SLURM_LOCALID": "1"}).items():
        bare.setenv(name, value)
    assert distributed.find_place(None, None, None) == distributed.Place("gpu07", 61445, 16, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None, None), "finds nothing to join"),
        (("host0:8476", None, 1), "`processes` must be given too"),
        ((None, 2, 0), "`coordinator` must be given too"),
        (("host0", 2, 0), "`coordinator=host0` must be HOST:PORT"),
        (("host0:99999", 2, 0), "must be HOST:PORT"),
        (("host0:8476", 0, 0), "`processes=0` must be at least 1"),
        (("host0:8476", 4, 4), "`process=4` must be 0 to 3"),
        (("host0:8476", 4, -1), "`process=-1` must be 0 to 3"),
    ],
)
def test_bad_place(bare, arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.find_place(*arguments)


def test_devices_must_be_shared_evenly(bare):
    with pytest.raises(ValueError, match="`cpu_devices=6` cannot be shared evenly by 4 processes"):
        distributed.start("localhost:8476", 4, 0, cpu_devices=6)


def test_one_process_joins_nobody(bare):
    with distributed.start("localhost:8476", 1, 0) as run:
        run.agree({"anything": 1})
        assert run.main and run.processes == 1


@pytest.mark.parametrize(("quant", "script"), [("kvquant3", "calibrate"), ("asymkv-auto@2", "allocate")])
def test_many_processes_do_not_calibrate(monkeypatch, quant, script):
    model = kvjax.load("tiny")
    kvjax.policy(quant, model)  # what is in a file will do
    monkeypatch.setattr("jax.process_count", lambda: 4)
    with pytest.raises(ValueError, match=f"4 processes do not do it together; run scripts/{script}"):
        kvjax.policy(quant, model, text="some text")


# --- roll call, with threads for processes


def meet(*members: tuple[int, int, dict], seconds: float = 20) -> list[str]:
    """What each (process, processes, facts) gets: a round's value, or the error's text."""
    port, found = free_port(), [""] * len(members)

    def join(slot: int, process: int, processes: int, facts: dict) -> None:
        try:
            group = peers.meet("localhost", port, process, processes, seconds)
            found[slot] = group.agree(facts, "value of process 0", seconds=seconds if process == 0 else seconds + 5)
        except (ValueError, OSError) as error:
            found[slot] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=join, args=(i, *m), daemon=True) for i, m in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 10)
    return found


def test_all_come_and_agree():
    assert meet((0, 3, {"a": 1}), (2, 3, {"a": 1}), (1, 3, {"a": 1})) == ["value of process 0"] * 3


def test_different_facts_end_all():
    found = meet((0, 3, {"--quant": "kivi2"}), (1, 3, {"--quant": "kivi2"}), (2, 3, {"--quant": "kivi4"}))
    assert all("process 2" in line and "has --quant kivi4, process 0 kivi2" in line for line in found)


def test_same_number_twice_ends_all():
    found = meet((0, 3, {}), (1, 3, {}), (1, 3, {}))
    assert all("have the same number; give each its own, 0 to 2" in line for line in found)


def test_other_count_ends_all():
    found = meet((0, 2, {}), (1, 3, {}))
    assert all("was told of 3 processes, process 0 of 2" in line for line in found)


def test_who_does_not_come_is_named():
    found = meet((0, 3, {}), (2, 3, {}), seconds=1)
    assert found[0] == "TimeoutError: process 1 did not come within 1 s; start all of the processes"
    assert "process 1 did not come" in found[1]


def test_nobody_at_the_coordinator():
    with pytest.raises(OSError, match=r"was not to be reached within 1 s \(Connection refused\)"):
        peers.meet("localhost", free_port(), 1, 2, seconds=1)


def test_port_in_use():
    with socket.create_server(("localhost", 0)) as server, pytest.raises(OSError, match="choose another port"):
        peers.meet("localhost", server.getsockname()[1], 0, 2, seconds=1)


def test_strangers_are_ignored():
    port = free_port()
    hub = peers.meet("localhost", port, 0, 2, seconds=20)
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(100) == b""
        spoke = peers.meet("localhost", port, 1, 2, seconds=20)
        thread = threading.Thread(target=spoke.agree, args=({},), daemon=True)
        thread.start()
        assert hub.agree({}, 5, seconds=20) == 5
        thread.join(20)


# --- real processes


def run_program(folder: Path, count: int, what: str, victim: int, **environment: str) -> Job:
    return Job(folder, count, "-c", PROGRAM, what, str(victim), **environment)


def test_processes_that_end_well(tmp_path):
    with run_program(tmp_path, 2, "ends", 0) as job:
        assert job.wait(200) == [0, 0], job.errors(0) + job.errors(1)


# "sleeping" stands for compiling, loading and whatever else is no collective.
@pytest.mark.parametrize(("what", "victim"), [("before", 1), ("collectives", 2), ("sleeping", 1)])
def test_a_killed_process_ends_the_others(tmp_path, what, victim):
    with run_program(tmp_path, 3, what, victim) as job:
        job.wait_until(200, lambda: all("ready" in job.errors(i) for i in range(3)))
        job.started[victim].kill()
        assert job.wait(30, but=victim) == [1, 1]
        for i in {0, 1, 2} - {victim}:
            line = job.errors(i).splitlines()[-1]
            assert line.startswith(f"error: process {victim} (") and "is gone" in line


def test_the_coordinators_death_ends_the_others(tmp_path):
    with run_program(tmp_path, 3, "collectives", 0) as job:
        job.wait_until(200, lambda: all("ready" in job.errors(i) for i in range(3)))
        job.started[0].kill()
        # JAX aborts at the same moment (SIGABRT) and may be first.
        assert all(code in (1, -signal.SIGABRT) for code in job.wait(30, but=0))
        for i in (1, 2):
            assert "process 0 (at localhost:" in job.errors(i) or "leader task was preempted/died" in job.errors(i)


def test_an_error_in_one_process_ends_the_others(tmp_path):
    with run_program(tmp_path, 2, "fails", 1) as job:
        assert job.wait(200) == [1, 2]
        assert job.errors(1).splitlines()[-1] == "error: [Errno 2] No such file or directory: '/nowhere/prompt.txt'"
        line = job.errors(0).splitlines()[-1]
        assert line.startswith("error: process 1 (") and line.endswith("directory: '/nowhere/prompt.txt'")


def test_different_inputs_end_all(tmp_path):
    with run_program(tmp_path, 2, "differs", 1) as job:
        assert job.wait(200) == [1, 1]
        for i in (0, 1):
            assert "has a prompt b, process 0 a; start all of them with the same" in job.errors(i).splitlines()[-1]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs signals")
def test_a_stopped_process_ends_the_others(tmp_path):
    """JAX's heartbeats find it, here after 5 s, and abort."""
    with run_program(tmp_path, 2, "collectives", 1) as job:
        job.wait_until(200, lambda: all("ready" in job.errors(i) for i in range(2)))
        job.started[1].send_signal(signal.SIGSTOP)
        assert job.wait(45, but=1) == [-signal.SIGABRT]
        assert "unhealthy (stopped sending heartbeats)" in job.errors(0)


# Decode steps from an empty cache, rows of the batch over `data`; process 0 prints what can be read on the host.
STEPS = """
import json, sys
import numpy as np
import kvjax
from kvjax import decode, distributed, sharding

with distributed.start(cpu_devices=2) as run:
    mesh = sharding.make_mesh("data=2")
    model = kvjax.load("tiny", mesh=mesh)
    cache = decode.init_cache(model, kvjax.policy(sys.argv[1], model), batch=2, capacity=70, mesh=mesh)
    token = np.array([5, 6])
    for i in range(6):
        logits, cache = decode.step(model, cache, token, active=np.array([True, i < 4]))
        token = sharding.on_host(logits).argmax(-1)
    facts = {"length": sharding.on_host(cache.length).tolist(), "token": token.tolist()}
    facts |= decode.statistics(cache)
    if run.main:
        print(json.dumps(facts))
"""


def test_steps_and_statistics_of_rows_on_two_processes(tmp_path):
    found = []
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        with Job(tmp_path / str(count), count, "-c", STEPS, "int4") as job:
            assert job.wait(250) == [0] * count, job.errors(0) + job.errors(count - 1)
        found.append(json.loads(job.text(0).splitlines()[-1]))
    assert found[0] == found[1]
    assert found[0]["length"] == [6, 4] and found[0]["overrun"] == found[0]["dropped_outliers"] == 0


def generate(quant: str, tokens: int, temperature: float) -> list[str]:
    arguments = {"--quant": quant, "--prompt": "The sea", "--max-new-tokens": str(tokens), "--context": "300"}
    arguments["--temperature"] = str(temperature)
    return ["scripts/generate.py", *(word for pair in arguments.items() for word in pair)]


def one_process(folder: Path, *command: str) -> dict:
    folder.mkdir()
    with Job(folder, 1, *command, "--json", str(folder / "report.json")) as job:
        assert job.wait(250) == [0], job.errors(0)
    return json.loads((folder / "report.json").read_text())


def test_two_processes_write_the_text_of_one(tmp_path):
    spread = ("--mesh", "seq=4", "--distributed", "--json", str(tmp_path / "report.json"))
    command = generate("kvquant3", 24, temperature=0.8)
    with Job(tmp_path, 2, *command, *spread) as job:
        alone = one_process(tmp_path / "alone", *command)
        assert job.wait(250) == [0, 0], job.errors(0) + job.errors(1)
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["text"] == alone["text"] and len(report["text"]) > 20
        assert job.text(0) == f"The sea{alone['text']}\n" and job.text(1) == ""
        assert (report["mesh"], report["devices"], report["processes"]) == ("seq=4", 4, 2)
        assert 0 < report["cache_bytes_per_device"] < report["cache_bytes"]
        assert "seq=4: 4 devices of 2 processes" in job.errors(0) and "preset" not in job.errors(1)


def test_four_processes_write_the_text_of_one_until_one_is_killed(tmp_path):
    with Job(tmp_path, 4, *generate("kivi2", 250, temperature=0), "--mesh", "seq=4", "--distributed") as job:
        text = one_process(tmp_path / "alone", *generate("kivi2", 40, temperature=0))["text"]
        job.wait_until(400, lambda: len(job.text(0)) > len("The sea") + 60)
        job.started[3].kill()
        written = job.text(0).removeprefix("The sea")
        assert written[: len(text)] == text[: len(written)]
        assert job.wait(30, but=3) == [1, 1, 1]
        for i in range(3):
            assert job.errors(i).splitlines()[-1].startswith("error: process 3 (")
