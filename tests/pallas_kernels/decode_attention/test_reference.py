"""The plain reference against float64, and by hand."""

import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from pallas_kernels.decode_attention import api, specs
from pallas_kernels.decode_attention.formats import Dense


@pytest.mark.parametrize("storage", [*specs.STORAGES, *specs.PLANES])
def test_reference_equals_float64(storage):
    arguments, expected = kernel_cases.case(storage, "gqa4-h128", "T+1,full")
    error, log_error = kernel_cases.errors(api.decode_attention(**arguments), expected)
    assert error < 1e-4 and log_error < 1e-4  # angles are float32


@pytest.mark.parametrize("lengths", specs.LENGTHS)
@pytest.mark.parametrize("first", [0, 100])
def test_reference_sees_only_its_tokens(lengths, first):
    arguments, expected = kernel_cases.case("kivi2", "gqa3-h96", lengths, first)
    error, log_error = kernel_cases.errors(api.decode_attention(**arguments), expected)
    assert error < 2e-5 and log_error < 2e-5


def test_reference_of_every_third_block():
    arguments, expected = kernel_cases.case("kvquant3", "gqa4-h128", "T+1,full", 100, stride=3)
    assert max(kernel_cases.errors(api.decode_attention(**arguments), expected)) < 1e-4


def test_two_tokens_by_hand():
    # Scores 0 and ln 3: weights 1/4 and 3/4 of values 4 and 8, so 7; unnormalised by the larger: (4/3 + 8), 4/3.
    x = np.zeros((1, 1, 1, 1, 32, 2), np.float32)
    x[..., 1, 0] = 1.0
    keys = Dense((x.astype(np.float16)).view(np.uint16), "float16")
    x[..., 0, 0], x[..., 1, 0] = 4.0, 8.0
    values = Dense((x.astype(np.float16)).view(np.uint16), "float16")
    q = jnp.asarray([[[[np.log(3.0), 5.0]]]], jnp.float32)
    one = jnp.asarray([2], jnp.int32)
    acc, top, total = api.decode_attention(q, keys, values, layer=jnp.int32(0), first=one * 0, last=one)
    np.testing.assert_allclose(acc[0, 0, 0], [4 / 3 + 8, 0], rtol=1e-6)
    np.testing.assert_allclose([top[0, 0, 0], total[0, 0, 0]], [np.log(3), 4 / 3], rtol=1e-6)


def test_storages_that_disagree_are_refused():
    arguments, _ = kernel_cases.case("bf16", "gqa4-h128", "0,1")
    other, _ = kernel_cases.case("bf16", "mha-h128", "0,1")
    with pytest.raises(ValueError, match=r"`v` is storage of \(1, 2, 3, 3, 128, 128\)"):
        api.decode_attention(**{**arguments, "v": other["v"]})
