"""Products on Hopper's tensor cores, and the stores of their right operand, written in PTX.

Pallas's own `wgmma` and stores compute each operand's descriptor or address outside of the loop and keep it in
registers; with a dozen planes those alone fill the register file. Here they are one base and immediates.
"""
# (It checks against the oldest JAX admitted, which lacks what this file is written for.)

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.decode_attention.gpu_tiles import ROWS, WGMMA, swizzled
from pallas_kernels.decode_attention.gpu_words import Thread, fragment

LINE = 128  # bytes of a swizzled row


def multiply(pairs: list, ref, columns: int, interpret, first: int = 0) -> jax.Array:
    """The sum of `a @ b.T` over pairs of registers `a[64, depth]` (float16 or bfloat16) and the first row of `columns`
    rows b of `ref[..., rows, depth or more]`, leading axes flattened; `[64, columns]` float32.

    `ref` is swizzled by 128 bytes; rows must be multiples of 8, its last axis of 64.
    """
    depth, width = pairs[0][0].shape[1], ref.shape[-1]
    if interpret:
        b = ref[...].reshape(-1, width)[:, first : first + depth].astype(jnp.float32)
        return sum(jnp.dot(a.astype(jnp.float32), b[i : i + columns].T, precision="highest") for a, i in pairs)
    kind = {"float16": "f16", "bfloat16": "bf16"}[jnp.dtype(pairs[0][0].dtype).name]
    out = plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(8, 16)), *[WGMMA] * len(pairs)), return_type=out)
    def run(_, ref, *tiles):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        base = arith.shrui(_shared(ref), arith.constant(i32, 4))
        registers = [mgpu.utils.bitcast(x, i32) for a in tiles for x in a.registers.flat]
        count = columns // 2  # accumulators of a thread
        text = [".reg .b64 d; .reg .b32 lo, hi; .reg .pred first, more;"]
        text += ["setp.ne.b32 first, 0, 0; setp.eq.b32 more, 0, 0; wgmma.fence.sync.aligned;"]
        # The distance of groups of 8 rows, in 16 bytes; bit 30: swizzled by 128 bytes.
        high = 1 << 30 | width // 64 * 64
        text.append(f"mov.u32 lo, ${count + len(registers)}; mov.u32 hi, {high};")
        a, before = count, 0
        for _, row in pairs:
            for step in range(first // 16, (first + depth) // 16):
                offset = row // 8 * (width // 64) * 64 + step // 4 * 64 + step % 4 * 2
                text.append(f"add.s32 lo, lo, {offset - before}; mov.b64 d, {{lo, hi}};")
                before = offset
                text.append(
                    f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
                    f"{{{_names(0, count)}}}, {{{_names(a, a + 4)}}}, "
                    f"d, {'first' if a == count else 'more'}, 1, 1, 0;"
                )
                a += 4
        text += ["wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"]
        results = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * count),
            [*registers, base],
            "{ " + "\n".join(text) + " }",
            ",".join(["=&f"] * count + ["r"] * (len(registers) + 1)),
            has_side_effects=True,
        )
        values = [llvm.extractvalue(f32, results, [i]) for i in range(count)]
        pairs_of = [_couple(values[i], values[i + 1]) for i in range(0, count, 2)]
        return fragment(pairs_of, (ROWS, columns), WGMMA, None)

    return run(ref, *(a for a, _ in pairs))


def store(ref, tiles: list, rows: list, interpret) -> None:
    """Stores tiles `[64, N]` of 16-bit floats transposed, each from its row of `ref[..., rows, 64]` on, leading axes
    flattened. Other threads see them after `plgpu.commit_smem()`."""
    columns = tiles[0].shape[1]
    if interpret:
        shape, flat = ref.shape, ref[...].reshape(-1, ROWS)
        for x, row in zip(tiles, rows):
            flat = jax.lax.dynamic_update_slice(flat, x.T, (row, 0))
        ref[...] = flat.reshape(shape)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(8, 16)), *[WGMMA] * len(tiles)))
    def run(_, ref, *tiles):
        t, i32 = Thread(), ir.IntegerType.get_signless(32)
        # Lanes 0-7 name the rows of the first 8 x 8 matrix, 8-15 of the second (8 tokens further), ...
        lane = t.lane8 * 4 + t.j
        row, half, eight = lane % 8, lane // 8 % 2, lane // 16
        at = row * LINE + ((t.warp * 2 + half) ^ row) * 16 + eight * (8 * LINE)
        base = arith.addi(_shared(ref), at.value)
        for x, first in zip(tiles, rows):
            registers = [mgpu.utils.bitcast(r, i32) for r in x.registers.flat]
            n = len(registers)
            names = ", ".join(f"${i}" for i in range(1, n + 1))
            llvm.inline_asm(
                None,
                [base, *registers],
                f"stmatrix.sync.aligned.m8n8.x{n}.trans.shared.b16 [$0 + {first * LINE}], {{{names}}};",
                ",".join(["r"] * (n + 1)) + ",~{memory}",
                has_side_effects=True,
            )

    del columns
    run(ref, *tiles)


def settle(ref, tiles: list, least: jax.Array, interpret) -> None:
    """Has the float32 `tiles` computed here and not after the next barrier: the compiler puts off sums that nothing
    waits for, and keeps (and spills) all their terms. It sees them stored to `ref` where `least` is above 2, which the
    caller knows it never is."""
    if interpret:
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(8, 16)), WGMMA, *[WGMMA] * len(tiles)))
    def run(_, ref, least, *tiles):
        values = [vector.extract(r, [], [i]) for x in (least, *tiles) for r in x.registers.flat for i in range(2)]
        above, values = values[0], values[2 * least.registers.size :]
        stores = "".join(f"@never st.shared.f32 [$0], ${i + 2};\n" for i in range(len(values)))
        llvm.inline_asm(
            None,
            [_shared(ref), above, *values],
            "{ .reg .pred never; setp.gt.f32 never, $1, 0f40000000;\n" + stores + "}",
            ",".join(["r"] + ["f"] * (len(values) + 1)) + ",~{memory}",
            has_side_effects=True,
        )

    run(ref, least, *tiles)


def _names(first: int, last: int) -> str:
    return ", ".join(f"${i}" for i in range(first, last))


def _shared(ref):
    """The address of a shared-memory array, 32 bits."""
    pointer = mgpu.utils.memref_ptr(ref)
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    return arith.trunci(i32, llvm.ptrtoint(i64, pointer))


def _couple(a, b):
    f32 = ir.F32Type.get()
    return vector.from_elements(ir.VectorType.get((2,), f32), [a, b])
