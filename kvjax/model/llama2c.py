"""Converts checkpoints and tokenizers of llama2.c (its legacy format, version 0) to the Hugging Face layout.

The format is a header of seven int32, then float32 weights in a fixed order, matrices as `[outputs, inputs]`.
Its rotary embedding turns *neighbouring* channels (2i, 2i + 1); ours and transformers' turns (i, i + H/2). Reordering
the rows of the q and k projections within each head makes the two models the same function.
"""

import json
import struct
from pathlib import Path

import numpy as np

from kvjax.model.config import ModelConfig
from kvjax.model.llama import LoadedModel
from kvjax.model.rope import make_rope
from kvjax.model.weights import save, stack_weights, tensor_shapes

_HEADER = struct.Struct("<7i")
_LATER_VERSIONS = 0x616B3432  # "ak42", the magic number of formats 1 and 2
_SPACE = "▁"  # sentencepiece's visible space


def convert(checkpoint, tokenizer, directory) -> Path:
    """Writes config.json, model.safetensors (float32), tokenizer.json and tokenizer_config.json.

    Args:
      checkpoint: a llama2.c `.bin` model.
      tokenizer: its llama2.c `tokenizer.bin`.
      directory: made if missing.

    Returns:
      The directory, for `kvjax.load` or transformers.

    Raises:
      ValueError, FileNotFoundError: one line naming the file.
    """
    model = read_model(checkpoint)
    bpe = read_tokenizer(tokenizer, model.config.vocab)
    directory = save(model, directory)
    bpe.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return directory


def read_model(path) -> LoadedModel:
    """A llama2.c checkpoint as a float32 model."""
    content = _content(path)
    if len(content) < _HEADER.size:
        raise ValueError(f"{path} has {len(content)} bytes, too few for a llama2.c checkpoint; fetch it again.")
    width, mlp_width, layers, q_heads, kv_heads, vocab, positions = _HEADER.unpack_from(content)
    if width == _LATER_VERSIONS:
        raise ValueError(f"{path} is a llama2.c checkpoint of a later version; export it with `--version 0`.")
    try:
        config = ModelConfig(
            layers=layers,
            width=width,
            mlp_width=mlp_width,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=width // max(q_heads, 1),
            vocab=abs(vocab),
            norm_eps=1e-5,
            tie_embeddings=vocab > 0,  # the sign says it
            max_positions=positions,
            bos_id=1,
            eos_ids=(2,),
        )
    except ValueError as error:
        raise ValueError(f"{path} is no llama2.c checkpoint of version 0: {error}") from None
    tensors = _split(path, content, config)
    rope = make_rope(config.head_dim, config.max_positions, rope_type="default", rope_theta=10000.0)
    return LoadedModel(stack_weights(config, tensors.__getitem__, np.float32), rope, config)


def _split(path, content: bytes, config: ModelConfig) -> dict[str, np.ndarray]:
    """Checkpoint name to tensor: cuts the weights out in the order of llama2.c's `memory_map_weights`."""
    shapes = tensor_shapes(config)
    prefix = "model.layers.{}."
    order: list[str | None] = ["model.embed_tokens.weight", prefix + "input_layernorm.weight"]
    order += [prefix + f"self_attn.{name}_proj.weight" for name in "qkvo"]
    order += [prefix + "post_attention_layernorm.weight"]
    order += [prefix + f"mlp.{name}_proj.weight" for name in ("gate", "down", "up")]  # w1, w2, w3
    order += ["model.norm.weight", None]  # None: the tables of cosines and sines
    order += [] if config.tie_embeddings else ["lm_head.weight"]

    weights = np.frombuffer(content, np.float32, offset=_HEADER.size)
    tensors, start = {}, 0
    for pattern in order:
        if pattern is None:
            start += config.max_positions * config.head_dim
            continue
        for layer in range(config.layers) if "{}" in pattern else (0,):
            name = pattern.format(layer)
            count = int(np.prod(shapes[name]))
            if start + count > weights.size:
                raise ValueError(f"{path} ends within {name}; fetch it again.")
            tensors[name] = weights[start : start + count].reshape(shapes[name])
            start += count
    if start != weights.size:
        raise ValueError(f"{path} has {weights.size} weights, but its header implies {start}; is it of version 0?")
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] = pairs_to_halves(tensors[name], config.head_dim)
    return tensors


def pairs_to_halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows of `[heads * H, D]` within each head: 0, 2, 4, ..., 1, 3, 5, ..."""
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def read_tokenizer(path, vocab: int):
    """A llama2.c tokenizer.bin as a `tokenizers.Tokenizer` that adds `<s>` in front.

    sentencepiece's BPE joins the neighbours whose union has the best score, whichever they are: every split of a piece
    into two pieces becomes a merge, in the order of the union's score.

    Args:
      path: the file: the longest piece's length, then score (float32), length (int32) and bytes of each piece.
      vocab: how many pieces the model knows.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    pieces, scores = _pieces(path, vocab)
    ids = {piece: i for i, piece in enumerate(pieces)}
    learned = sorted(range(3 + 256, vocab), key=lambda i: -scores[i])
    merges = [
        (pieces[i][:cut], pieces[i][cut:])
        for i in learned
        for cut in range(1, len(pieces[i]))
        if pieces[i][:cut] in ids and pieces[i][cut:] in ids
    ]
    bpe = Tokenizer(BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", ids["<s>"])]
    )
    bpe.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return bpe


def _pieces(path, vocab: int) -> tuple[list[str], list[float]]:
    content, start = _content(path), 4
    pieces: list[str] = []
    scores: list[float] = []
    while len(pieces) < vocab and start + 8 <= len(content):
        score, length = struct.unpack_from("<fi", content, start)
        pieces.append(content[start + 8 : start + 8 + length].decode("utf-8", "replace").replace(" ", _SPACE))
        scores.append(score)
        start += 8 + length
    if len(pieces) < vocab or start != len(content):
        raise ValueError(
            f"{path} is no llama2.c tokenizer of {vocab} pieces, as the model has; fetch the matching one."
        )
    pieces[:3] = ["<unk>", "<s>", "</s>"]  # llama2.c stores them with line breaks around
    return pieces, scores


def _content(path) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; pass the path of a llama2.c file.")
    return Path(path).read_bytes()
