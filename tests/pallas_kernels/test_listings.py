"""Readers of the compilers' listings, on texts cut short from what libtpu 0.0.50 and CUDA 13.5 write."""

import collections

import pytest

from pallas_kernels import listings
from pallas_kernels.listings import Loop

# A grid loop (bundles 1 to 8) around a loop of four iterations, 16 tokens in steps of 4 (bundles 3 to 5), and around a
# predicated region that is skipped by a branch forward (bundle 6).
CODE = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s14_s3 = inlined_call_operand.vmem [shape: f32[8,128]]  ;;  %s698_s14 = smov 0 }
   0x1 LB: > { %s761_s15 = sadd.s32 1, %s698_s14  ;;  %s698_s14 = sphi %s690_s1, %s761_s15 } /* Start region 132 */
   0x2   : > { %17 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s317_s20, /*vmem=*/%s319_s10 /*
base_bounds: (8, 1, 128)
second_minor_factor: 1 */ }
   0x3 LB: >> { %s163_s3 = sadd.s32 4, %s710_s3 /* copy */  ;;  %s710_s3 = sphi %s818_s3, %s163_s3 } /* Start region 121 :: Start region 47 */
   0x4   : > { %p160_p9 = scmp.ge.s32.totalorder %s163_s3, 16 /* loop exit test */  ;;  %162 = sbr.rel (!%p160_p9) target = $region121 }
   0x5   : >> { %vst [vmem:[#allocation3] sm:$0xff] /*vst_source=*/%v188_v26 } /* End region 121 :: End region 47 */
   0x6   : > { %203 = sbr.rel (%p482_p10) target = $region53 } /* Start region 52 */
   0x7   : > { %p14_p0 = scmp.ge.s32.totalorder %s761_s15, %s9_s1  ;;  %16 = sbr.rel (!%p14_p0) target = $region132 } /* Start/End empty region 53 */
   0x8   :  {} /* End region 132 */
   0x9   :  { %690 = vsyncpa [#allocation7], 1 }
"""  # noqa: E501
SLOTS = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 2
0 0 1 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 1
2 0 3 0 0 1 0 0 0 1
0 1 4 1 0 0 0 0 0 1
0 0 0 0 1 0 1 1 1 0
0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 0
0 0 0 0 0 0 0 0 0 0
"""


def test_a_schedule_counts_inner_loops_as_often_as_they_run():
    schedule = listings.schedule(SLOTS, CODE)
    assert schedule.loops == (Loop(1, 9), Loop(3, 6, trips=4))
    assert schedule.step == {
        "bundles": 7 + 4 * 3, "VALU": 1 + 4 * 7, "MXU": 4 * 2, "XLU": 4, "VPOP": 4, "EUP": 4, "VLOAD": 4,
        "VSTORE": 4, "VLOAD:FILL": 4, "VSTORE:SPILL": 4, "SALU": 6 + 4 * 2,
    }  # fmt: skip
    assert schedule.spills == 2
    assert schedule.branches == (Loop(7, 7, trips=1),)  # to where region 53 starts: nothing is jumped over
    assert schedule.count(schedule.loops[1], (Loop(4, 5),)) == {
        "bundles": 2, "VALU": 3, "MXU": 2, "VLOAD": 1, "EUP": 1, "VLOAD:FILL": 1, "VSTORE": 1, "VSTORE:SPILL": 1,
        "SALU": 1,
    }  # fmt: skip


def test_a_loop_of_unknown_length_cannot_be_counted():
    schedule = listings.schedule(SLOTS, CODE.replace("%s163_s3, 16 /* loop exit test */", "%s163_s3, %s7_s1"))
    assert schedule.loops[1] == Loop(3, 6, trips=None)
    with pytest.raises(ValueError, match="the loop at bundle 0x3 has no constant number of iterations"):
        _ = schedule.step


def test_slots_and_code_must_be_of_the_same_kernel():
    with pytest.raises(ValueError, match="10 rows of slots, but 9 bundles"):
        listings.schedule(SLOTS, CODE[: CODE.index("   0x9")])


RESOURCES = "Resources(smem_scratch_bytes=80896, tmem_scratch_cols=0, barrier_counts=Counter({Barrier(1): 2}))\n"
# A wait that loops on itself, the main loop, then the wait's slow path, which stands after the end and jumps back.
KERNEL = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'decode_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for decode_mosaic_gpu_kernel
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 219 registers, used 2 barriers, 17 bytes smem
ptxas info    : Compile time = 228.218 ms
info    : used 219 registers, used 2 barriers, 0 stack, 1025 bytes smem, 1216 bytes cmem[0], 0 bytes lmem

\t.target\tsm_90a
\t.section\t.text.decode_mosaic_gpu_kernel,"ax",@progbits
decode_mosaic_gpu_kernel:
.text.decode_mosaic_gpu_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_5:
        /*0010*/                   LOP3.LUT R24, R24, 0xf000f, RZ, 0xc0, !PT ;
.L_x_1:
        /*0020*/                   HGMMA.64x8x16.F32 R36, R24, gdesc[UR56], RZ, !UPT ;
        /*0030*/                   NOP ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
        /*0050*/              @!UP0 BRA `(.L_x_6) ;
        /*0060*/              @P2 BRA `(.L_x_5) ;
        /*0070*/                   EXIT ;
.L_x_6:
        /*0080*/                   BRA `(.L_x_6);
        /*0090*/                   NOP;
"""
SPILLED = """
ptxas warning : Registers are spilled to local memory in function 'merge', 144 bytes spill stores, 128 bytes spill loads
ptxas info    : Compiling entry function 'merge_mosaic_gpu_kernel' for 'sm_90a'
    144 bytes stack frame, 144 bytes spill stores, 128 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 144 bytes cumulative stack size, 1 bytes smem
\t.target\tsm_90a
"""


def test_registers_spills_and_shared_memory_of_gpu_kernels():
    kernels = listings.gpu_kernels(RESOURCES + RESOURCES.replace("80896", "1000") + KERNEL + SPILLED)
    facts = {name: (x.registers, x.spill_bytes, x.shared_bytes) for name, x in kernels.items()}
    assert facts == {"decode": (219, 0, 80896 + 1025), "merge": (255, 144 + 128, 1001)}
    with pytest.raises(ValueError, match="1 kernels, but resources of 0"):
        listings.gpu_kernels(KERNEL)


def test_a_gpu_loop_of_constant_length_counts_as_often_as_it_runs():
    counted = """        /*0020*/                   HGMMA.64x8x16.F32 R36, R24, gdesc[UR56], RZ, !UPT ;
        /*0024*/                   VIADD R84, R84, 0x100 ;
        /*0028*/                   ISETP.NE.U32.AND P1, PT, R84, 0x400, PT ;
"""
    old = next(line + "\n" for line in KERNEL.splitlines() if "HGMMA" in line)
    kernel = listings.gpu_kernels(RESOURCES + KERNEL.replace(old, counted))["decode"]
    outer, inner, _ = kernel.loops
    assert (inner.trips, outer.trips) == (4, None)
    assert kernel.count(inner)["HGMMA"] == 1
    assert kernel.count(outer) == {"LOP3": 1, "HGMMA": 4, "VIADD": 4, "ISETP": 4, "BRA": 4 + 2}
    # Of two iterations ptxas keeps no count but a flag.
    copied = """        /*0024*/                   PLOP3.LUT P1, PT, PT, PT, UP0, 0x80, 0x0 ;
"""
    cleared = """        /*0028*/                   UPLOP3.LUT UP0, UPT, UPT, UPT, UPT, 0x40, 0x0 ;
"""
    twice = KERNEL.replace("@!P1 BRA", "@P1 BRA")
    for text, trips in ((copied + cleared, 2), (cleared + copied, None), (copied, None)):
        kernel = listings.gpu_kernels(RESOURCES + twice.replace(old, old + text))["decode"]
        assert kernel.loops[1].trips == trips
    assert (
        listings.gpu_kernels(RESOURCES + KERNEL.replace(old, old + copied + cleared))["decode"].loops[1].trips is None
    )


def test_instructions_of_a_gpu_kernel_by_loop():
    kernel = listings.gpu_kernels(RESOURCES + KERNEL)["decode"]
    outer, inner, halt = kernel.loops
    assert (outer, inner, halt) == (Loop(1, 7), Loop(2, 5), Loop(8, 9))
    assert kernel.count(inner) == {"HGMMA": 1, "BRA": 1}
    assert kernel.count(outer) == collections.Counter(LOP3=1, HGMMA=1, BRA=3)
    assert kernel.count(outer, (inner,)) == collections.Counter(LOP3=1, BRA=2)
    assert kernel.branches == (Loop(6, 8, 1),)
    assert kernel.count().total() == 8
