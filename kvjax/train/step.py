"""One step of training: the state, the optimizer, and where both live on the devices.

Data parallelism only: a mesh with the axis `data`, batches sharded along it, weights replicated. XLA's partitioner
(axis type Auto) puts in the one all-reduce of the gradients.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kvjax.model.config import ModelConfig
from kvjax.model.llama import LoadedModel
from kvjax.model.rope import Leaf, Rope, make_rope
from kvjax.model.weights import init_random
from kvjax.train.loss import token_losses
from kvjax.train.recipe import Optimizer, Recipe, Shape
from kvjax.train.tasks import TASKS

MAX_TASKS = len(TASKS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes.

    Attributes:
      params: float32 weights by name, as `LoadedModel.state`.
      optimizer: moments, as optax keeps them.
    """

    params: Leaf
    optimizer: Leaf


@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows on the host: tokens `[B, S + 1]` int32, weights `[B, S]` float32, tasks `[B]` (index into `TASKS`)."""

    tokens: np.ndarray
    weights: np.ndarray
    tasks: np.ndarray


Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all given devices (by default all there are) with the one axis `data`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def initial_model(recipe: Recipe) -> LoadedModel:
    """The untrained model in float32; the same for the same seed, on any number of devices."""
    config = dataclasses.replace(_config(recipe.model), initializer_range=recipe.init_std)
    return init_random(config, _rope(recipe.model), recipe.seed)


def _rope(shape: Shape) -> Rope:
    return make_rope(shape.head_dim, shape.max_positions, rope_theta=shape.rope_theta)


def _config(shape: Shape) -> ModelConfig:
    return ModelConfig(
        layers=shape.layers,
        width=shape.width,
        mlp_width=shape.mlp_width,
        q_heads=shape.q_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab=shape.vocab,
        norm_eps=shape.norm_eps,
        tie_embeddings=shape.tie_embeddings,
        max_positions=shape.max_positions,
        bos_id=0,
        eos_ids=(1,),
    )


def make_optimizer(settings: Optimizer) -> optax.GradientTransformation:
    """AdamW without its learning rate, which the step multiplies in: updates are to be scaled by `-rate`."""

    def matrices(params):
        return {name: not name.endswith(("norm", "_bias")) for name in params}

    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps),
        optax.add_decayed_weights(settings.decay, matrices),
    )


def compute_dtype(recipe: Recipe, platform: str) -> str:
    """Dtype of activations and of the weights that products see; see `Recipe.compute_dtype`."""
    if recipe.compute_dtype == "auto":
        return "float32" if platform == "cpu" else "bfloat16"
    return recipe.compute_dtype


def initial_state(model: LoadedModel, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Weights and zero moments, replicated over the mesh."""
    params = jax.tree.map(jnp.copy, model.state)  # the first step donates them; the model's own must live on
    state = TrainState(params, make_optimizer(recipe.optimizer).init(params))
    return jax.device_put(state, NamedSharding(mesh, P()))


def place(batch: Batch, mesh: Mesh) -> tuple[jax.Array, ...]:
    """The arrays of a batch on the devices, their rows sharded over `data`."""
    return jax.device_put((batch.tokens, batch.weights, batch.tasks.astype(np.int32)), NamedSharding(mesh, P("data")))


def make_step(recipe: Recipe, mesh: Mesh) -> Step:
    """Compiles `(state, rate, tokens, weights, tasks) -> (state, metrics)`; the state is donated.

    Metrics: `loss`, the mean over all weighted predictions in nats; `task_loss` and `task_weight` `[tasks]`, the sums
    per task; `gradient_norm` before clipping. Losses and softmax are float32 whatever the compute dtype.
    """
    return _make_step(recipe.model, recipe.optimizer, compute_dtype(recipe, mesh.devices.flat[0].platform), mesh)


@functools.lru_cache(maxsize=8)  # a run resumed in the same process compiles nothing again
def _make_step(shape: Shape, settings: Optimizer, dtype: str, mesh: Mesh) -> Step:
    optimizer = make_optimizer(settings)
    config, rope = _config(shape), _rope(shape)
    replicated, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def objective(params, tokens, weights):
        model = LoadedModel({name: x.astype(dtype) for name, x in params.items()}, rope, config)
        return token_losses(model, tokens, weights / weights.sum())

    def step(state, rate, tokens, weights, tasks):
        (loss, losses), gradients = jax.value_and_grad(objective, has_aux=True)(state.params, tokens, weights)
        # optax multiplies Python floats and integer counts; a session of strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        row_task = jax.nn.one_hot(tasks, MAX_TASKS, dtype=jnp.float32)
        metrics = {
            "loss": loss,
            "task_loss": (losses * weights).sum(1) @ row_task,
            "task_weight": weights.sum(1) @ row_task,
            "gradient_norm": optax.tree.norm(gradients),
        }
        return TrainState(params, moments), metrics

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(replicated, replicated, by_row, by_row, by_row),
        out_shardings=(replicated, replicated),
    )
