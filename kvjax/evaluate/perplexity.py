"""Perplexity, divergence and agreement of compressed caches, by two protocols.

`all` is what the papers measure: every key and value of a window compressed, the current token's too (KVQuant,
arXiv 2401.18079, section 4.1). `decode` is what a user gets: a prompt prefilled exactly and sealed, then real decode
steps. Both go through the codecs' packed bits; the reference is a bfloat16 cache by the same route.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from kvjax import decode
from kvjax.attention import explain
from kvjax.evaluate.compress import bits_of, kv_map, share_without_slot
from kvjax.evaluate.progress import bar
from kvjax.evaluate.statistics import Totals, token_statistics
from kvjax.model.forward import forward
from kvjax.model.llama import LoadedModel
from kvjax.policy import Policy, bind, preset

REFERENCE = "bf16"
Protocol = Literal["all", "decode"]
# Logits of one batch, in float32 numbers: 256 MiB, of which a handful of copies live at once.
_LOGITS_AT_ONCE = 1 << 26
# Rows share the cost of a decode step; whole windows keep the machine busy by themselves.
_MOST_ROWS = {"all": 4, "decode": 64}


@dataclasses.dataclass(frozen=True)
class Result:
    """One method's row.

    Attributes:
      quant: the policy's name.
      bits_per_element: of sealed storage as a real cache allocates it for one window.
      nll: mean negative log-likelihood per predicted token, nats.
      perplexity: exp(nll).
      kl: mean KL(bf16 || quant) per predicted token, nats.
      top1_agreement: share of predictions whose likeliest token is the reference's.
      tokens: predictions counted.
      seconds: spent on this row, compilation included.
      without_slot: outliers that found no slot, as a share of all elements; they saturate.
    """

    quant: str
    bits_per_element: float
    nll: float
    perplexity: float
    kl: float
    top1_agreement: float
    tokens: int
    seconds: float
    without_slot: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The row with the keys of the command line's JSON."""
        row = dataclasses.asdict(self)
        del row["without_slot"]
        return row


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A policy and the block it is cut into (tokens; only codecs with statistics over a block depend on it)."""

    policy: Policy
    block: int = 128


def perplexity(
    model: LoadedModel,
    policies: Sequence[Policy | Candidate],
    windows: np.ndarray,
    *,
    protocol: Protocol = "all",
    prefill: int | None = None,
    batch: int | None = None,
    progress: bool = True,
) -> list[Result]:
    """Evaluates caches on windows of text.

    Args:
      model: from `kvjax.load`.
      policies: from `kvjax.policy`; the uncompressed reference comes first in the result whether listed or not.
      windows: `[n, L]` tokens; the first of each is not predicted.
      protocol: "all": every K and V of the window is encoded and decoded, sinks apart, and the window is read at once.
        An exact window of recent tokens (KIVI) cannot be had there: one K and V serve all queries.
        "decode": the first `prefill` tokens by `kvjax.decode.prefill`, the others by decode steps; only what the decode
        steps predict is counted.
      prefill: tokens, 1 to L - 2; None for half of the window. "decode" only.
      batch: windows at a time; None for what fits comfortably. The result does not depend on it.
      progress: show a bar on stderr.

    Raises:
      ValueError: for arguments that make no evaluation, and policies made for another model.
    """
    windows = np.asarray(windows)
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise ValueError(f"`windows` of shape {windows.shape} must be [n, L] with L at least 2.")
    n, length = windows.shape
    first = first_target(protocol, length, prefill)
    if batch is None:
        batch = max(1, min(_MOST_ROWS[protocol], _LOGITS_AT_ONCE // ((length - first) * model.config.vocab)))
    if batch < 1:
        raise ValueError(f"`batch={batch}` must be at least 1.")
    batch = min(batch, n)
    candidates = _with_reference(model, policies)
    # First, because it also checks each policy against the model.
    bits = [bits_of(model, c.policy, capacity=length, block=c.block) for c in candidates]
    runners = [_All(model, c) if protocol == "all" else _Decode(model, c, first - 1) for c in candidates]
    totals = [Totals() for _ in candidates]
    seconds = [0.0 for _ in candidates]
    with bar(progress, "windows") as shown:
        task = shown.add_task("", total=n * len(candidates))
        for start in range(0, n, batch):
            rows = min(batch, n - start)
            # A short last batch is filled up, so that nothing is compiled twice; the filling is not counted.
            tokens = np.resize(windows[start : start + rows], (batch, length))
            reference = None
            for i, (candidate, runner) in enumerate(zip(candidates, runners)):
                shown.update(task, description=candidate.policy.name)
                began = time.perf_counter()
                logits = runner.logits(tokens, rows)
                reference = logits if reference is None else reference
                totals[i].add(np.asarray(token_statistics(reference, logits, tokens[:, first:]))[:, :rows])
                del logits  # before the next ones are made
                seconds[i] += time.perf_counter() - began
                shown.advance(task, rows)
    return [
        Result(
            quant=c.policy.name,
            bits_per_element=bits_per_element,
            nll=t.nll,
            perplexity=t.perplexity,
            kl=t.kl,
            top1_agreement=t.top1_agreement,
            tokens=t.tokens,
            seconds=round(s, 3),
            without_slot=runner.without_slot,
        )
        for c, bits_per_element, runner, t, s in zip(candidates, bits, runners, totals, seconds)
    ]


def path_of(model: LoadedModel, policy: Policy, protocol: Protocol) -> str:
    """What the numbers of a policy went through, a line per segment."""
    if protocol == "all":
        return "codec encode and decode, attention over the decoded window (reference); no exact window"
    return explain(jax.eval_shape(lambda: decode.init_cache(model, policy, batch=1, capacity=1)))


def reference_policy(model: LoadedModel) -> Policy:
    return bind(REFERENCE, preset(REFERENCE), model.config.layers)


def _with_reference(model: LoadedModel, policies: Sequence[Policy | Candidate]) -> list[Candidate]:
    candidates = [p if isinstance(p, Candidate) else Candidate(p) for p in policies]
    return [Candidate(reference_policy(model))] + [c for c in candidates if c.policy.name != REFERENCE]


def first_target(protocol: Protocol, length: int, prefill: int | None) -> int:
    """Index in a window of `length` tokens of the first token whose prediction counts; ValueError for none."""
    if protocol == "all":
        if prefill is not None:
            raise ValueError(f'`prefill={prefill}` goes with protocol "decode"; "all" reads each window at once.')
        return 1
    if protocol != "decode":
        raise ValueError(f'`protocol={protocol!r}` must be "all" or "decode".')
    prefill = length // 2 if prefill is None else prefill
    if not 1 <= prefill <= length - 2:
        raise ValueError(
            f"`prefill={prefill}` must lie between 1 and {length - 2}: of {length} tokens at least one is fed to a "
            "decode step and one predicted by it."
        )
    return prefill + 1


class _All:
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


class _Decode:
    """Windows prefilled up to `prefill` tokens, the rest fed to decode steps one by one."""

    def __init__(self, model: LoadedModel, candidate: Candidate, prefill: int):
        self._model, self._candidate, self._prefill = model, candidate, prefill
        self._dropped = self._elements = 0

    def logits(self, tokens: np.ndarray, rows: int) -> jax.Array:
        candidate, config = self._candidate, self._model.config
        batch, length = tokens.shape
        cache = decode.init_cache(self._model, candidate.policy, batch=batch, capacity=length, block=candidate.block)
        _, cache = decode.prefill(self._model, cache, tokens[:, : self._prefill])
        logits, cache = decode.score(self._model, cache, tokens[:, self._prefill : -1])
        self._dropped += sum(int(np.asarray(segment.dropped)[:, :rows].sum()) for segment in cache.segments)
        sealed = int(np.asarray(cache.sealed(cache.length))[:rows].sum()) * cache.block
        self._elements += 2 * sealed * config.layers * config.kv_heads * config.head_dim
        return logits

    @property
    def without_slot(self) -> float:
        return self._dropped / self._elements if self._elements else 0.0
