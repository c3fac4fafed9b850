"""The real compilers of chips that are not there (`pallas_kernels.deviceless`); skips where they are not installed."""

import pytest

from pallas_kernels import deviceless


@pytest.fixture
def on():
    """`on(chip)`: what to compile for, or a skip that says which compiler is missing."""

    def target(chip: str) -> deviceless.Target:
        try:
            return deviceless.target(chip)
        except NotImplementedError as reason:
            pytest.skip(str(reason))

    return target
