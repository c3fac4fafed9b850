"""The PTX of the Hopper kernels, run in numpy by the PTX ISA, against float64: what no interpreter of Pallas runs.

Descriptors, fragments, byte permutes, swizzles, barriers and copies are the compiled ones. Not in it: how a device
times things, and whether it does what the ISA says.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from pallas_kernels import deviceless
from pallas_kernels.decode_attention import mosaic_gpu, reference

if jax.__version_info__ < (0, 11):
    pytest.skip("Pallas Mosaic GPU needs JAX 0.11", allow_module_level=True)

import ptx
import ptx_shared
from jax.experimental.mosaic.gpu import launch_context
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels.decode_attention import gpu_answers, gpu_codebook_tiles, gpu_tiles, gpu_words

# What Mosaic makes of tensor maps is not public: another version of JAX may have it elsewhere.
if not all(hasattr(launch_context.LaunchContext, name) for name in ("_get_tma_desc", "_alloc_scratch")):
    pytest.skip(f"JAX {jax.__version__} makes tensor maps in another place", allow_module_level=True)

# Every storage, all head sizes, few and many queries, empty rows and splits, a late first token.
CASES = [
    ("bf16", "gqa4-h128", "T+1,full", 100),
    ("f16", "gqa2-h256", "0,1", 0),
    ("int8", "mha-h128", "T-1,T", 0),
    ("int4", "gqa4-h128", "T+1,full", 100),
    ("kivi8", "gqa3-h96", "full,0", 0),
    ("kivi4", "mqa16-h64", "full,0", 100),
    ("kivi4-g128", "gqa4-h128-t256", "T+1,full", 0),
    ("kivi2", "gqa4-h128", "T+1,full", 0),
    ("kivi2-g64", "gqa2-h256", "T-1,T", 0),
    ("kivi1", "mqa16-h128", "full,0", 100),
    ("asymkv-k2v1", "mqa16-h64", "T+1,full", 0),
    ("kvquant4", "gqa4-h128", "T+1,full", 0),
    ("kvquant3", "gqa3-h96", "T-1,T", 0),
    ("kvquant2", "mqa16-h64", "full,0", 100),
    ("kvquant4-dense", "gqa2-h256", "full,0", 0),
    ("kvquant3-dense", "mha-h128", "0,1", 0),
    ("kvquant2-dense", "gqa4-h128-t256", "T+1,full", 0),
    ("alignedkv", "gqa4-h128", "T+1,full", 100),
    ("alignedkv", "gqa3-h96", "T-1,T", 0),
    ("alignedkv", "mqa16-h128", "full,0", 0),
]


@pytest.fixture
def copied(monkeypatch):
    """Of each tensor map of the kernels lowered: the number of the kernel's array, sizes, strides, box and swizzle."""
    found = []
    get, alloc = launch_context.LaunchContext._get_tma_desc, launch_context.LaunchContext._alloc_scratch
    metadata = launch_context.memref.extract_strided_metadata

    def described(self, array, transforms, peer, box, swizzle, *rest, **named):
        known = len(self.tma_descriptors)
        descriptor = get(self, array, transforms, peer, box, swizzle, *rest, **named)
        if len(self.tma_descriptors) > known:
            owner = launch_context._find_kernel_argument_for_gmem_ref(array).owner
            number = owner.attributes["mosaic_gpu.from_kernel_arg_idx"].value
            found.append({"array": number, "box": list(box), "swizzle": int(swizzle or 16)})
        return descriptor

    def allocated(self, *args, host_init, **named):
        number = len(found)

        def init(pointer):
            seen = []

            def extract(ref):
                seen.append(ir.MemRefType(ref.type))
                return metadata(ref)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(launch_context.memref, "extract_strided_metadata", extract)
                host_init(pointer)
            found[number] |= {"sizes": list(seen[-1].shape), "strides": seen[-1].get_strides_and_offset()[0]}

        return alloc(self, *args, host_init=init, **named)

    monkeypatch.setattr(launch_context.LaunchContext, "_get_tma_desc", described)
    monkeypatch.setattr(launch_context.LaunchContext, "_alloc_scratch", allocated)
    return found


def run(kernel, arguments, target, copied, monkeypatch):
    """`kernel(**arguments)`, compiled for the target and run here, and what was found to break rules."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    printed, listed = [], deviceless._gpu_kernels
    monkeypatch.setattr(deviceless, "_gpu_kernels", lambda text: printed.append(text) or listed(text))
    leaves, tree = jax.tree.flatten(arguments)
    deviceless.compile(lambda *x: kernel(**jax.tree.unflatten(tree, x)), tuple(leaves), target)
    program, findings = ptx.Program(printed[-1]), set()

    def emulated(body, *, out_type, grid, **_):
        def call(*arrays):
            whole = [np.array(x).reshape(-1).view(np.uint8) for x in arrays]
            outs = [np.full(x.size * x.dtype.itemsize, 0xFF, np.uint8) for x in out_type]
            maps = []
            for found in copied:
                i = found["array"]
                layout = (found[name] for name in ("sizes", "strides", "box", "swizzle"))
                maps.append(ptx_shared.TensorMap(whole[i], arrays[i].dtype.itemsize, *layout))
            # Those that are not copied are parameters, in the order in which the body first uses them.
            layer, first, last, *levels = (x for i, x in enumerate(whole) if i not in {m["array"] for m in copied})
            ordered = [first, last, layer, *levels, *((outs[-1], *outs[:-1]) if levels else outs)]
            assert len(ordered) == program.parameters
            for place in np.ndindex(*grid[::-1]):
                findings.update(ptx.Block(program, ordered, maps, place).run())
            return [x.view(t.dtype).reshape(t.shape) for x, t in zip(outs, out_type)]

        return lambda *arrays: jax.pure_callback(call, out_type, *arrays)

    monkeypatch.setattr(plgpu, "kernel", emulated)
    return jax.jit(lambda x: kernel(**x))(arguments), findings


@pytest.mark.parametrize(("storage", "shape", "lengths", "first"), CASES)
def test_compiled_kernel_equals_float64(on, copied, monkeypatch, storage, shape, lengths, first):
    arguments, expected = kernel_cases.case(storage, shape, lengths, first)
    arguments = dict(arguments)
    rotation, k = arguments.pop("rotation"), arguments["k"]
    if rotation is not None:
        arguments["position"] = rotation.position

    def kernel(position=None, **given):
        turned = None if position is None else dataclasses.replace(rotation, position=position)
        return mosaic_gpu.decode_attention(**given, rotation=turned, chip="sm_90", interpret=None, splits=2)

    partial, findings = run(kernel, arguments, on("h100"), copied, monkeypatch)
    assert not findings
    if storage == "alignedkv":
        assert max(kernel_cases.errors(partial, expected)) < 2e-5
        return
    dtype = jnp.dtype(k.dtype if hasattr(k, "values") else "float16")
    plain = kernel_cases.errors(kernel_cases.low_precision(arguments | {"rotation": rotation}, dtype), expected)
    for error, bound in zip(kernel_cases.errors(partial, expected), plain):
        assert error <= 4 * bound + 1e-5


def test_levels_of_values_are_enough(on, copied, monkeypatch):
    arguments, _ = kernel_cases.case("alignedkv", "gqa4-h128", "T+1,full")
    names, shape = ("q", "k", "v", "layer", "first", "last"), arguments["v"].levels.shape
    limits = np.sort(np.random.default_rng(1).uniform(-9, -1, (3, *shape)).astype(np.float32), axis=0)
    known = jnp.full(arguments["q"].shape[:3], reference.EMPTY, jnp.float32)
    v = dataclasses.replace(arguments["v"], levels=None, limits=jnp.asarray(limits), known=known)
    given = {n: arguments[n] for n in names} | {"v": v}
    kernel = functools.partial(mosaic_gpu.attend_in_part, splits=2)
    (partial, read), findings = run(kernel, given, on("h100"), copied, monkeypatch)
    assert not findings
    wanted = jax.jit(reference.attend_in_part)(**given)[1]
    assert (read >= wanted).all() and len(np.unique(read)) > 2
    v = dataclasses.replace(v, levels=read, limits=None)
    expected = kernel_cases.attend(*(given[n] for n in ("q", "k")), v, *(given[n] for n in names[3:]))
    assert max(kernel_cases.errors(partial, expected)) < 2e-5


def plain(x, channel, added, group, queries, channels, paired):
    """What `store_tile` is to store, number by number; NaN where it stores nothing."""
    out = np.full((queries, channels), np.nan, np.float32)
    parts, each = max(1, len(added)), 2 if paired else 1
    columns = x.shape[1] // parts
    for row, query in np.ndindex(x.shape[0], queries):
        if (c := channel(row)) < channels:
            part = c // group % parts
            here = [x[row, part * columns + each * query + i] for i in range(each)]
            out[query, c] = sum(here) + sum(added[part][each * query + i] for i in range(each) if added)
    return out


# Of dense storage; of two tiles of affine with 1, 2 and 4 groups of channels in 64, the second beyond 96 channels; of
# codebooks; of planes: rows, columns, parts, the group, channels, what a row is, and whether columns are paired.
@pytest.mark.parametrize(
    ("shape", "parts", "group", "channels", "channel", "paired"),
    [
        ((128, 8), 0, 64, 128, lambda row: row, False),
        ((64, 8), 1, 128, 128, lambda row: gpu_words.value_channel(row, 1), False),
        ((64, 32), 2, 32, 96, lambda row: gpu_words.value_channel(row, 1), False),
        ((64, 32), 4, 16, 64, lambda row: gpu_words.value_channel(row, 0), False),
        ((128, 16), 1, 64, 96, lambda row: gpu_codebook_tiles.channel_of_row(row, 128), False),
        ((64, 16), 0, 64, 96, lambda row: gpu_words.value_channel(row, 1), True),
        ((64, 32), 0, 64, 64, lambda row: gpu_words.value_channel(row, 0), True),
    ],
)
def test_answers_are_stored_of_queries_and_channels_that_there_are(
    on, monkeypatch, shape, parts, group, channels, channel, paired
):
    columns = shape[1] // max(1, parts)
    every = range(1, columns // (2 if paired else 1) + 1)
    outs = [jax.ShapeDtypeStruct((g, *x), jnp.float32) for g in every for x in ((channels,), ())]

    def body(_, *refs):
        row, column = (plgpu.broadcasted_iota(jnp.float32, shape, i, layout=gpu_tiles.WGMMA) for i in (0, 1))
        tile = plgpu.broadcasted_iota(jnp.float32, (64, columns), 1, layout=gpu_tiles.WGMMA)
        one = jnp.max(tile, axis=0)
        for answer, numbers in zip(refs[::2], refs[1::2]):
            added = [one * (1000.0 * (1 + i)) for i in range(parts)]
            gpu_answers.store_tile(answer, row * 64.0 + column, channel, None, added, group, paired)
            gpu_answers.store_column(numbers, one, None, paired)

    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    printed, listed = [], deviceless._gpu_kernels
    monkeypatch.setattr(deviceless, "_gpu_kernels", lambda text: printed.append(text) or listed(text))
    deviceless.compile(plgpu.kernel(body, out_type=outs), (jnp.zeros(1),), on("h100"))
    memory = [np.full(4 * math.prod(x.shape), 0xFF, np.uint8) for x in outs]
    assert not ptx.Block(ptx.Program(printed[-1]), memory, [], (0, 0, 0)).run()
    got = [x.view(np.float32).reshape(out.shape) for x, out in zip(memory, outs)]
    x = np.arange(shape[0])[:, None] * 64.0 + np.arange(shape[1])
    added = [np.arange(columns) * (1000.0 * (1 + i)) for i in range(parts)]
    for g, answer, numbers in zip(every, got[::2], got[1::2]):
        np.testing.assert_array_equal(answer, plain(x, channel, added, group, g, channels, paired))
        np.testing.assert_array_equal(numbers, np.arange(columns)[:: 2 if paired else 1][:g])


def test_races_and_missing_fences_are_found():
    every, own = np.ones(128, bool), ptx_shared.BASE + 4 * np.arange(128)
    words, descriptor = [np.zeros(128, np.uint32)], 1 << 62 | 64 << 32 | ptx_shared.BASE >> 4
    box = ptx_shared.TensorMap(np.zeros(512, np.uint8), 4, [128], [1], [128], 16)

    def found(*steps):
        shared = ptx_shared.Shared()
        shared.barriers[8] = ptx_shared.Barrier(128)
        for step in steps:
            step(shared)
        return {x.partition(":")[0] for x in shared.findings}

    def write(shared):
        shared.store(own, words, 4, every)

    def read(shared):
        shared.load(own[::-1], 4, 1, every)

    def multiply(shared):
        shared.operand(descriptor, 8)

    def copy(shared):
        shared.copy(box, [0], ptx_shared.BASE, 8)

    barrier, fence = ptx_shared.Shared.barrier, ptx_shared.Shared.fence
    assert found(write, read) == {"read of a race"}
    assert found(read, write) == {"write of what others read"}
    assert found(write, barrier, read, barrier, write) == set()
    assert (
        found(write, barrier, multiply) == found(write, barrier, fence, multiply) == {"product of what is not fenced"}
    )
    assert found(write, fence, barrier, multiply) == set()
    assert found(multiply, write) == {"write of what others read"}
    assert found(read, copy) == {"copy over what others read"}
    assert found(copy, read) == {"read before its copy is waited for"}
    assert found(copy, ptx_shared.Shared.leave) == {"nobody waits for a copy", "a barrier is left half-way"}
