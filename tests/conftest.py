"""Settings of the test session; every test file is written against them.

* No silent promotion: mixing dtypes or ranks in an operation raises.
* Eight CPU devices, so that sharded code is tested in the same process as the code it must equal. Code that
  asks for no device runs on the first.
* Hypothesis draws the same few examples in every run: each shape drawn is a compilation.
"""

import importlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

# Under pytest-xdist one worker is one thread of torch and of the tokenizers, else their pools fight for the
# cores. XLA's own pool is at least as large as the number of devices; its idle threads sleep.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network

# Most of the suite's time is XLA compiling small programs once: compile fast, not for speed. The older emitters of
# JAX below 0.11 compile twice as fast; later ones do not know the flag.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * version("jax").startswith("0.10."),
)

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile(
    "kvjax",
    derandomize=True,
    max_examples=10,
    deadline=None,  # the first example of a shape pays for its compilation
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kvjax")


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Forgets compiled programs before a process has Linux's 65,530 memory maps, beyond which XLA aborts it.

    A program over eight devices takes thousands, and a worker of two runs half of the suite.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def load_script(monkeypatch):
    """`load_script("plan")`: scripts/plan.py as a module, made anew, so that no test sees what another set in it."""

    def load(name):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load
