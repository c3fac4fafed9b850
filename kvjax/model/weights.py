"""Models from and to disk: Hugging Face layout, safetensors, no torch."""

import json
import re
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from kvjax import sharding
from kvjax.model.checkpoint import DTYPES, Checkpoint
from kvjax.model.config import ModelConfig, complete, read_config
from kvjax.model.fingerprint import checkpoint_tensors, fingerprint, sample
from kvjax.model.llama import WEIGHTS, LoadedModel, WeightSpec, weight_shapes
from kvjax.model.rope import Rope, rope_from_config

ASSETS = Path(__file__).parent.parent / "assets"
# Old checkpoints carry the rotary frequencies; they follow from the config.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

Place = Callable[[str, np.ndarray], jax.Array]


def load(source, dtype=None, place: Place | None = None, mesh: Mesh | None = None) -> LoadedModel:
    """Loads a Llama or Mistral model.

    Tensors go one by one from the memory-mapped file into their `[L, ...]` stack and the stack to its device, so the
    host never holds a second copy of the model: a stack or two at most.

    Args:
      source: "tiny" (ships with the library), a directory in Hugging Face layout, or a hub id such as
        "meta-llama/Llama-3.2-1B" (downloaded through huggingface_hub, or taken from its cache).
      dtype: of weights and activations: float32, bfloat16 or float16. None: the checkpoint's dtype on GPU and
        TPU, float32 on CPU, where bfloat16 matrix products are slow.
      place: weight name and host array to device array; None: as `mesh` says.
      mesh: devices to spread the weights over (`kvjax.sharding`), for a model larger than one; None: the default
        device. Of many processes each reads all weights and keeps its own parts.

    Raises:
      ValueError, FileNotFoundError: one line naming the file and tensor, or the setting without support.
    """
    directory = find(source)
    raw = read_config(directory)
    try:
        fields = complete(raw)
        config, rope = ModelConfig.from_transformers(fields), rope_from_config(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from None
    if mesh is not None and place is None:
        place = _spread(config, mesh)
    with Checkpoint(directory) as checkpoint:
        _check_tensors(checkpoint, config, directory)
        if dtype is None:
            on_cpu = jax.default_backend() == "cpu"
            dtype = np.float32 if on_cpu else checkpoint.dtypes[WEIGHTS["embedding"].tensor]
        samples: dict[str, str] = {}

        def read(name):
            tensor = checkpoint.read(name)
            samples[name] = sample(tensor)
            return tensor

        state = stack_weights(config, read, dtype, place)
    named = fingerprint(config, rope, samples)
    rope = jax.device_put(rope) if mesh is None else sharding.place(rope, NamedSharding(mesh, PartitionSpec()))
    return LoadedModel(state, rope, config, str(directory), named)


def _spread(config: ModelConfig, mesh: Mesh) -> Place:
    shardings = sharding.model_shardings(config, mesh)
    return lambda name, array: jax.block_until_ready(sharding.place(array, shardings[name]))


def stack_weights(
    config: ModelConfig, read: Callable[[str], np.ndarray], dtype, place: Place | None = None
) -> dict[str, jax.Array]:
    """Builds a model's state from checkpoint tensors.

    Args:
      config: says which weights there are.
      read: checkpoint name to tensor, `[outputs, inputs]` or `[outputs]`.
      dtype: of the result.
      place: as for `load`.
    """
    dtype = check_dtype(dtype)
    # Waiting for each copy: it keeps the host's stack alive, and the next one is about to be built.
    place = place or (lambda name, array: jax.block_until_ready(jnp.asarray(array)))

    def gather(spec: WeightSpec, shape: tuple[int, ...]) -> np.ndarray:
        if not spec.stacked:
            return read(spec.tensor).reshape(shape).astype(dtype)
        stack = np.empty(shape, dtype)
        for layer in range(config.layers):
            stack[layer] = read(spec.tensor.format(layer)).reshape(shape[1:])
        return stack

    # No name holds on to a stack: the host forgets each one before it builds the next.
    return {name: place(name, gather(WEIGHTS[name], shape)) for name, shape in weight_shapes(config).items()}


def init_random(config: ModelConfig, rope: Rope, seed: int, dtype=jnp.float32) -> LoadedModel:
    """A model with random weights: normal(0, initializer_range) matrices, zero biases, unit norms.

    Drawn by numpy, so that a seed means the same weights on every backend and version of JAX, and nothing compiles.
    Every tensor has a stream of its own: those that two configs share are equal, and threads draw them side by side.
    """
    dtype = check_dtype(dtype)

    def draw(name: str, shape: tuple[int, ...], layer: int) -> np.ndarray:
        if name.endswith("_bias") or name.endswith("norm"):
            return np.full(shape, name.endswith("norm"), dtype)
        rng = np.random.default_rng([seed, layer, zlib.crc32(name.encode())])
        return (rng.standard_normal(shape, np.float32) * np.float32(config.initializer_range)).astype(dtype)

    state = {}
    with ThreadPoolExecutor() as pool:
        for name, shape in weight_shapes(config).items():
            if WEIGHTS[name].stacked:
                stack = np.empty(shape, dtype)
                for layer, drawn in enumerate(pool.map(partial(draw, name, shape[1:]), range(config.layers))):
                    stack[layer] = drawn
            else:
                stack = draw(name, shape, 0)
            state[name] = jnp.asarray(stack)
    return LoadedModel(state, jax.device_put(rope), config)


def save(model: LoadedModel, directory, dtype=None) -> Path:
    """Writes config.json and model.safetensors as transformers reads them; the tokenizer is not copied.

    Args:
      model: the model.
      directory: made if missing; files of the same names in it are replaced.
      dtype: of the file; None: the model's own.

    Returns:
      The directory.
    """
    dtype = model.dtype if dtype is None else check_dtype(dtype)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    raw = model.config.to_transformers(model.rope, np.dtype(dtype).name)
    (directory / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {name: np.ascontiguousarray(value.astype(dtype)) for name, value in checkpoint_tensors(model)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    # safetensors writes a private temporary file; the model shall be as readable as its config.
    shutil.copymode(directory / "config.json", directory / "model.safetensors")
    return directory


def check_dtype(dtype) -> np.dtype:
    """float32, bfloat16 or float16 under any of their usual names; ValueError for others."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in DTYPES.values():
        raise ValueError(f"`dtype={dtype!r}` is not supported; use float32, bfloat16 or float16.")
    return found


def _check_tensors(checkpoint: Checkpoint, config: ModelConfig, directory: Path):
    """Every tensor there, none too many, all of the shape that the config implies."""
    expected = tensor_shapes(config)
    for name, shape in expected.items():
        if name not in checkpoint:
            raise ValueError(f"{directory} has no tensor {name}, which its config.json asks for; download it again.")
        if checkpoint.shapes[name] != shape:
            raise ValueError(
                f"{checkpoint.path(name)}: {name} has shape {checkpoint.shapes[name]}; config.json implies {shape}."
            )
    for name in checkpoint:
        if name not in expected and not _IGNORED.fullmatch(name) and not _is_tied_head(checkpoint, name, config):
            raise ValueError(
                f"{checkpoint.path(name)}: tensor {name} is not part of the model that config.json describes."
            )


def _is_tied_head(checkpoint: Checkpoint, name: str, config: ModelConfig) -> bool:
    """Whether this is the redundant copy of a tied embedding (one that differs is an error of the config)."""
    if name != WEIGHTS["head"].tensor or not config.tie_embeddings:
        return False
    embedding = checkpoint.read(WEIGHTS["embedding"].tensor)
    if not np.array_equal(checkpoint.read(name), embedding):
        raise ValueError(
            f"{checkpoint.path(name)}: {name} differs from the embedding although config.json ties them; "
            f"set `tie_word_embeddings` to false there."
        )
    return True


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Checkpoint name to shape of every tensor that the config asks for."""
    expected = {}
    for name, shape in weight_shapes(config).items():
        spec = WEIGHTS[name]
        for layer in range(config.layers) if spec.stacked else (0,):
            expected[spec.tensor.format(layer)] = _checkpoint_shape(spec, shape[spec.stacked :])
    return expected


def _checkpoint_shape(spec: WeightSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    rows = int(np.prod(shape[: spec.outputs]))
    return (rows, int(np.prod(shape[spec.outputs :]))) if len(shape) > spec.outputs else (rows,)


def find(source, weights: bool = True) -> Path:
    """The directory of a model's files; downloads them for a hub id, the tensors only where `weights` are wanted."""
    if source == "tiny":
        if not (ASSETS / "tiny" / "config.json").is_file():
            raise FileNotFoundError(f"`source='tiny'`: {ASSETS / 'tiny'} is not installed; reinstall kvjax.")
        return ASSETS / "tiny"
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"`source={str(source)!r}` is a file; pass the directory that holds it.")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"`source={str(source)!r}` is no directory; pass one in Hugging Face layout, a hub id "
            f"(organisation/name) or 'tiny'."
        )
    return _download(source, weights)


def _download(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download  # imported here: it is slow, and most loads are local

    try:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=["*.safetensors"] * weights + ["*.json", "tokenizer*", "*.model"],
                ignore_patterns=[
                    "consolidated*",
                    "original/*",
                ],  # the same weights in the vendors' own layout
            )
        )
    except Exception as error:  # network, authorisation and unknown names each have their own types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise FileNotFoundError(
            f"`source={hub_id!r}` is no directory and huggingface_hub cannot fetch it ({reason}); check the name "
            f"and the network, run `hf auth login` for a gated model, or pass a local directory."
        ) from None
