"""A model whose layers take their keys and values through codecs that are chosen at every call.

A search tries hundreds of combinations; a policy for each would be compiled for each. Here the choice is an argument:
one compiled function holds every codec, and `lax.switch` runs the chosen one per layer, so that a combination costs
what its policy costs in `kvjax.evaluate.perplexity` (protocol "all") and measures the same.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.evaluate.compress import KVMap, kv_map
from kvjax.evaluate.perplexity import reference_policy
from kvjax.evaluate.statistics import Totals, token_statistics
from kvjax.model.forward import forward
from kvjax.model.llama import LoadedModel
from kvjax.policy import Policy

EXACT = -1  # the choice of the reference's codec, bfloat16
# Logits of one batch, in float32 numbers, and of the reference over all windows (1 GiB), beyond which they are computed
# anew for every combination.
_LOGITS_AT_ONCE, _LOGITS_KEPT = 1 << 26, 1 << 28
_MOST_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Quality:
    """As in `kvjax.evaluate.perplexity.Result`."""

    nll: float
    perplexity: float
    kl: float
    top1_agreement: float
    tokens: int


class Mixture:
    """Quality of any combination of options, one option per layer for keys and one for values."""

    def __init__(
        self,
        model: LoadedModel,
        keys: Sequence[Policy],
        values: Sequence[Policy],
        windows: np.ndarray,
        *,
        block: int = 128,
        batch: int | None = None,
    ):
        """
        Args:
          model: from `kvjax.load`.
          keys, values: the options, as policies for every layer; the keys of the one and the values of the other count.
          windows: `[n, S]` tokens; the first of each is not predicted.
          block: tokens per block.
          batch: windows at a time; None for what fits comfortably. The result does not depend on it.
        """
        windows = np.asarray(windows)
        n, length = windows.shape
        logits = (length - 1) * model.config.vocab
        batch = min(n, batch or max(1, min(_MOST_ROWS, _LOGITS_AT_ONCE // logits)))
        self._model = model
        # A short last batch is filled up, so that nothing is compiled twice; the filling is not counted.
        self._batches = [np.resize(windows[i : i + batch], (batch, length)) for i in range(0, n, batch)]
        self._rows = [min(batch, n - i) for i in range(0, n, batch)]
        self._keep = n * logits <= _LOGITS_KEPT
        self._references: dict[int, jax.Array] = {}
        self.tokens = n * length
        exact = reference_policy(model)
        maps = [[kv_map(policy, model, block) for policy in (exact, *options)] for options in (keys, values)]

        def logits_of(model: LoadedModel, tokens: jax.Array, choice: jax.Array) -> jax.Array:
            return forward(model, tokens, kv_map=_chosen(maps, choice))[:, :-1]

        def statistics(model: LoadedModel, tokens: jax.Array, reference: jax.Array, choice: jax.Array) -> jax.Array:
            return token_statistics(reference, logits_of(model, tokens, choice), tokens[:, 1:])

        self._logits, self._statistics = jax.jit(logits_of), jax.jit(statistics)

    def measure(self, choice: Any) -> Quality:
        """Quality of `choice[L, 2]`: for each layer the number of its keys' and its values' option, or EXACT."""
        chosen = jnp.asarray(np.asarray(choice, np.int32)) + 1
        totals = Totals()
        for i, (tokens, rows) in enumerate(zip(self._batches, self._rows)):
            statistics = self._statistics(self._model, tokens, self._reference(i), chosen)
            totals.add(np.asarray(statistics)[:, :rows])
        return Quality(totals.nll, totals.perplexity, totals.kl, totals.top1_agreement, totals.tokens)

    def _reference(self, batch: int) -> jax.Array:
        if batch in self._references:
            return self._references[batch]
        exact = jnp.zeros((self._model.config.layers, 2), jnp.int32)
        logits = self._logits(self._model, self._batches[batch], exact)
        if self._keep:
            self._references[batch] = logits
        return logits


def _chosen(maps: Sequence[Sequence[KVMap]], choice: jax.Array) -> KVMap:
    """The K and V that attention sees; of each option's map only the half that counts is compiled."""

    def half(side: int, layer: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        branches = [lambda layer, k, v, one=one: one(layer, k, v)[side] for one in maps[side]]
        return jax.lax.switch(choice[layer, side], branches, layer, k, v)

    return lambda layer, k, v: (half(0, layer, k, v), half(1, layer, k, v), True)
