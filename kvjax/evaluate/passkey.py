"""Passkey retrieval through the real cache: a number hidden in a text, asked for at its end.

The task of Mohtashami and Jaggi (arXiv 2305.16300, section 4.2), which KVQuant's Table 3 reports: perplexity forgives a
cache that has lost a token, this does not.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvjax import decode
from kvjax.evaluate.compress import bits_of
from kvjax.evaluate.progress import bar
from kvjax.model.llama import LoadedModel
from kvjax.policy import Policy

DIGITS = 5
STATEMENT = " The pass key is {key}. Remember it: {key} is the pass key."
QUESTION = " What is the pass key? The pass key is"
# The filler of the original task. It repeats itself, and so asks less of a model than a book does.
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_TOKENS_AT_ONCE = 1 << 15  # of prompts in one batch


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One trial.

    Attributes:
      tokens: `[length]` int32.
      key: the digits to be recalled.
      depth: share of the haystack in front of the key, 0 to 1.
      position: token at which the statement begins.
    """

    tokens: np.ndarray
    key: str
    depth: float
    position: int


@dataclasses.dataclass(frozen=True)
class Result:
    """Recall of one method at one length and depth."""

    quant: str
    bits_per_element: float
    length: int
    depth: float
    trials: int
    correct: int
    recall: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def depths_of(count: int) -> np.ndarray:
    """The middles of `count` equal parts of the haystack.

    Neither end is among them: a key in the first tokens would be kept by exact sinks, one in the last by the ring.
    """
    return (np.arange(count) + 0.5) / count


def prompts(
    tokenizer: Any,
    haystack: np.ndarray | None,
    length: int,
    depths: Sequence[float] | np.ndarray,
    trials: int,
    seed: int = 0,
) -> list[Prompt]:
    """`trials` prompts of exactly `length` tokens for each depth.

    Keys and places in the haystack are drawn from `seed` and the length alone: every method gets the same prompts.

    Args:
      tokenizer: of the model; its BOS goes in front where it puts one.
      haystack: tokens of a text, at least `length`; None for the original task's filler, repeated.
      length: tokens of a prompt, question included.
    """
    rng = np.random.default_rng((seed, length))
    begin = np.asarray(_begin(tokenizer), np.int32)
    question = _encode(tokenizer, QUESTION)
    if haystack is None:
        filler = _encode(tokenizer, FILLER)
        haystack = np.tile(filler, length // len(filler) + 2)
    out = []
    for depth in depths:
        for _ in range(trials):
            key = str(rng.integers(10 ** (DIGITS - 1), 10**DIGITS))  # a number: no leading zero
            statement = _encode(tokenizer, STATEMENT.format(key=key))
            rest = length - len(begin) - len(statement) - len(question)
            if rest < 0:
                raise ValueError(
                    f"`lengths`: {length} tokens are too few for statement and question; use at least {length - rest}."
                )
            if len(haystack) < rest:
                raise ValueError(
                    f"`text` has {len(haystack)} tokens, too few for a prompt of {length}; use a longer text."
                )
            start = int(rng.integers(0, len(haystack) - rest + 1))
            hay = haystack[start : start + rest]
            cut = round(float(depth) * rest)
            tokens = np.concatenate([begin, hay[:cut], statement, hay[cut:], question]).astype(np.int32)
            out.append(Prompt(tokens, key, float(depth), len(begin) + cut))
    return out


def tasks_of(
    model: LoadedModel,
    haystack: np.ndarray | None = None,
    lengths: Sequence[int] = (256, 512, 1024),
    depths: int = 10,
    trials: int = 5,
    seed: int = 0,
) -> dict[int, list[Prompt]]:
    """The prompts of each length, by depth; ValueError for arguments that make none."""
    for name, value in (("depths", depths), ("trials", trials)):
        if value < 1:
            raise ValueError(f"`{name}={value}` must be at least 1.")
    if not lengths:
        raise ValueError("`lengths` is empty; name at least one length in tokens.")
    if max(lengths) > model.config.max_positions:
        raise ValueError(f"`lengths`: {max(lengths)} is beyond the model's {model.config.max_positions} positions.")
    at = depths_of(depths)
    return {n: prompts(model.tokenizer, haystack, n, at, trials, seed) for n in dict.fromkeys(lengths)}


def passkey(
    model: LoadedModel,
    policies: Sequence[Policy],
    haystack: np.ndarray | None = None,
    *,
    lengths: Sequence[int] = (256, 512, 1024),
    depths: int = 10,
    trials: int = 5,
    seed: int = 0,
    progress: bool = True,
    on_prompts: Callable[[int, int], Any] | None = None,
) -> list[Result]:
    """Recall of each policy at each length and depth: exact prefill, then greedy decode steps.

    Args:
      haystack: tokens of a text; None for the original task's filler.
      lengths: tokens of the prompts.
      depths: how many, evenly spread.
      trials: prompts for each length and depth.
      progress: show a bar on stderr.
      on_prompts: called with prompts answered and their total.

    Raises:
      ValueError: for lengths that hold no prompt or exceed the haystack.
    """
    tasks, at = tasks_of(model, haystack, lengths, depths, trials, seed), depths_of(depths)
    results = []
    done, total = 0, len(policies) * sum(len(task) for task in tasks.values())
    with bar(progress, "prompts") as shown:
        row = shown.add_task("", total=total)
        for policy in policies:
            for length, task in tasks.items():
                shown.update(row, description=f"{policy.name} {length}")
                began = time.perf_counter()
                bits, recalled = 0.0, []
                batch = max(1, min(len(task), _TOKENS_AT_ONCE // length))
                for start in range(0, len(task), batch):
                    part = task[start : start + batch]
                    bits, answers = _answers(model, policy, part, batch)
                    recalled += [answer == prompt.key for answer, prompt in zip(answers, part)]
                    shown.advance(row, len(part))
                    done += len(part)
                    if on_prompts:
                        on_prompts(done, total)
                seconds = time.perf_counter() - began
                hits = np.array(recalled).reshape(len(at), trials).sum(1)
                results += [
                    Result(
                        policy.name, bits, length, float(depth), trials, int(hit), int(hit) / trials,
                        round(seconds / len(at), 3),
                    )
                    for depth, hit in zip(at, hits)
                ]  # fmt: skip
    return results


def _answers(model: LoadedModel, policy: Policy, task: list[Prompt], batch: int) -> tuple[float, list[str]]:
    """The digits that greedy decoding gives for each prompt, and the cache's bits per element."""
    # As many tokens as the longest way to write an answer, a blank included.
    new = 1 + max(len(_encode(model.tokenizer, " " + prompt.key)) for prompt in task)
    tokens = np.stack([prompt.tokens for prompt in task])
    tokens = np.resize(tokens, (batch, tokens.shape[1]))  # a short last batch is filled up: nothing compiles twice
    capacity = tokens.shape[1] + new
    cache = decode.init_cache(model, policy, batch=batch, capacity=capacity)
    out, _ = decode.generate(model, cache, tokens, max_new_tokens=new, eos=())
    answers = [model.tokenizer.decode(row).strip()[:DIGITS] for row in out[: len(task)]]
    return bits_of(model, policy, capacity=capacity), answers


def _encode(tokenizer: Any, text: str) -> np.ndarray:
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _begin(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text: [BOS] or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
