"""Functions compiled by numba as operations of XLA: items, threads, results."""

import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numba import carray, int32

from pallas_kernels import native_cpu
from pallas_kernels.native_cpu import address, fetch_add, operation, pointer

SHAPE = jax.ShapeDtypeStruct((1000,), jnp.int32)


def _square(buffers, item):
    x, out = carray(pointer(address(buffers, 0), int32), (1000,)), carray(pointer(address(buffers, 1), int32), (1000,))
    out[item] = x[item] * x[item]


def _meet(buffers, item):
    """Counts itself in, and waits, not for ever, until two are there."""
    out = carray(pointer(address(buffers, 1), int32), (2,))
    fetch_add(address(buffers, 0), 1)
    for _ in range(1 << 30):
        if fetch_add(address(buffers, 0), 0) >= 2:
            break
    out[item] = fetch_add(address(buffers, 0), 0)


@pytest.fixture(scope="module")
def squares():
    """50 times the square modulo 1009, in a compiled loop."""
    square = operation("test: square", _square)
    return jax.jit(lambda x: jax.lax.fori_loop(0, 50, lambda i, x: square([SHAPE], 1000, x)[0] % 1009, x))


def _expected(x):
    return [pow(int(n), 2**50, 1009) for n in x]


def test_every_item_runs_once(squares):
    x = np.arange(1000, dtype=np.int32)
    np.testing.assert_array_equal(squares(x), _expected(x))


def test_calls_from_several_threads(squares):
    inputs = [np.arange(n, n + 1000, dtype=np.int32) for n in (0, 1, 2, 3)]
    results = [None] * len(inputs)

    def run(i):
        results[i] = [np.asarray(squares(inputs[i])) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, found in zip(inputs, results):
        for result in found:
            np.testing.assert_array_equal(result, _expected(x))


@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two cores")
def test_items_run_at_the_same_time():
    meet = operation("test: meet", _meet)
    two = jax.ShapeDtypeStruct((2,), jnp.int32)
    (found,) = jax.jit(lambda x: meet([two], 2, x))(np.zeros(2, np.int32))
    assert found.tolist() == [2, 2]


def test_a_kernel_that_was_not_compiled_is_an_error(squares):
    call = jax.ffi.ffi_call(native_cpu.TARGET, (SHAPE,))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel that this process has not compiled"):
        jax.jit(lambda x: call(x, items=np.int64(1), kernel=native_cpu.kernel_number("test: none")))(jnp.arange(1000))


def test_many_devices_call_one_kernel(squares):
    x = jnp.arange(1000, dtype=jnp.int32)
    for device in jax.devices()[:2]:
        np.testing.assert_array_equal(squares(jax.device_put(x, device)), _expected(np.arange(1000)))
