"""Sampling against probabilities worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.sampling import Sampler, sample

P = np.array([0.5, 0.25, 0.15, 0.1], np.float32)
LOGITS = jnp.log(jnp.tile(P[None], (2000, 1)))


def shares(**kwargs):
    drawn = np.asarray(sample(Sampler(**kwargs), LOGITS, jax.random.key(0)))
    return np.bincount(drawn, minlength=4) / len(drawn)


@pytest.mark.parametrize(
    ("kwargs", "wanted"),
    [
        ({}, [1, 0, 0, 0]),
        ({"temperature": 1.0}, P),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"temperature": 1.0, "top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.5}, [1, 0, 0, 0]),  # the first token alone reaches 0.5
        ({"temperature": 1.0, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.8}, np.array([0.5, 0.25, 0.15, 0]) / 0.9),
    ],
)
def test_shares(kwargs, wanted):
    np.testing.assert_allclose(shares(**kwargs), wanted, atol=0.04)
    assert (shares(**kwargs)[np.asarray(wanted) == 0] == 0).all()


@pytest.mark.parametrize("kwargs", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_settings_name_themselves(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        Sampler(**kwargs)
