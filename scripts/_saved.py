"""--save-cache and --load-cache of generate.py."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import kvjax
from kvjax import saving


class Saved:
    """The cache that a run goes on with, and the one that it leaves behind, if any.

    Attributes:
      length: tokens in the loaded cache, 0 without one.
      form: what `init_cache` must be told to make a cache of the same shapes.
      waited: seconds that the run waited for the save to begin; the files are written while it decodes.
      report: what was loaded, and saved.
    """

    def __init__(self, args: argparse.Namespace):
        """Reads what is saved, but no arrays, and decides `args.quant`; raises ValueError for options at odds."""
        self.load_from, self.save_to, self.calibration = args.load_cache, args.save_cache, args.calibration
        self.length, self.waited = 0, 0.0
        self.form: dict[str, Any] = {}
        self._loaded_bytes = self._kept = 0
        self._tokens: np.ndarray | None = None
        self.report: dict[str, Any] = {}
        self._saving: saving.Saving | None = None
        if self.save_to:
            saving.check_directory(self.save_to)
        if self.load_from:
            self._open(args)
        self.quant = args.quant = "kvquant3" if args.quant is None else args.quant

    def _open(self, args: argparse.Namespace) -> None:
        if args.prompt is None and args.prompt_file is None:
            raise ValueError("`--load-cache` continues a saved text; give --prompt or --prompt-file with what follows.")
        if args.calibration is not None:
            raise ValueError("`--calibration`: a saved cache has its constants with it; leave it out.")
        facts = saving.read_facts(self.load_from)
        if args.quant not in (None, facts["policy"]):
            raise ValueError(
                f"`--quant {args.quant}`: the cache in {self.load_from} is stored by {facts['policy']}; leave --quant "
                "out, or read the text again."
            )
        if len(facts["lengths"]) != 1:
            raise ValueError(f"`--load-cache {self.load_from}` has {len(facts['lengths'])} rows, and one is continued.")
        args.quant, self.length = facts["policy"], facts["lengths"][0]
        self.form = {"block": facts["block"], "dtype": facts["dtype"]}
        self._loaded_bytes = facts["bytes"]

    def check(self, model: Any) -> None:
        """Raises ValueError where the loaded cache is another model's."""
        if self.load_from:
            saving.read_facts(self.load_from, model)

    def tokenize(self, tokenizer: Any, prompt: str) -> list[int]:
        """A text that goes on begins with no begin-of-text token."""
        return tokenizer(prompt, add_special_tokens=not self.load_from)["input_ids"]

    def policy(self, model: Any) -> kvjax.Policy:
        if self.load_from:
            return saving.load_policy(self.load_from)
        return kvjax.policy(self.quant, model, calibration=self.calibration)

    def load(self, model: Any, policy: kvjax.Policy, capacity: int, **where: Any) -> kvjax.KVCache | None:
        """The cache to go on with; None where nothing is loaded."""
        if not self.load_from:
            return None
        start = time.perf_counter()
        cache, self._tokens = saving.load_cache(self.load_from, model, policy, capacity=capacity, **where)
        jax.block_until_ready(cache)
        self.report["loaded"] = {
            "directory": str(self.load_from),
            "tokens": self.length,
            "bytes": self._loaded_bytes,
            "seconds": time.perf_counter() - start,
        }
        return cache

    def keeper(self, model: Any, ids: np.ndarray) -> Callable[[kvjax.KVCache], None] | None:
        """What to call with the cache when it holds the prompt `ids[1, S]`; None where nothing is saved."""
        if not self.save_to:
            return None

        def keep(cache: kvjax.KVCache) -> None:
            jax.block_until_ready(cache)
            start = time.perf_counter()
            tokens: np.ndarray | None = ids
            if self.length:  # of a cache that was saved without its text nothing is known
                tokens = None if self._tokens is None else np.concatenate([self._tokens, ids], axis=1)
            self._saving = saving.save_cache(cache, self.save_to, tokens=tokens, model=model, wait=False)
            self.waited, self._kept = time.perf_counter() - start, self.length + ids.shape[1]

        return keep

    def __enter__(self) -> "Saved":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the save: what was paid for is kept, also where decoding is interrupted."""
        if self._saving is not None:
            self._saving.wait()
            self.report["saved"] = {
                "directory": str(self.save_to),
                "tokens": self._kept,
                "bytes": self._saving.nbytes,
                "seconds": self._saving.seconds,
                "seconds_waited": self.waited,
            }


def saved_rows(report: dict[str, Any]) -> dict[str, str]:
    """Rows of the table that generate.py shows."""
    rows = {}
    for name in ("loaded", "saved"):
        if part := report.get(name):
            rows[name] = f"{part['tokens']:,} tokens, {part['bytes']:,} bytes on disk, in {part['seconds']:.2f} s"
    if "saved" in rows:
        rows["saved"] += f"; decoding waited for {report['saved']['seconds_waited']:.2f} s of them"
    return rows
