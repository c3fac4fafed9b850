"""Plans beside the real compilers' word: the whole decode step, compiled for devices that are not there.

`CASES` are what docs/plan.md holds the plan to; the programs are `kvjax.model.cached.step` on abstract arrays.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kvjax import decode, sharding
from kvjax.chips import parse_devices
from kvjax.evaluate.memory import abstract_cache, abstract_model
from kvjax.model import cached
from kvjax.model.config import ModelConfig
from kvjax.model.known import model_config
from kvjax.model.llama import LoadedModel
from kvjax.plan import Plan, plan
from kvjax.policy import preset
from pallas_kernels import deviceless_mesh
from pallas_kernels.deviceless_mesh import COLLECTIVES, Compiled, OutOfMemory

MIB_1 = 1 << 20


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode step to be compiled; `mesh` as in `kvjax.sharding.parse_mesh`, empty for the plan's."""

    model: str
    quant: str
    tokens: int
    devices: str
    mesh: str = ""


CASES = (
    Case("llama-7b", "kvquant2-dense", MIB_1, "v5p:1"),
    Case("llama-7b", "kvquant2-dense", 10_000_000, "v5p:8"),
    Case("llama-7b", "kvquant2-dense", 10_000_000, "v5p:8", "seq=8"),
    Case("llama-7b", "kvquant3", 10_000_000, "v5p:8"),  # does not fit, and the compiler says so
    Case("llama-3-8b", "kvquant3", 10_000_000, "v5e:32"),
    Case("llama-3-8b", "kvquant4", 10_000_000, "v5e:256"),
    Case("llama-3-8b", "kivi4", 10_000_000, "v6e:64"),
    Case("llama-3-70b", "kvquant2-dense", 10_000_000, "v5p:8"),
    Case("llama-3-70b", "kvquant3", 10_000_000, "v5p:16"),
    Case("llama-7b", "kvquant2-dense", MIB_1, "h100:1"),
    Case("llama-7b", "kvquant2-dense", 10_000_000, "h100:8"),
    Case("llama-7b", "kvquant2-dense", 10_000_000, "h100:8", "seq=8"),
    Case("llama-7b", "kvquant2-dense", 10_000_000, "h200:8", "seq=8"),
)


@dataclasses.dataclass(frozen=True)
class Confirmation:
    """A plan, and what the compiler made of the same step.

    Attributes:
      result: what came out; OutOfMemory where the compiler refuses it for its size.
      all_reduces: of the compiled text by how often they run: "layer" (in every layer of every step), "step", "seal"
        (only where a block fills).
    """

    case: Case
    plan: Plan
    result: Compiled | OutOfMemory
    all_reduces: Mapping[str, int]

    @property
    def planned(self) -> int:
        """Bytes of arguments as planned: all parts but temporaries."""
        return self.plan.needed - self.plan.parts["temporaries"]

    @property
    def needed(self) -> int | None:
        """Bytes of a device as compiled: arguments, temporaries, and results that replace no argument."""
        if isinstance(self.result, OutOfMemory):
            return self.result.needed
        m = self.result.memory
        return m.argument + m.temporary + m.output - m.alias

    @property
    def error(self) -> float | None:
        """How far the planned need is from the compiled one, as a share of it."""
        return None if not self.needed else self.plan.needed / self.needed - 1

    @property
    def fits(self) -> bool:
        if isinstance(self.result, OutOfMemory):
            return False
        assert self.needed is not None
        return self.needed <= self.plan.chip.memory


def confirm(case: Case) -> Confirmation:
    """Plans and compiles a case.

    Raises:
      NotImplementedError: where the compiler is not installed.
      ValueError: for a case that makes no cache, or devices of which there is no slice.
    """
    config = model_config(case.model)
    chip, count = parse_devices(case.devices)
    mesh = sharding.parse_mesh(case.mesh) if case.mesh else None
    found = plan(config, case.quant, case.tokens, chip, count or 1, mesh=mesh)
    devices = deviceless_mesh.devices(chip.name, found.devices)
    result = deviceless_mesh.compile(cached.step, step_arguments(config, case, chip.target, found.mesh, devices))
    text = "" if isinstance(result, OutOfMemory) else result.text
    return Confirmation(case, found, result, all_reduces(text))


def prompt(c: Confirmation, tokens: int) -> dict[str, Compiled | OutOfMemory]:
    """Prefill of a prompt of so many tokens into the cache of a confirmed case, by kind of attention."""
    devices = deviceless_mesh.devices(c.plan.chip.name, c.plan.devices)
    config = model_config(c.case.model)
    model, cache, _, row = step_arguments(config, c.case, c.plan.chip.target, c.plan.mesh, devices)
    ids = jax.ShapeDtypeStruct((cache.batch, tokens), jnp.int32, sharding=row.sharding)
    runs = {"exact": cached.prefill_exact, "cached": cached.prefill_cached}
    return {name: deviceless_mesh.compile(run, (model, cache, ids, row)) for name, run in runs.items()}


def step_arguments(config: ModelConfig, case: Case, target: str, sizes: Mapping[str, int], devices: Any) -> tuple:
    """Abstract model, cache, token and counts of a decode step, all with shardings over `devices`."""
    mesh = sharding.make_mesh(sizes, devices)
    model = abstract_model(config, case.tokens, jnp.bfloat16)
    shape = decode.CacheShape(
        config.layers, config.q_heads, config.kv_heads, config.head_dim, model.rope, config.sliding_window
    )
    cache = abstract_cache(case.quant, preset(case.quant), shape, case.tokens, target=target, mesh=mesh)
    cache = sharding.placed(cache)
    row = _placed(jax.ShapeDtypeStruct((cache.batch,), jnp.int32), NamedSharding(mesh, P()))
    return _sharded(model, mesh), cache, row, row


def _sharded(model: LoadedModel, mesh: Mesh) -> LoadedModel:
    shardings = sharding.model_shardings(model.config, mesh)
    state = {name: _placed(x, shardings[name]) for name, x in model.state.items()}
    rope = jax.tree.map(lambda x: _placed(x, NamedSharding(mesh, P())), model.rope)
    return dataclasses.replace(model, state=state, rope=rope)


def _placed(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def all_reduces(text: str) -> dict[str, int]:
    """All-reduces in optimised HLO of a decode step, by how often they run (`Confirmation.all_reduces`)."""
    found = dict.fromkeys(("layer", "step", "seal"), 0)
    for line in re.findall(r"^.* all-reduce(?:-start)?\(.*$", text, re.M):
        name = re.search(r'op_name="([^"]*)"', line)
        path = name[1] if name else ""
        # The loop over layers comes first; then the branch that seals, with a loop of its own.
        found["seal" if "cond/branch_1_fun" in path.split("/while/body")[0] else _loop(path)] += 1
    return found


def _loop(path: str) -> str:
    return "layer" if "/while/body" in path else "step"


def as_json(c: Confirmation) -> dict[str, Any]:
    facts = dataclasses.asdict(c.case) | {
        "mesh": dict(c.plan.mesh),
        "capacity": c.plan.capacity,
        "path": c.plan.path,
        "usable_bytes": c.plan.chip.memory,
        "planned_argument_bytes": c.planned,
        "planned_temporary_bytes": c.plan.parts["temporaries"],
        "planned_bytes": c.plan.needed,
        "planned_fits": c.plan.fits,
        "planned_all_reduces": {axis: count for axis, (count, _) in c.plan.sent.items()},
        "needed_bytes": c.needed,
        "error": c.error,
        "fits": c.fits,
        "compile_s": c.result.compile_s,
        "compile_cpu_s": c.result.compile_cpu_s,
    }
    if isinstance(c.result, OutOfMemory):
        return facts | {"available_bytes": c.result.available}
    return facts | {
        "argument_bytes": c.result.memory.argument,
        "temporary_bytes": c.result.memory.temporary,
        "alias_bytes": c.result.memory.alias,
        "output_bytes": c.result.memory.output,
        "collectives": {name: c.result.collectives[name] for name in COLLECTIVES},
        "all_reduces": dict(c.all_reduces),
        "lower_s": c.result.lower_s,
    }
