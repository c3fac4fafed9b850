"""Calibration tokens: random windows of a text file, or text that the model writes itself."""

import hashlib
from pathlib import Path

import numpy as np

from kvjax import decode
from kvjax.model.llama import LoadedModel
from kvjax.policy import bind, preset


def tokens_from_file(model: LoadedModel, path, samples: int, length: int, seed: int = 0) -> tuple[np.ndarray, str]:
    """`samples` random windows of `length` tokens of a text.

    The text is tokenised once, as a whole; a window starts at any token, without a BOS of its own, as in the released
    KVQuant code (arXiv 2401.18079, Section 4: 16 windows of 2048 tokens). Windows may overlap.

    Returns:
      tokens `[samples, length]` int32, and the text's name and sha256 for the calibration file.

    Raises:
      OSError, ValueError: one line, for a file that is not there, not UTF-8 text, empty or too short.
    """
    from kvjax.evaluate.text import tokenize  # the package around it imports calibration

    text = tokenize(model, path)
    if len(text.tokens) < length:
        raise ValueError(
            f"`text={str(path)!r}` has {len(text.tokens)} tokens, but a sample takes {length}; "
            "pass a longer text or shorter samples."
        )
    starts = np.random.default_rng(seed).integers(0, len(text.tokens) - length + 1, samples)
    windows = np.stack([text.tokens[start : start + length] for start in starts])
    digest = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    return windows, f"{text.name} sha256:{digest}"


def self_sampled_tokens(
    model: LoadedModel, samples: int, length: int, seed: int = 0, *, batch: int = 16, progress: bool = True
) -> tuple[np.ndarray, str]:
    """Text that the model writes at temperature 1, for calibration without data.

    A sample starts with BOS, or with a random token where the model has none, and goes on behind an end of text.

    Returns:
      as `tokens_from_file`.
    """
    from kvjax.evaluate.progress import bar

    config = model.config
    rng = np.random.default_rng(seed)
    first = (
        rng.integers(0, config.vocab, (samples, 1)) if config.bos_id is None else np.full((samples, 1), config.bos_id)
    )
    policy = bind("bf16", preset("bf16"), config.layers)
    written = []
    with bar(progress, "tokens") as shown_bar:
        task = shown_bar.add_task("writing text", total=samples * (length - 1))
        for start in range(0, samples, batch):
            rows = first[start : start + batch].astype(np.int32)
            if length == 1:
                written.append(rows)
                continue
            cache = decode.init_cache(model, policy, batch=len(rows), capacity=length)
            new, _ = decode.generate(
                model,
                cache,
                rows,
                max_new_tokens=length - 1,
                temperature=1.0,
                seed=seed + start,
                eos=(),
                on_token=lambda tokens: shown_bar.advance(task, len(tokens)),
            )
            written.append(np.concatenate([rows, new], axis=1))
    return np.concatenate(written).astype(np.int32), f"self-sampled, seed {seed}"
