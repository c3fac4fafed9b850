"""How evaluations make logits: through the codecs at once, or through prefill and decode steps."""

import dataclasses
from typing import Any

import jax
import numpy as np

from kvjax import decode
from kvjax.evaluate.compress import kv_map, share_without_slot
from kvjax.model.forward import forward
from kvjax.model.llama import LoadedModel
from kvjax.policy import Policy


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A policy and the block it is cut into (tokens; only codecs with statistics over a block depend on it)."""

    policy: Policy
    block: int = 128


class WholeWindows:
    """Windows read at once, with every K and V stored and read back."""

    def __init__(self, model: LoadedModel, candidate: Candidate):
        through = kv_map(candidate.policy, model, candidate.block)
        self._model, self._policy = model, candidate.policy
        self._forward = jax.jit(lambda model, tokens: forward(model, tokens, kv_map=through)[:, :-1])
        self._share: float | None = None

    def logits(self, tokens: np.ndarray, rows: int) -> jax.Array:
        if self._share is None:  # of the first window only: it costs a forward pass of its own
            self._share = share_without_slot(self._model, self._policy, tokens[:1])
        return self._forward(self._model, tokens)

    @property
    def without_slot(self) -> float:
        return self._share or 0.0

    @property
    def bits_read(self) -> float | None:
        return None  # no decode step reads here


class PrefillAndSteps:
    """Windows prefilled up to `prefill` tokens, the rest fed to decode steps one by one."""

    def __init__(self, model: LoadedModel, candidate: Candidate, prefill: int):
        self._model, self._candidate, self._prefill = model, candidate, prefill
        self._dropped = self._elements = 0
        self._read: list[tuple[float, int]] = []

    def logits(self, tokens: np.ndarray, rows: int) -> jax.Array:
        candidate, config = self._candidate, self._model.config
        batch, length = tokens.shape
        cache = decode.init_cache(self._model, candidate.policy, batch=batch, capacity=length, block=candidate.block)
        _, cache = decode.prefill(self._model, cache, tokens[:, : self._prefill])
        logits, cache = decode.score(self._model, cache, tokens[:, self._prefill : -1])
        self._dropped += sum(int(np.asarray(segment.dropped)[:, :rows].sum()) for segment in cache.segments)
        sealed = int(np.asarray(cache.sealed(cache.length))[:rows].sum()) * cache.block
        self._elements += 2 * sealed * config.layers * config.kv_heads * config.head_dim
        if (read := decode.bits_read(cache)) is not None:
            self._read.append((read["all"], rows))
        return logits

    @property
    def without_slot(self) -> float:
        return self._dropped / self._elements if self._elements else 0.0

    @property
    def bits_read(self) -> float | None:
        return sum(bits * rows for bits, rows in self._read) / sum(r for _, r in self._read) if self._read else None


class Kept:
    """The logits of `runner`, kept on the host for as many batches as fit in `room` bytes."""

    def __init__(self, runner: WholeWindows | PrefillAndSteps, room: int):
        self._runner, self._room = runner, room
        self._kept: dict[bytes, np.ndarray] = {}

    def logits(self, tokens: np.ndarray, rows: int) -> Any:
        key = tokens.tobytes()
        if key in self._kept:
            return self._kept[key]
        logits = self._runner.logits(tokens, rows)
        if logits.nbytes <= self._room:
            self._room -= logits.nbytes
            self._kept[key] = np.asarray(logits)
        return logits

    @property
    def without_slot(self) -> float:
        return self._runner.without_slot

    @property
    def bits_read(self) -> float | None:
        return self._runner.bits_read
