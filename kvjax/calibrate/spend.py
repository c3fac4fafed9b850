"""Spending a budget over independent choices, exactly: the multiple-choice knapsack.

A matrix (the keys or the values of one layer) takes one of O options, each with its cost in bits and its loss. Greedy
spending by drop of loss per bit stops short where the next step does not fit; the number of distinct sums of costs is
small here, so the best of all combinations can be had: a dynamic program over the matrices that keeps, of all partial
choices, those that no cheaper one equals.
"""

import numpy as np

_DIGITS = 9  # costs are sums of b + 32/g in binary; equal sums must be equal


def spend(loss: np.ndarray, cost: np.ndarray, budget: float) -> np.ndarray:
    """The choice of least total loss whose mean cost is at most `budget`; of equal losses the cheapest.

    Args:
      loss: `[M, O]`; inf is not chosen.
      cost: `[M, O]`, of the same unit as `budget`.

    Returns:
      `[M]` int, the option of each matrix.

    Raises:
      ValueError: where even the cheapest costs more.
    """
    loss, cost = np.asarray(loss, np.float64), np.asarray(cost, np.float64)
    matrices = len(loss)
    total = round(budget * matrices, _DIGITS)
    cheapest = np.where(np.isfinite(loss), cost, np.inf).min(1)
    # What the matrices behind the one at hand must cost at least.
    rest = np.append(np.cumsum(cheapest[::-1])[::-1], 0.0)
    if round(rest[0], _DIGITS) > total:
        raise ValueError(f"`budget={budget:g}` is below the least possible, {rest[0] / matrices:g}.")
    spent, lost = np.zeros(1), np.zeros(1)
    came_from: list[np.ndarray] = []
    took: list[np.ndarray] = []
    for m in range(matrices):
        costs = np.round(spent[:, None] + cost[m], _DIGITS).ravel()
        losses = (lost[:, None] + loss[m]).ravel()
        fits = np.flatnonzero(np.isfinite(losses) & (np.round(costs + rest[m + 1], _DIGITS) <= total))
        order = fits[np.lexsort((losses[fits], costs[fits]))]
        before = np.minimum.accumulate(np.append(np.inf, losses[order]))[:-1]
        kept = order[losses[order] < before]
        came_from.append(kept // cost.shape[1])
        took.append(kept % cost.shape[1])
        spent, lost = costs[kept], losses[kept]
    at = len(lost) - 1  # the dearest kept is the best: each lost less than all cheaper ones
    choice = np.zeros(matrices, int)
    for m in reversed(range(matrices)):
        choice[m] = took[m][at]
        at = came_from[m][at]
    return choice


def steps(loss: np.ndarray, cost: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Which options are worth measuring around a choice: `[M, O]` bool.

    Of each matrix's options that none cheaper equals in loss, those next to its own, up and down in cost, and its own.
    """
    near = np.zeros(loss.shape, bool)
    for m, own in enumerate(choice):
        order = np.lexsort((loss[m], cost[m]))
        best = np.minimum.accumulate(np.append(np.inf, loss[m][order]))[:-1]
        front = list(order[loss[m][order] < best])
        if own not in front:
            front = sorted([*front, own], key=lambda o: cost[m][o])
        at = front.index(own)
        near[m, front[max(0, at - 1) : at + 2]] = True
    return near
