"""The small model and text of the evaluation's tests."""

import pytest
from cases import small_model, small_windows


@pytest.fixture(scope="session")
def model():
    return small_model()


@pytest.fixture(scope="session")
def windows():
    return small_windows()
