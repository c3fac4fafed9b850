"""The recipe of a training run: frozen dataclasses, filled from TOML, with every unknown key an error."""

import dataclasses
import math
import tomllib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvjax.train.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class Shape:
    """Numbers of a Llama with full rotary embedding and no biases."""

    layers: int = 5
    width: int = 256
    mlp_width: int = 704
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 4096
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    max_positions: int = 2048
    tie_embeddings: bool = True


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv 1711.05101): decay acts on matrices only, gradients are clipped at a global norm."""

    beta1: float = 0.9
    beta2: float = 0.95
    decay: float = 0.1
    clip: float = 1.0
    eps: float = 1e-8
    warmup_steps: int = 50


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training with one mix of tasks.

    Attributes:
      tokens: how much it reads; rounded to whole steps, at least one.
      windows: lengths in tokens; the steps take them in turn.
      learning_rate: at its first and last step; linear in between.
      mix: share of the windows per task, by the names in `tasks.TASKS`; they add up to 1.
      facts: fewest and most facts in a recall window.
    """

    name: str
    tokens: int
    windows: tuple[int, ...]
    learning_rate: tuple[float, float]
    mix: dict[str, float]
    facts: tuple[int, int] = (1, 1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides the numbers of a run, save the corpus and the tokenizer.

    Attributes:
      tokens_per_step: every step reads this many tokens, in as many windows as that makes.
      compute_dtype: of the matrix products; weights and optimizer stay float32. `auto` is bfloat16 on GPU and
        TPU and float32 on CPU, where bfloat16 saves a tenth of the time at best (docs/training.md).
      init_std: standard deviation of the initial matrices.
      phases: in order.
    """

    phases: tuple[Phase, ...]
    seed: int = 0
    tokens_per_step: int = 8192
    compute_dtype: str = "auto"
    init_std: float = 0.02
    model: Shape = Shape()
    optimizer: Optimizer = Optimizer()

    @property
    def phase_steps(self) -> tuple[int, ...]:
        return tuple(max(1, round(phase.tokens / self.tokens_per_step)) for phase in self.phases)

    @property
    def steps(self) -> int:
        return sum(self.phase_steps)

    def locate(self, step: int) -> tuple[Phase, int, int]:
        """Phase of a step, the step's index in it, and the phase's number of steps."""
        for phase, steps in zip(self.phases, self.phase_steps):
            if step < steps:
                return phase, step, steps
            step -= steps
        raise ValueError(f"`step` lies {step} steps behind the end; the recipe has {self.steps}.")

    def window(self, step: int) -> int:
        """Length in tokens of the windows of a step."""
        phase, index, _ = self.locate(step)
        return phase.windows[index % len(phase.windows)]

    def learning_rate(self, step: int) -> float:
        """Linear within each phase, times a linear warm-up that ends at step `warmup_steps - 1`."""
        phase, index, steps = self.locate(step)
        first, last = phase.learning_rate
        rate = first + (last - first) * index / max(1, steps - 1)
        return rate * min(1.0, (step + 1) / max(1, self.optimizer.warmup_steps))

    def scaled(self, factor: float) -> "Recipe":
        """The same phases with `factor` times the tokens; of a short run no more than a twentieth is warm-up."""
        phases = tuple(dataclasses.replace(p, tokens=max(1, round(p.tokens * factor))) for p in self.phases)
        scaled = dataclasses.replace(self, phases=phases)
        warmup = min(self.optimizer.warmup_steps, max(1, scaled.steps // 20))
        return dataclasses.replace(scaled, optimizer=dataclasses.replace(self.optimizer, warmup_steps=warmup))


def load(path: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """Reads a recipe from TOML and changes it by `key=value` settings, as in `phases.0.tokens=1000000`.

    Raises:
      ValueError: unreadable file, unknown key, value of the wrong kind, or numbers that do not fit together.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"`{path}` cannot be read ({error.strerror}); give the path of a recipe.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is not TOML: {error}") from None
    for setting in settings:
        _set(table, setting)
    return from_table(table)


def from_table(table: dict[str, Any]) -> Recipe:
    """Builds and checks a recipe from plain dicts and lists; `dataclasses.asdict` is the way back."""
    recipe = _fill(Recipe, table, "")
    _check(recipe)
    return recipe


def _set(table: Any, setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals:
        raise ValueError(f"`--set {setting}` has no `=`; write key=value, for example optimizer.clip=0.5.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = key.strip().split(".")
    for part in parents:
        table = _child(table, part, setting)
    if isinstance(table, list):
        _child(table, last, setting)
        table[int(last)] = value
    else:
        table[last] = value  # an unknown name is found when the recipe is filled


def _child(table: Any, part: str, setting: str) -> Any:
    if isinstance(table, list):
        if not part.isdigit() or int(part) >= len(table):
            raise ValueError(f"`--set {setting}`: `{part}` must be an index from 0 to {len(table) - 1}.")
        return table[int(part)]
    child = table.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise ValueError(f"`--set {setting}`: `{part}` holds a value and has no keys below it.")
    return child


def _fill(kind: Any, value: Any, path: str) -> Any:
    """Converts plain TOML values to the annotated type `kind`; `path` is for error messages."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"`{path}` must be a table; it is {value!r}.")
        fields = {field.name: field for field in dataclasses.fields(kind)}
        prefix = f"{path}." if path else ""
        for key in value:
            if key not in fields:
                raise ValueError(f"Unknown key `{prefix}{key}`; known keys: {', '.join(fields)}.")
        for key, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if key not in value and required:
                raise ValueError(f"`{prefix}{key}` is missing from the recipe; add it.")
        hints = typing.get_type_hints(kind)
        make: Any = kind
        return make(**{key: _fill(hints[key], entry, prefix + key) for key, entry in value.items()})
    if origin is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, list | tuple) or (inner[-1] is not ... and len(value) != len(inner)):
            wanted = "a list" if inner[-1] is ... else f"a list of {len(inner)}"
            raise ValueError(f"`{path}` must be {wanted}; it is {value!r}.")
        kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
        return tuple(_fill(k, entry, f"{path}.{i}") for i, (k, entry) in enumerate(zip(kinds, value)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"`{path}` must be a table; it is {value!r}.")
        return {key: _fill(typing.get_args(kind)[1], entry, f"{path}.{key}") for key, entry in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 8e6 reads better than 8000000
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"`{path}` must be of type {kind.__name__}; it is {value!r}.")
    return value


def _check(recipe: Recipe) -> None:
    shape, optimizer = recipe.model, recipe.optimizer
    if not recipe.phases:
        raise ValueError("`phases` is empty; a recipe needs at least one phase.")
    if recipe.compute_dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"`compute_dtype` must be auto, float32 or bfloat16, not {recipe.compute_dtype!r}.")
    if shape.q_heads % shape.kv_heads or shape.head_dim % 2:
        raise ValueError(
            f"`model`: q_heads={shape.q_heads} must be a multiple of kv_heads={shape.kv_heads} "
            f"and head_dim={shape.head_dim} even."
        )
    for name, number in [*vars(shape).items(), ("tokens_per_step", recipe.tokens_per_step)]:
        if number <= 0 and not isinstance(number, bool):
            raise ValueError(f"`{name}` must be positive; it is {number}.")
    if not (0 <= optimizer.beta1 < 1 and 0 <= optimizer.beta2 < 1 and optimizer.clip > 0):
        raise ValueError("`optimizer`: the betas must lie in [0, 1) and clip above 0.")
    for index, phase in enumerate(recipe.phases):
        _check_phase(phase, f"phases.{index}", recipe)


def _check_phase(phase: Phase, path: str, recipe: Recipe) -> None:
    if phase.tokens <= 0:
        raise ValueError(f"`{path}.tokens` must be positive; it is {phase.tokens}.")
    if not phase.windows:
        raise ValueError(f"`{path}.windows` is empty; give at least one length in tokens.")
    for window in phase.windows:
        if not 16 <= window <= recipe.model.max_positions or recipe.tokens_per_step % window:
            raise ValueError(
                f"`{path}.windows`: {window} must divide tokens_per_step={recipe.tokens_per_step} "
                f"and lie between 16 and max_positions={recipe.model.max_positions}."
            )
    if unknown := set(phase.mix) - set(TASKS):
        raise ValueError(f"Unknown key `{path}.mix.{min(unknown)}`; known keys: {', '.join(TASKS)}.")
    if min(phase.mix.values(), default=-1) < 0 or not math.isclose(sum(phase.mix.values()), 1, abs_tol=1e-6):
        raise ValueError(f"`{path}.mix` must hold shares that add up to 1; they are {phase.mix}.")
    if not 1 <= phase.facts[0] <= phase.facts[1]:
        raise ValueError(f"`{path}.facts` must be [fewest, most], at least 1; it is {list(phase.facts)}.")
