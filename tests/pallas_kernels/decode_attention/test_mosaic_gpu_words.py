"""Packed words on Hopper: the loads and byte permutes of 128 threads, which the GPU interpreter does not run."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("Pallas Mosaic GPU needs JAX 0.11", allow_module_level=True)

import jax.experimental.mosaic.gpu as mgpu  # noqa: F401  (its operations are what is built here)
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from pallas_kernels.decode_attention import gpu_words
from pallas_kernels.decode_attention.gpu_skeleton import Plan

THREADS = np.arange(128, dtype=np.uint32)
WARP, LANE8, J = THREADS >> 5, THREADS >> 2 & 7, THREADS & 3
ARITHMETIC = {
    "arith.addi": operator.add,
    "arith.muli": operator.mul,
    "arith.divui": operator.floordiv,
    "arith.remui": operator.mod,
    "arith.xori": operator.xor,
}


def byte_permute(first, second, select):
    """As the PTX ISA has it: bytes 0 to 3 are the first operand's, 4 to 7 the second's."""
    both = np.stack([x >> np.uint32(8 * i) & np.uint32(255) for x in (first, second) for i in range(4)])
    return sum(np.choose(select >> np.uint32(4 * i) & 7, both) << np.uint32(8 * i) for i in range(4))


def evaluate(op, memory, values):
    """The result of an operation in all threads: 32-bit words, or a list of them; a pointer is a number of words."""
    name, operands = op.operation.name, [values[x] for x in op.operands]
    if name in ARITHMETIC:
        return ARITHMETIC[name](*operands)
    if name == "arith.constant":
        return np.full(128, op.attributes["value"].value, np.uint32)
    if name == "llvm.getelementptr":
        (constant,) = op.attributes["rawConstantIndices"]
        assert str(op.attributes["elem_type"]) == "i32"
        return operands[0] + (operands[1] if len(operands) > 1 else np.uint32(constant))
    if name == "llvm.load":
        count = ir.VectorType(op.result.type).shape[0]
        assert not (operands[0] % count).any()  # aligned
        return [memory[operands[0] + np.uint32(i)] for i in range(count)]
    if name == "vector.extract":
        return operands[0][op.attributes["static_position"][0]]
    if name == "llvm.inline_asm":
        assert op.attributes["asm_string"].value == "prmt.b32 $0, $1, $2, $3;"
        return byte_permute(*operands)
    assert name in ("vector.broadcast", "vector.bitcast", "llvm.bitcast"), name
    return operands[0]


class Words(gpu_words.Words):
    """Runs what is built for the GPU."""

    def read(self, memory, shape, registers, count):
        with mlir.make_ir_context() as context, ir.Location.unknown(context):
            module = ir.Module.create()
            i32, pointer = ir.IntegerType.get_signless(32), ir.Type.parse("!llvm.ptr<3>")
            with ir.InsertionPoint(module.body):
                block = func.FuncOp("read", ([pointer, i32, i32, i32], [])).add_entry_block()
            start, *numbers = block.arguments
            thread = object.__new__(gpu_words.Thread)
            thread.warp, thread.lane8, thread.j = map(gpu_words._Int, numbers)
            with ir.InsertionPoint(block):
                tiles = registers(start, thread)
            values = dict(zip(block.arguments, (0 * THREADS, WARP, LANE8, J)))
            for op in block:
                values[op.result] = evaluate(op, memory, values)
            assert len(tiles) == count
            return [tile(shape, [values[x] for x in y]) for y in tiles]


def tile(shape, registers):
    """The A operand of `wgmma` by the PTX ISA: registers of row 16 w + r, of 16 columns 2 j and 8 + 2 j."""
    out = np.full(shape, 0xDEAD, np.uint16)
    assert 4 * len(registers) == shape[1]
    for i, register in enumerate(registers):
        row, column = 16 * WARP + LANE8 + 8 * (i % 2), 16 * (i // 4) + 8 * (i // 2 % 2) + 2 * J
        out[row, column], out[row, column + 1] = register & 0xFFFF, register >> 16
    return out


def in_shared_memory(words):
    """`words[run, R, H]` as the copy engine leaves them: lines of 128 bytes, 16-byte chunks exchanged by their line."""
    run, rows, channels = words.shape
    lines = words.reshape(run, rows, channels // 32, 8, 4).swapaxes(1, 2).reshape(-1, 8, 4)
    line, chunk = np.ogrid[: len(lines), :8]
    return lines[line, chunk ^ line % 8].ravel()


# Rows of words, groups, channels: 8, 4, 2 and 1 bits in blocks of 128 tokens, and 8 bits in blocks of 256.
@pytest.mark.parametrize(
    ("rows", "groups", "channels"),
    [(32, 1, 128), (16, 1, 96), (8, 1, 64), (8, 2, 128), (8, 4, 96), (4, 4, 256), (64, 1, 128)],
)
def test_registers_are_the_words_that_the_plain_form_has(rows, groups, channels):
    bits = 4  # how many codes a word has makes no difference here
    sizes = (1, 1, 1, 1, 128, channels, rows, 8, 8, 1)
    plan = Plan(*sizes, None, groups, 64)
    emitted, plain = Words(plan, bits), gpu_words.Words(dataclasses.replace(plan, interpret=True), bits)
    words = np.random.default_rng(rows).integers(0, 2**32, (plan.run, rows, channels), dtype=np.uint32)
    memory, array = in_shared_memory(words), jnp.asarray(words)
    # What lies above the codes of a group is masked later.
    halves, mask = ((0, 1), 0xFFFF) if groups == 1 else ((0,), (1 << 32 // groups) - 1)

    def same(got, want, kept=slice(None)):
        assert len(got) == len(want) == len(halves)
        for x, y in zip(got, want):
            np.testing.assert_array_equal(x[kept] & mask, np.asarray(y)[kept] & mask)

    for part in (range(0, channels), range(32, 64)):
        same(emitted.keys(memory, halves, part), plain.keys(array, halves, part))
    channel = gpu_words.value_rows(np.arange(plan.padded)).reshape(-1, 64)
    for i, here in enumerate(channel):
        same(emitted.values(memory, i, halves), plain.values(array, i, halves), here < channels)
