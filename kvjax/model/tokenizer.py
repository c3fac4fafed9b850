"""The tokenizer of a checkpoint, through transformers (imported at the first use only)."""

import functools
import os
from pathlib import Path

from kvjax.model.config import ModelConfig


@functools.lru_cache(maxsize=8)
def load_tokenizer(path: str | None, config: ModelConfig):
    """A transformers tokenizer from a model's directory.

    A directory that has only tokenizer.json gets that tokenizer as it is, with bos and eos from the config.

    Raises:
      ValueError, FileNotFoundError: one line, if there is no directory or no usable tokenizer in it.
    """
    if path is None:
        raise ValueError("this model was built in memory and has no tokenizer; load one from a directory that has.")
    # transformers advises to install torch, which is not needed for a tokenizer.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    directory = Path(path)
    whole = directory / "tokenizer.json"
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise FileNotFoundError(
            f"{directory} has no tokenizer.json or tokenizer.model; copy the model's tokenizer there."
        )
    try:
        if whole.is_file() and not (directory / "tokenizer_config.json").is_file():
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(whole))
            names = {"bos_token": config.bos_id, "eos_token": config.eos_ids[0] if config.eos_ids else None}
            for name, token_id in names.items():
                if token_id is not None:
                    setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
            return tokenizer
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # tokenizers and transformers raise many types for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{directory} has a tokenizer that transformers cannot read ({reason}).") from None
