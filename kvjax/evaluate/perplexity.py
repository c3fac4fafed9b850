"""Perplexity, divergence and agreement of compressed caches, by two protocols.

`all` is what the papers measure: every key and value of a window compressed, the current token's too (KVQuant,
arXiv 2401.18079, section 4.1). `decode` is what a user gets: a prompt prefilled exactly and sealed, then real decode
steps. Both go through the codecs' packed bits; the reference is a bfloat16 cache by the same route.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from kvjax import decode
from kvjax.attention import explain
from kvjax.evaluate.compress import bits_of
from kvjax.evaluate.progress import bar
from kvjax.evaluate.runners import Candidate, Kept, PrefillAndSteps, WholeWindows
from kvjax.evaluate.statistics import Totals, token_statistics
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
      bits_read: of a cache that need not read all it stores, bits per element that the decode steps read; else None.
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
    bits_read: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The row with the keys of the command line's JSON."""
        row = dataclasses.asdict(self)
        del row["without_slot"], row["bits_read"]
        return row


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
    return Evaluation(model, windows, protocol=protocol, prefill=prefill, batch=batch).run(policies, progress=progress)


class Evaluation:
    """Windows, protocol and reference of `perplexity`, for policies that come one after the other.

    The reference is compiled once. Its logits are kept on the host, batch by batch, while they fit in `keep_bytes`;
    what does not fit is computed again in every run.
    """

    def __init__(
        self,
        model: LoadedModel,
        windows: np.ndarray,
        *,
        protocol: Protocol = "all",
        prefill: int | None = None,
        batch: int | None = None,
        keep_bytes: int = 0,
    ):
        self.windows = np.asarray(windows)
        if self.windows.ndim != 2 or not len(self.windows) or self.windows.shape[1] < 2:
            raise ValueError(f"`windows` of shape {self.windows.shape} must be [n, L] with L at least 2.")
        n, length = self.windows.shape
        self.model, self.protocol, self.first = model, protocol, first_target(protocol, length, prefill)
        if batch is None:
            batch = max(1, min(_MOST_ROWS[protocol], _LOGITS_AT_ONCE // ((length - self.first) * model.config.vocab)))
        if batch < 1:
            raise ValueError(f"`batch={batch}` must be at least 1.")
        self.batch = min(batch, n)
        self._reference = Kept(self._runner(Candidate(reference_policy(model))), keep_bytes)

    def run(
        self,
        policies: Sequence[Policy | Candidate],
        progress: bool = True,
        on_windows: Callable[[int, int], Any] | None = None,
    ) -> list[Result]:
        """The rows of `policies`, the reference's first.

        Args:
          policies: as for `perplexity`.
          progress: show a bar on stderr.
          on_windows: called with windows done, of all policies together, and their total.
        """
        n, length = self.windows.shape
        candidates = _with_reference(self.model, policies)
        # First, because it also checks each policy against the model.
        bits = [bits_of(self.model, c.policy, capacity=length, block=c.block) for c in candidates]
        runners = [self._reference, *(self._runner(c) for c in candidates[1:])]
        totals = [Totals() for _ in candidates]
        seconds = [0.0 for _ in candidates]
        done, total = 0, n * len(candidates)
        with bar(progress, "windows") as shown:
            task = shown.add_task("", total=total)
            for start in range(0, n, self.batch):
                rows = min(self.batch, n - start)
                # A short last batch is filled up, so that nothing is compiled twice; the filling is not counted.
                tokens = np.resize(self.windows[start : start + rows], (self.batch, length))
                reference = None
                for i, (candidate, runner) in enumerate(zip(candidates, runners)):
                    shown.update(task, description=candidate.policy.name)
                    began = time.perf_counter()
                    logits = runner.logits(tokens, rows)
                    reference = logits if reference is None else reference
                    totals[i].add(np.asarray(token_statistics(reference, logits, tokens[:, self.first :]))[:, :rows])
                    del logits  # before the next ones are made
                    seconds[i] += time.perf_counter() - began
                    shown.advance(task, rows)
                    done += rows
                    if on_windows:
                        on_windows(done, total)
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
                bits_read=runner.bits_read,
            )
            for c, bits_per_element, runner, t, s in zip(candidates, bits, runners, totals, seconds)
        ]

    def _runner(self, candidate: Candidate) -> WholeWindows | PrefillAndSteps:
        if self.protocol == "all":
            return WholeWindows(self.model, candidate)
        return PrefillAndSteps(self.model, candidate, self.first - 1)


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
