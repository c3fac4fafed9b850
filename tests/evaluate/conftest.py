"""A small random model whose predictions are not flat, text for it, and scripts/evaluate.py as a module."""

import importlib.util
import sys
from pathlib import Path

import pytest
from cases import small_model, small_windows

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="session")
def model():
    return small_model()


@pytest.fixture(scope="session")
def windows():
    return small_windows()


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))  # for its `_cli` and `_compare`
    spec = importlib.util.spec_from_file_location("evaluate_script", SCRIPTS / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPTS))
