"""--mesh and --distributed: a run over many devices, of one process or of many."""

import argparse
import hashlib
import math
import os
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import kvjax
from kvjax import distributed, sharding

# What may differ between processes: their number, and files, which are compared by what is in them.
OWN = ("process", "json", "prompt", "prompt_file", "calibration")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many devices")
    group.add_argument(
        "--mesh", metavar="SPEC", help='devices to spread over, such as "seq=4" or "data=1,seq=4,tensor=2"'
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of many processes; a TPU pod, Slurm and Open MPI say which",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0 (or KVJAX_COORDINATOR)")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are (or KVJAX_PROCESSES)")
    group.add_argument("--process", type=int, metavar="I", help="number of this one, from 0 (or KVJAX_PROCESS)")


def join(args: argparse.Namespace) -> distributed.Run:
    """The processes of the run, before anything asks JAX for a device; errors as of `kvjax.distributed.start`."""
    devices = math.prod(sharding.parse_mesh(args.mesh).values()) if args.mesh else None
    if not args.distributed:
        for name in ("coordinator", "processes", "process"):
            if getattr(args, name) is not None:
                raise ValueError(f"`{name}={getattr(args, name)}` is of a run of many processes; add --distributed.")
        if devices:
            distributed.set_cpu_devices(devices)
        return distributed.Run()
    if devices is None:
        raise ValueError(
            "`mesh` is missing: --distributed needs to know how to use the devices; add e.g. --mesh seq=4."
        )
    same = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in OWN}
    run = distributed.start(args.coordinator, args.processes, args.process, cpu_devices=devices, facts=same)
    if run.processes > 1:
        text_alone_on_stdout()
    return run


def make(args: argparse.Namespace, run: distributed.Run, prompt: str) -> Mesh | None:
    """The mesh that was asked for, for a prompt that is the same in all processes; None without one."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:16]
    run.agree({"a prompt": f"of {len(prompt)} characters (sha256 {digest})"})
    if not args.mesh:
        return None
    mesh = sharding.make_mesh(args.mesh)
    if run.processes > 1 and mesh.size != jax.device_count():
        raise ValueError(
            f"`mesh={args.mesh}` has {mesh.size} devices, but the {run.processes} processes have {jax.device_count()}, "
            "and each must be used; make the axes multiply to that."
        )
    return mesh


def check_same(run: distributed.Run, model: Any, policy: kvjax.Policy) -> None:
    """Raises ValueError where processes loaded different weights or constants: what they compute would be neither's."""
    if run.processes == 1:
        return
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves([(s.k_params, s.v_params) for s in policy.segments]):
        digest.update(np.asarray(leaf).tobytes())
    run.agree({"the model": model.fingerprint[:16], "the calibration": digest.hexdigest()[:16]})


def text_alone_on_stdout() -> None:
    """gloo and NCCL print what they connect to on file descriptor 1; from now on that goes to stderr."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)


def report(args: argparse.Namespace, cache: kvjax.KVCache) -> dict[str, Any]:
    """What a report says of the mesh; nothing without one."""
    if cache.mesh is None:
        return {}
    return {
        "mesh": args.mesh,
        "devices": cache.mesh.size,
        "processes": jax.process_count(),
        "cache_bytes_per_device": sharding.device_bytes(cache),
    }
