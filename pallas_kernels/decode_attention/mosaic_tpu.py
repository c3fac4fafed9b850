"""TPU: one Pallas kernel (`tpu_skeleton`) and a decoder per storage, and one that reads planes in part (`tpu_planes`).

Known limits, as seen with the TPU compiler at 1M tokens: the kernel reads codes with channels on lanes. XLA puts the
blocks there where channels would not fill them, and would copy the cache for every call: packed codes of heads of 64
and 96 channels are read where 2 and 4 of them stand side by side, and refused elsewhere. Dense storage of any head size
is read as XLA has it. On v5p metadata that heads share is copied where the number of blocks is no multiple of 16.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import tpu_planes
from pallas_kernels.decode_attention.formats import (
    Affine,
    Codebook,
    Dense,
    Format,
    Partial,
    Planes,
    Rotation,
    describe,
    joined_heads,
    shape_of,
)
from pallas_kernels.decode_attention.heads import padded_group
from pallas_kernels.decode_attention.tpu_affine_keys import KeysPerChannel, KeysPerToken
from pallas_kernels.decode_attention.tpu_affine_values import ValuesPerToken
from pallas_kernels.decode_attention.tpu_codebook import check_codebook, check_codebook_keys
from pallas_kernels.decode_attention.tpu_codebook_keys import CodebookKeys
from pallas_kernels.decode_attention.tpu_codebook_values import CodebookValues
from pallas_kernels.decode_attention.tpu_dense import DenseKeys, DenseValues
from pallas_kernels.decode_attention.tpu_plan import BF16_ARITHMETIC, INT8_PRODUCTS, LANES, SUBLANES, Plan, make_plan
from pallas_kernels.decode_attention.tpu_skeleton import decode
from pallas_kernels.joined import heads_to_join

CHIPS = ("v5e", "v5p", "v6e", "7x")
HEAD_SIZES = (64, 96, 128, 256, 384)  # 384: four of 96 side by side
MOST_QUERIES = 32  # of heads that stand side by side together
SMALLEST_GROUP = 32


def check(k: Format, v: Format, group: int, chip: str, rotates: bool) -> None:
    """Raises NotImplementedError, in words, for what the kernel does not do."""
    *_, tokens, channels = shape_of(k)
    if chip not in ("", *CHIPS):
        raise NotImplementedError(f"the TPU kernel is compiled and checked for {', '.join(CHIPS)}, not for {chip}.")
    if channels not in HEAD_SIZES:
        raise NotImplementedError(f"the TPU kernel takes heads of {HEAD_SIZES} channels, not {channels}.")
    if tokens % LANES:
        raise NotImplementedError(f"the TPU kernel takes blocks of a multiple of {LANES} tokens, not {tokens}.")
    if (joined := joined_heads(k)) > 1:
        group = joined * padded_group(group, joined)
    if group > MOST_QUERIES:
        raise NotImplementedError(f"the TPU kernel takes up to {MOST_QUERIES} queries per kv head, not {group}.")
    if isinstance(k, Planes) or isinstance(v, Planes):
        tpu_planes.check(k, v, rotates)
    for name, x in (("keys", k), ("values", v)):
        if isinstance(x, Affine):
            _check_affine(name, x)
        elif isinstance(x, Codebook):
            check_codebook(x)
            if channels > 256 and x.slots:
                raise NotImplementedError(
                    f"outlier slots name one of 256 channels, and {x.joined} heads side by side have {channels}; use a "
                    "preset without slots, such as kvquant4-dense."
                )
        elif not isinstance(x, (Dense, Planes)):
            raise NotImplementedError(f"the TPU kernel has no decoder for {name} as {describe(x)}.")
        if not isinstance(x, Dense) and channels % LANES:
            heads = heads_to_join(channels)
            kept = (
                f"a cache made for a TPU keeps {heads} of them side by side where {heads} divides a device's kv heads."
            )
            raise NotImplementedError(
                f"heads of {channels} channels do not fill {LANES} lanes, and XLA would copy the cache on every call; "
                + ("those of bit planes are not kept side by side." if isinstance(x, Planes) else kept)
            )
    if isinstance(k, Codebook):
        check_codebook_keys(k, rotates)
    elif rotates:
        raise NotImplementedError(f"the TPU kernel does not rotate keys stored as {describe(k)} before RoPE.")


def _check_affine(name: str, x: Affine) -> None:
    tokens, channels = shape_of(x)[4:]
    if x.bits == 3:
        raise NotImplementedError(f"the TPU kernel has no decoder for affine {name} of 3 bits.")
    if x.along == "tokens":
        if name == "values":
            raise NotImplementedError("the TPU kernel takes affine values with groups along channels, not tokens.")
        size = tokens // x.groups
    else:
        size = channels // x.groups
    heads, rows = x.scale.shape[3:5]
    if rows == 1 and heads % 2 and heads > 1:
        raise NotImplementedError(
            f"{heads} kv heads with one group per block: XLA lays scales of {name} out in an order that the TPU kernel "
            "cannot read without a copy; use smaller groups."
        )
    if size < SMALLEST_GROUP:
        raise NotImplementedError(f"the TPU kernel takes groups of {SMALLEST_GROUP} or more, not {size}, of {name}.")


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
    if isinstance(k, Planes) and isinstance(v, Planes):
        return attend_in_part(q, k, v, layer, first, last, chip=chip, interpret=interpret)[0]
    views = not isinstance(interpret, pltpu.InterpretParams)
    plan = dataclasses.replace(make_plan(k, v, q.shape[2], chip), views=views)
    key_plan, value_plan = (_unrolled(plan, name, x, chip) for name, x in (("keys", k), ("values", v)))
    keys: Any = CodebookKeys(k, key_plan, rotation, first) if isinstance(k, Codebook) else KEYS[type(k)](k, key_plan)
    values = VALUES[type(v)](v, value_plan)
    layer = jnp.clip(layer, 0, shape_of(k)[0] - 1)  # as an array's index is; the kernel does not check it
    return decode(q, keys, values, plan, layer, first, last, interpret)


attend_in_part = tpu_planes.attend_in_part
run = tpu_planes.run


def _unrolled(plan: Plan, name: str, x: Format, chip: str) -> Plan:
    tokens = _overlapped(name, x, chip, plan)
    if isinstance(x, (Affine, Codebook)):  # more registers per token
        fewer = tokens // (plan.rows // SUBLANES * (plan.channels // LANES))
        # Waiting for the matrix units costs more than spills. kivi4 with 16 queries and heads of 256 on v6e takes 112.9
        # bundles with 546 spills, and with half of this 139.0 with 312; heads of 128 on v5e 72.3 with 146, and with
        # half of the keys' 78.5 with 36; with 8 queries on v6e 43.3 with 247, and with half of the values' 46.4 with
        # 20.
        least = 1024 if name == "values" and chip not in INT8_PRODUCTS else 2048
        tokens = max(fewer, min(tokens, least)) if isinstance(x, Affine) else fewer
    runs = 1 << (max(1, tokens // plan.run_tokens).bit_length() - 1)
    return dataclasses.replace(plan, unroll=math.gcd(plan.unroll, runs))


def _overlapped(name: str, x: Format, chip: str, plan: Plan) -> int:
    """Tokens that one iteration overlaps: the scheduler gains by more until registers spill, sooner in values."""
    small = plan.rows == SUBLANES and plan.channels <= LANES
    if isinstance(x, Codebook):
        if not small:
            return 4096
        if chip in BF16_ARITHMETIC:
            return 8192
        # With 4096 kvquant3's keys and kvquant2's values on v5p have 50 and 35 spills, in 0.8 and 2.2 bundles less.
        if x.slots and (name, x.bits) in (("keys", 3), ("values", 2)):
            return 2048
        return 4096 if name == "keys" else 8192
    if isinstance(x, Dense):
        # Of bf16 with 16 queries no spills rather than 48 (v5e), in 34.6 bundles and not 32.1, where memory takes 120.
        return 2048 if x.dtype == "float16" or (name == "values" and plan.rows > SUBLANES) else 4096
    assert isinstance(x, Affine)
    groups = x.groups
    if chip not in INT8_PRODUCTS:
        if name == "keys":
            return 4096
        return 1024 if (groups > 1 and chip in BF16_ARITHMETIC) or x.bits == 8 else 2048
    if name == "keys":
        return 4096 if groups > 2 and (chip in BF16_ARITHMETIC or x.bits == 8) else 8192
    if x.bits == 1:
        return 2048
    # kivi4 on v6e would have 341 spills in 1.3 bundles less, kivi8 on v5p 164 in 1.3 less.
    return 8192 if small and x.bits < 8 and (groups <= 2 or chip not in BF16_ARITHMETIC) else 4096


def affine_keys(fmt: Affine, plan: Plan) -> KeysPerChannel | KeysPerToken:
    return (KeysPerChannel if fmt.along == "tokens" else KeysPerToken)(fmt, plan)


KEYS: dict[type, Any] = {Dense: DenseKeys, Affine: affine_keys}
VALUES: dict[type, Any] = {Dense: DenseValues, Affine: ValuesPerToken, Codebook: CodebookValues}
