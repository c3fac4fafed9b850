"""Functions compiled by numba as operations of XLA's programs on CPU, shared out over XLA's own threads.

`operation(name, work)` makes of `work(buffers, item)`, compiled code without Python, a call that JAX can trace. XLA
hands over the addresses of operands and results through its foreign-function interface, whose structures
(`xla/ffi/api/c_api.h`, version 0; they only ever grow at their ends) are read here at their offsets, as a C program
would.

Items are dealt out by a counter, so that the thread that XLA calls never waits for one that has not begun: it works
through the items itself, with what helpers of XLA's thread pool happen to be free. A helper that comes late finds the
counter at its end, and whoever leaves last frees what they share.
"""

import ctypes
import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Sums may be taken in any order, and products fused into them; NaN and infinities stay what they are.
_CODE = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
# Of functions that only compiled code calls: what makes them callable from Python takes a quarter of the compile time.
JIT = _CODE | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

TARGET = "kvjax_native"  # the one that XLA knows; kernels are told apart by a number
WORD = ir.IntType(64)

# Offsets in bytes: of XLA_FFI_CallFrame, XLA_FFI_Buffer, XLA_FFI_Scalar, XLA_FFI_Metadata_Extension, XLA_FFI_Metadata,
# XLA_FFI_Api.
FRAME_EXTENSION, FRAME_API, FRAME_CONTEXT = 8, 16, 24
FRAME_OPERANDS, FRAME_RESULTS, FRAME_ATTRIBUTES = 56, 96, 160  # a number and two pointers on: the array of them
BUFFER_DATA, SCALAR_VALUE = 24, 8
EXTENSION_METADATA = 24
METADATA_VERSION, METADATA_TRAITS, METADATA_STATE = 24, 32, 40
API_ERROR, API_SCHEDULE, API_NUM_THREADS = 48, 136, 144
FAILED_PRECONDITION = 9
VERSION = 1 << 32  # 0.1: major in the lower half, minor in the upper

# What threads share: the next item, items done, users, items, the kernel, then an address per operand and result.
NEXT, DONE, USERS, ITEMS, KERNEL, BUFFERS = 0, 8, 16, 24, 32, 40

_kernels = np.zeros((4096, 2), np.int64)  # number and address of each, then zeros; compiled code reads it
_UNKNOWN = ctypes.create_string_buffer(b"the program calls a kernel that this process has not compiled; trace it here")
_alive: list[Any] = []  # compiled code whose addresses are known to XLA or stand there
_lock = threading.Lock()  # programs may be traced in several threads


def _at(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, WORD.as_pointer())


@intrinsic
def load(typing, address):
    """The 64-bit word at an address."""

    def build(context, builder, signature, args):
        return builder.load(_at(builder, args[0]))

    return types.int64(types.int64), build


@intrinsic
def store(typing, address, value):
    """Writes a 64-bit word to an address."""

    def build(context, builder, signature, args):
        builder.store(args[1], _at(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def fetch_add(typing, address, value):
    """Adds to the word at an address, atomically, and returns what was there."""

    def build(context, builder, signature, args):
        return builder.atomic_rmw("add", _at(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), build


def _caller(count: int, returns: bool) -> Any:
    """`call(function, *arguments)` of a C function at an address, on 64-bit words."""
    result = types.int64 if returns else types.void

    def build(context, builder, signature, args):
        kind = ir.FunctionType(WORD if returns else ir.VoidType(), [WORD] * count).as_pointer()
        out = builder.call(builder.inttoptr(args[0], kind), args[1:])
        return out if returns else context.get_dummy_value()

    if count == 1:
        return intrinsic(lambda typing, function, x: (result(types.int64, types.int64), build))
    return intrinsic(lambda typing, function, x, y: (result(types.int64, types.int64, types.int64), build))


call1, call2 = _caller(1, True), _caller(2, False)


def _libc(name: str, returns: bool, count: int) -> Any:
    """A function of the C library on 64-bit words."""
    result = types.int64 if returns else types.void
    kind = ir.FunctionType(WORD if returns else ir.VoidType(), [WORD] * count)

    def build(context, builder, signature, args):
        out = builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)
        return out if returns else context.get_dummy_value()

    if count:
        return intrinsic(lambda typing, x: (result(types.int64), build))
    return intrinsic(lambda typing: (result(), build))


malloc, free, sched_yield = _libc("malloc", True, 1), _libc("free", False, 1), _libc("sched_yield", False, 0)


@intrinsic
def pointer(typing, address, dtype):
    """A pointer to numbers of `dtype` at an address, as `numba.carray` takes it."""
    kind = types.CPointer(dtype.dtype)

    def build(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64, dtype), build


@numba.njit(types.int64(types.int64, types.int64), **JIT)
def address(buffers: int, i: int) -> int:
    """Of operand or result number i, in the order of `operation`."""
    return load(buffers + 8 * i)


@numba.njit(**JIT)
def _drain(state):
    items, kernel = load(state + ITEMS), load(state + KERNEL)
    while True:
        item = fetch_add(state + NEXT, 1)
        if item >= items:
            break
        call2(kernel, state + BUFFERS, item)
        fetch_add(state + DONE, 1)


@numba.njit(**JIT)
def _leave(state):
    if fetch_add(state + USERS, -1) == 1:
        free(state)


@functools.cache
def _register() -> None:
    """Compiles the handler of `TARGET`, and tells XLA."""
    kernels, unknown = _kernels.ctypes.data, ctypes.addressof(_UNKNOWN)

    @numba.cfunc(types.int64(types.int64), error_model="numpy")
    def help(state):
        _drain(state)
        _leave(state)
        return 0

    helper = help.address

    @numba.cfunc(types.int64(types.int64), error_model="numpy")
    def handler(frame):
        extension = load(frame + FRAME_EXTENSION)
        if extension != 0:  # asked once, when the handler is registered
            metadata = load(extension + EXTENSION_METADATA)
            store(metadata + METADATA_VERSION, VERSION)
            store(metadata + METADATA_TRAITS, 0)
            store(metadata + METADATA_STATE, 0)
            return 0
        attributes = load(frame + FRAME_ATTRIBUTES)  # in the order of their names
        items = load(load(load(attributes) + SCALAR_VALUE))
        number = load(load(load(attributes + 8) + SCALAR_VALUE))
        entry = kernels
        while load(entry) != number:
            if load(entry) == 0:
                # XLA_FFI_Error_Create_Args: size, extension, message, code.
                request = malloc(32)
                store(request, 32)
                store(request + 8, 0)
                store(request + 16, unknown)
                store(request + 24, FAILED_PRECONDITION)
                return call1(load(load(frame + FRAME_API) + API_ERROR), request)
            entry += 16
        state = malloc(BUFFERS + 8 * (load(frame + FRAME_OPERANDS) + load(frame + FRAME_RESULTS)))
        place = state + BUFFERS
        for arrays in (FRAME_OPERANDS, FRAME_RESULTS):
            first = load(frame + arrays + 16)
            for i in range(load(frame + arrays)):
                store(place, load(load(first + 8 * i) + BUFFER_DATA))
                place += 8
        # XLA_FFI_ThreadPool_NumThreads_Args and _Schedule_Args: size, extension, context, then an address or two.
        request = malloc(48)
        store(request, 40)
        store(request + 8, 0)
        store(request + 16, load(frame + FRAME_CONTEXT))
        store(request + 24, request + 40)
        store(request + 40, 1)
        api = load(frame + FRAME_API)
        call1(load(api + API_NUM_THREADS), request)
        helpers = min(load(request + 40), items) - 1
        store(request + 24, helper)
        store(request + 32, state)
        store(state + NEXT, 0)
        store(state + DONE, 0)
        store(state + USERS, helpers + 1)
        store(state + ITEMS, items)
        store(state + KERNEL, load(entry + 8))
        for _ in range(helpers):
            call1(load(api + API_SCHEDULE), request)
        free(request)
        _drain(state)
        while fetch_add(state + DONE, 0) < items:  # those that helpers are at
            sched_yield()
        _leave(state)
        return 0

    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    jax.ffi.register_ffi_target(TARGET, capsule(handler.address, None, None), platform="cpu")
    _alive.append((help, handler))


def kernel_number(name: str) -> np.int64:
    """Stands for a kernel in XLA's programs; not 0."""
    return np.int64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))


def operation(name: str, work: Callable[[int, int], None]) -> Callable[..., Sequence[jax.Array]]:
    """Makes `work` an operation of XLA on CPU.

    Args:
      name: of the kernel and all that its code depends on: programs that JAX keeps on disk find it by this.
      work: `work(buffers, item)` for numba; `address(buffers, i)` is where array i starts, operands first, then
        results. The items of a call run in any order and at the same time.

    Returns:
      `f(shapes, items, *operands)`: results of the shapes (jax.ShapeDtypeStruct); `items` is a Python integer.
    """
    number = kernel_number(name)
    with _lock:
        _register()
        compiled = numba.cfunc(types.void(types.int64, types.int64), **_CODE)(work)
        _kernels[np.count_nonzero(_kernels[:, 0])] = number, compiled.address
        _alive.append(compiled)

    def run(shapes: Sequence[jax.ShapeDtypeStruct], items: int, *operands: jax.Array) -> Sequence[jax.Array]:
        return jax.ffi.ffi_call(TARGET, tuple(shapes))(*operands, items=np.int64(items), kernel=number)

    return run
