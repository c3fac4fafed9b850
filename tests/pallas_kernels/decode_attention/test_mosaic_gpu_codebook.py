"""Codebook storage on Hopper: byte permutes by themselves, the kernel in the GPU interpreter, what is refused."""

import functools

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from pallas_kernels.decode_attention import mosaic_gpu

if jax.__version_info__ < (0, 11):
    pytest.skip("Pallas Mosaic GPU needs JAX 0.11", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention import gpu_codebook_lookup as codes

# Every storage with slots and without, GQA, MHA and MQA, all head sizes, empty rows and rows that end within a block.
CASES = [
    ("kvquant4", "gqa4-h128", "T+1,full"),
    ("kvquant3", "mqa16-h64", "T-1,T"),
    ("kvquant2", "mqa16-h64", "full,0"),
    ("kvquant3-dense", "mha-h128", "0,1"),
    ("kvquant3", "gqa3-h96", "T-1,T"),
    ("kvquant4", "gqa2-h256", "full,0"),
]


def byte_permute(a, b, select):
    """PTX `prmt` on numpy words, default mode."""
    bytes_ = [(w >> np.uint32(8 * i)) & np.uint32(0xFF) for w in (a, b) for i in range(4)]
    picked = [np.choose((select >> np.uint32(4 * k)) & np.uint32(7), bytes_) for k in range(4)]
    signs = [np.where((select >> np.uint32(4 * k)) & 8, (p >> 7) * np.uint32(0xFF), p) for k, p in enumerate(picked)]
    return sum(s.astype(np.uint32) << np.uint32(8 * k) for k, s in enumerate(signs)).astype(np.uint32)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_byte_permutes_decode_every_field_exactly(bits):
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 2**32, (2, 500), dtype=np.uint32)
    levels = np.sort(rng.uniform(-30, 30, (1, 2**bits)), axis=-1).astype(np.float32)
    table = [np.uint32(t) for t in np.asarray(codes.tables(jnp.asarray(levels)))[0, : codes.REGISTERS[bits]]]
    pairs = codes.decode_pair(*words, table, bits, byte_permute)
    assert len(pairs) == codes.FIELDS[bits] and len(table) == codes.REGISTERS[bits]
    for field, pair in enumerate(pairs):
        for half in (0, 1):
            got = (pair >> np.uint32(16 * half)).astype(np.uint16).view(np.float16)
            code = (words[half] >> np.uint32(bits * field)) & np.uint32(2**bits - 1)
            np.testing.assert_array_equal(got, levels[0, code].astype(np.float16))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_loads_from_tables_decode_every_field_exactly(bits):
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 2**32, (2, 32), dtype=np.uint32)  # a lane each
    levels = np.sort(rng.uniform(-30, 30, (2, 2**bits)), axis=-1).astype(np.float32)
    table = np.asarray(codes.shared_tables(*map(jnp.asarray, levels))).reshape(-1)
    together = codes.TOGETHER[bits]
    count = together // 2
    for which, part in np.ndindex(2, 4):
        own = np.arange(32, dtype=np.uint32) % (32 // count) * (4 * count) + 128 * which
        assert len({*(own // 4 % 32)}) == 32 // count  # no two lanes of a load's phase in one bank

        def load(address):
            return [table[address // 4 + i] for i in range(count)]

        def masked_or(a, mask, b):
            return (a & np.uint32(mask)) | b

        for i, pair in enumerate(
            codes.decode_part(*words, own.astype(np.uint32), bits, part, load, byte_permute, masked_or)
        ):
            for half in (0, 1):
                got = (pair >> np.uint32(16 * half)).astype(np.uint16).view(np.float16)
                code = (words[half] >> np.uint32(bits * (together * part + i))) & np.uint32(2**bits - 1)
                np.testing.assert_array_equal(got, levels[which, code].astype(np.float16))


def run(arguments, splits):
    arguments = dict(arguments)
    kernel = functools.partial(
        mosaic_gpu.decode_attention,
        rotation=arguments.pop("rotation"),
        chip="sm_90",
        interpret=plgpu.InterpretGPUParams(),
        splits=splits,
    )
    return jax.jit(kernel)(**arguments)


@functools.cache
def errors(storage, shape, lengths):
    """Errors of the interpreted kernel and of the plain float16 evaluation."""
    arguments, expected = kernel_cases.case(storage, shape, lengths)
    # Splits of one chunk and of none: those are merged too.
    got = run(arguments, splits=2)
    plain = kernel_cases.low_precision(arguments, jnp.float16)
    return kernel_cases.errors(got, expected), kernel_cases.errors(plain, expected)


@pytest.mark.parametrize(("storage", "shape", "lengths"), CASES)
def test_interpreted_kernel(storage, shape, lengths):
    # The largest error of a few rows scatters; over all cases together it must be below twice the plain one's.
    for ours, theirs in zip(*errors(storage, shape, lengths)):
        assert ours <= 4 * theirs + 1e-5


def test_error_is_about_twice_the_plain_one():
    ours, theirs = np.asarray([errors(*case) for case in CASES]).swapaxes(0, 1)
    # Measured: 1.6 (output) and 2.0 (log-sum). A key's level, its table and two sums are rounded to float16, where the
    # plain evaluation rounds the key; expected of one score are 1.5, but these are maxima over few rows.
    assert (np.sqrt((ours**2).mean(0) / (theirs**2).mean(0)) <= np.asarray([2.0, 2.25])).all()


@pytest.mark.parametrize("stride", [1, 3])
def test_first_tokens_are_hidden(stride):
    arguments, expected = kernel_cases.case("kvquant4-dense", "mqa16-h64", "T+1,full", 100, stride)
    assert max(kernel_cases.errors(run(arguments, splits=1), expected)) < 1e-2


@pytest.mark.parametrize(
    ("keys", "values", "shape", "words"),
    [
        ("kvquant4", "kvquant3", "gqa4-h128", "as many bits"),
        ("kvquant4", "kivi4", "gqa4-h128", "as many bits"),
    ],
)
def test_refusals_say_why(keys, values, shape, words):
    k, v = (kernel_cases.case(x, shape, "0,1")[0][name] for x, name in ((keys, "k"), (values, "v")))
    with pytest.raises(NotImplementedError, match=words):
        mosaic_gpu.check(k, v, 4, "sm_90", True)
