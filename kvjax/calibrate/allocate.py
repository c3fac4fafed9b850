"""asymkv-auto: a budget of true bits, spent over layers, keys and values where measurement says.

AsymKV (arXiv 2410.13212) gives the first l_k layers' keys and the first l_v layers' values more bits, and finds l_k and
l_v by trying every pair. Here every layer's keys and values have options of their own (widths, groups, levels), and

1. the sensitivity of each matrix to each option is measured: the KL to the uncompressed model's predictions with this
   matrix stored and all others exact;
2. as if these added up, the budget is spent exactly (`kvjax.calibrate.spend`), metadata billed;
3. they do not add up at 1 bit, so the choice is refined on what is measured jointly: the options next to the chosen
   ones are measured with all others as chosen, the budget is spent anew on those differences, and what is better in
   truth is kept; where that is none, the most promising exchanges of two matrices are tried.

All combinations share one compiled function (`kvjax.analysis.mixture`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from kvjax.analysis.mixture import EXACT, Mixture
from kvjax.analysis.search import bits_of_options
from kvjax.calibrate import allocation_file
from kvjax.calibrate.allocation_file import Allocation
from kvjax.calibrate.spend import spend, steps
from kvjax.calibrate.text import self_sampled_tokens, tokens_from_file
from kvjax.codecs import AffineCodec
from kvjax.evaluate.progress import bar
from kvjax.model.llama import LoadedModel
from kvjax.policy import Preset, bind, check_alone, fitted_file
from kvjax.presets import named

# KL is a statistic of every position, not of the tokens that came: few windows say which matrices matter.
SAMPLES, LENGTH = 8, 512
ROUNDS = 4  # of refinement
_EXCHANGES = 8  # tried in a round whose joint step was no better


def allocated(
    model: LoadedModel, name: str, preset: Preset, calibration: Any = None, text: Any = None, progress: bool = True
) -> Preset:
    """`preset` with its budget spent: codecs by layer in `overrides`, and no budget.

    Args:
      model: from `kvjax.load`.
      name: the preset's.
      calibration: a file of `allocation_file.save` to use.
      text: UTF-8 text file to measure on, now. Without it the allocation comes from `calibration/NAME.json` in the
        model's directory, else from the user's cache, else it is measured now, on text that the model writes, and kept.

    Raises:
      ValueError, OSError: one line, for a budget that cannot be met, and for files of another model or preset.
    """
    if text is not None:
        check_alone(name, "scripts/allocate.py auto")
        return preset_of(allocate(model, name, preset, text=text, progress=progress), preset, model)
    path, cached = fitted_file(model, allocation_file.file_name(name, preset))
    if path := calibration or path:
        return preset_of(allocation_file.load(path, model, name, preset), preset, model)
    check_alone(name, "scripts/allocate.py auto")
    found = allocate(model, name, preset, progress=progress)
    cached.parent.mkdir(parents=True, exist_ok=True)
    allocation_file.save(cached, found)
    return preset_of(found, preset, model)


def preset_of(allocation: Allocation, preset: Preset, model: LoadedModel) -> Preset:
    """An allocation as a preset with overrides; windows and sinks are those of `preset`."""
    chosen = allocation_file.as_preset(allocation)
    chosen.codecs(model.config.layers)  # refuses layers that the model does not have
    return dataclasses.replace(
        preset, keys=chosen.keys, values=chosen.values, overrides=chosen.overrides, budget=None, options=()
    )


def allocate(
    model: LoadedModel,
    name: str,
    preset: Preset,
    *,
    text: Any = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    rounds: int = ROUNDS,
    batch: int | None = None,
    progress: bool = True,
) -> Allocation:
    """Measures sensitivities of a model and spends the preset's budget by them.

    Args:
      text: UTF-8 text file; None: the model writes its own.
      samples, length: windows of text and their tokens (8 of 512, or the model's context where that is shorter).
      seed: of the windows or of the sampled text.
      rounds: of refinement; 0: none, the matrices' losses are taken to add up.
      batch: windows at a time; no result depends on it.
    """
    if preset.budget is None:
        raise ValueError(f"`quant={name}` has no budget to spend; use asymkv-auto@BITS.")
    config = model.config
    samples = SAMPLES if samples is None else samples
    length = min(LENGTH, config.max_positions) if length is None else length
    if samples < 1 or not 2 <= length <= config.max_positions:
        raise ValueError(
            f"`samples={samples}` must be at least 1, and `length={length}` 2 to the model's {config.max_positions}."
        )
    if rounds < 0:
        raise ValueError(f"`rounds={rounds}` must be 0 or more.")
    options = [named(option) for option in preset.options]
    bits = bits_of_options(model, [(option.keys, option.values) for option in options])
    check_budget(name, preset.budget, bits)
    if text is None:
        tokens, source = self_sampled_tokens(model, samples, length, seed, progress=progress)
    else:
        tokens, source = tokens_from_file(model, text, samples, length, seed)
    policies = [
        bind(label, dataclasses.replace(option, sinks=preset.sinks), config.layers)
        for label, option in zip(preset.options, options)
    ]
    mixture = Mixture(model, policies, policies, tokens, batch=batch)
    # Matrices in the order of [L, 2] flattened: keys, values, keys, ...
    cost = np.tile(bits, (config.layers, 1))
    same = _same(options, config.head_dim)
    with bar(progress, "measurements") as shown:
        task = shown.add_task("sensitivities", total=2 * config.layers * sum(map(len, map(set, same))) // 2)

        def measure(choice: np.ndarray) -> float:
            kl = mixture.measure(choice.reshape(config.layers, 2)).kl
            shown.advance(task)
            return kl

        loss = sensitivities(measure, 2 * config.layers, same)
        choice = spend(loss, cost, preset.budget)
        # Up to two options beside each matrix's own, the joint step, and the exchanges.
        most = rounds * (4 * config.layers + 1 + _EXCHANGES)
        shown.reset(task, total=1 + most, description="joint refinement")
        choice, kl, measured = refine(measure, loss, cost, choice, preset.budget, rounds)
    by_layer = choice.reshape(config.layers, 2)
    return Allocation(
        name=name,
        model=model.fingerprint,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        budget=preset.budget,
        options=preset.options,
        bits_per_element=float(cost[np.arange(len(choice)), choice].mean()),
        keys=tuple(preset.options[o] for o in by_layer[:, 0]),
        values=tuple(preset.options[o] for o in by_layer[:, 1]),
        k_sensitivity=tuple(map(tuple, loss[0::2].tolist())),
        v_sensitivity=tuple(map(tuple, loss[1::2].tolist())),
        kl_added_up=float(loss[np.arange(len(choice)), choice].sum()),
        kl=kl,
        measurements=measured,
        source=source,
        tokens=int(tokens.size),
    )


def check_budget(name: str, budget: float, bits: np.ndarray) -> None:
    """Raises ValueError, with the range, for a budget that options of `bits[2, O]` cannot meet or cannot use up."""
    low, high = bits.min(1).mean(), bits.max(1).mean()
    if not low - 1e-9 <= budget <= high + 1e-9:
        raise ValueError(
            f"`quant={name}`: a budget of {budget:g} true bits per element (scales included) cannot be "
            f"{'met' if budget < low else 'used up'}; for this model's shape it goes from {low:g} to {high:g}, "
            "and with other groups (-g64, -g128) to other bounds."
        )


def sensitivities(measure: Callable[[np.ndarray], float], matrices: int, same: list[list[int]]) -> np.ndarray:
    """The KL with one matrix stored and all others exact, `[M, O]`.

    Args:
      measure: KL of a choice `[M]`.
      same: for keys and for values, the option that each option is the same as (its own number if none).
    """
    loss = np.zeros((matrices, len(same[0])))
    for m in range(matrices):
        for option, first in enumerate(same[m % 2]):
            if first < option:
                loss[m, option] = loss[m, first]
                continue
            choice = np.full(matrices, EXACT)
            choice[m] = option
            loss[m, option] = measure(choice)
    return loss


def refine(
    measure: Callable[[np.ndarray], float],
    loss: np.ndarray,
    cost: np.ndarray,
    choice: np.ndarray,
    budget: float,
    rounds: int,
) -> tuple[np.ndarray, float, int]:
    """A choice within the budget that is measured, jointly, to be no worse than `choice`.

    Args:
      measure: KL of a choice `[M]`.
      loss, cost: `[M, O]`, sensitivities and bits.

    Returns:
      The choice, its KL, and how many combinations were measured.
    """
    seen: dict[bytes, float] = {}

    def kl_of(choice: np.ndarray) -> float:
        key = choice.astype(np.int32).tobytes()
        if key not in seen:
            seen[key] = measure(choice)
        return seen[key]

    best = kl_of(choice)
    for _ in range(rounds):
        local = np.full(loss.shape, np.inf)
        for m, option in zip(*np.nonzero(_payable(steps(loss, cost, choice), cost, choice, budget))):
            local[m, option] = kl_of(_with(choice, m, option)) - best
        tried = [spend(local, cost, budget), *_exchanges(local, cost, choice, budget)[:_EXCHANGES]]
        for other in tried:
            if kl_of(other) < best:
                choice, best = other, kl_of(other)
                break
        else:
            break
    return choice, best, len(seen)


def _payable(near: np.ndarray, cost: np.ndarray, choice: np.ndarray, budget: float) -> np.ndarray:
    """`near` without the options that all steps down of the other matrices together could not pay for."""
    own = cost[np.arange(len(choice)), choice]
    change = np.where(near, cost - own[:, None], 0.0)
    saving = -change.min(1)
    funds = budget * len(choice) - own.sum() + saving.sum()
    return near & (change <= (funds - saving)[:, None] + 1e-9)


def _exchanges(local: np.ndarray, cost: np.ndarray, choice: np.ndarray, budget: float) -> list[np.ndarray]:
    """Changes of one or two matrices that fit the budget and promise a gain, the most promising first."""
    matrices = len(choice)
    own = cost[np.arange(matrices), choice]
    changes = [(m, o) for m, o in zip(*np.nonzero(np.isfinite(local))) if o != choice[m]]
    spare = budget * matrices - own.sum() + 1e-9
    found = []
    for i, (m, o) in enumerate(changes):
        first = cost[m, o] - own[m]
        if first <= spare:
            found.append((local[m, o], _with(choice, m, o)))
        for n, p in changes[:i]:
            if n != m and first + cost[n, p] - own[n] <= spare:
                found.append((local[m, o] + local[n, p], _with(_with(choice, m, o), n, p)))
    return [other for gain, other in sorted(found, key=lambda pair: pair[0]) if gain < 0]


def _with(choice: np.ndarray, matrix: int, option: int) -> np.ndarray:
    other = choice.copy()
    other[matrix] = option
    return other


def _same(options: list[Preset], head_dim: int) -> list[list[int]]:
    """For keys and for values: the first option that stores the same (a head smaller than a group is one group)."""
    values = [option.values for option in options]
    values = [
        dataclasses.replace(codec, group=min(codec.group, head_dim))
        if isinstance(codec, AffineCodec) and codec.group
        else codec
        for codec in values
    ]
    return [[codecs.index(codec) for codec in codecs] for codecs in ([o.keys for o in options], values)]
