"""TPU: one Pallas kernel (`tpu_skeleton`) and a decoder per storage."""

from typing import Any

import jax

from pallas_kernels.decode_attention.formats import Affine, Dense, Format, Partial, Rotation
from pallas_kernels.decode_attention.tpu_affine_keys import KeysPerChannel, KeysPerToken
from pallas_kernels.decode_attention.tpu_affine_values import ValuesPerToken
from pallas_kernels.decode_attention.tpu_dense import DenseKeys, DenseValues
from pallas_kernels.decode_attention.tpu_plan import Plan, make_plan
from pallas_kernels.decode_attention.tpu_skeleton import KeyDecoder, ValueDecoder, decode


def check(k: Format, v: Format, group: int, chip: str, rotates: bool) -> None:
    """Raises NotImplementedError, in words, for what the kernel does not do."""
    if rotates:
        raise NotImplementedError("the TPU kernel rotates codebook keys only.")
    plan = make_plan(k, v, group, chip)
    _decoders(k, v, plan)


def decode_attention(
    q: jax.Array,
    k: Format,
    v: Format,
    layer: jax.Array,
    first: jax.Array,
    last: jax.Array,
    rotation: Rotation | None,
    *,
    chip: str = "",
    interpret: Any = False,
) -> Partial:
    """As `api.decode_attention`."""
    plan = make_plan(k, v, q.shape[2], chip)
    keys, values = _decoders(k, v, plan)
    return decode(q, keys, values, plan, layer, first, last, interpret)


def _decoders(k: Format, v: Format, plan: Plan) -> tuple[KeyDecoder, ValueDecoder]:
    """The decoders of both storages, or NotImplementedError."""
    return KEYS[type(k)](k, plan), VALUES[type(v)](v, plan)


def affine_keys(fmt: Affine, plan: Plan) -> KeyDecoder:
    return (KeysPerChannel if fmt.along == "tokens" else KeysPerToken)(fmt, plan)


KEYS: dict[type, Any] = {Dense: DenseKeys, Affine: affine_keys}
VALUES: dict[type, Any] = {Dense: DenseValues, Affine: ValuesPerToken}
