"""Loops and counts of machine code, on a listing of nvdisasm that is short enough to count by hand."""

from collections import Counter

import sass

LISTING = """
        .section .text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R2, 0x1, PT ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_2:
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR6][R4.64], P1 ;
.L_x_1:
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/                   FSEL R6, R5, RZ, P1 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/                   IADD3 R2, R2, -0x1, RZ ;
        /*0080*/         @!UP0 BRA.U `(.L_x_2) ;
.L_x_0:
        /*0090*/                   STG.E desc[UR6][R4.64], R6 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
        /*00c0*/                   NOP;
"""
TTGIR = """
    %0 = ttg.async_copy_global_to_local %a, %b mask %c : tensor<64xi32>
    %1:3 = scf.for %i = %c0 to %n step %c64 iter_args(%x = %y) -> (i32)  : i32 {
      %2 = ttg.async_wait %t {num = 2 : i32}
      %3 = ttng.warp_group_dot %q, %k, %zero {inputPrecision = 0 : i32}
      %4:3 = ttng.warp_group_dot_wait %3 {pendings = 0 : i32}
      %5 = tt.load %p, %m : tensor<64x!tt.ptr<i32>>
      %6 = ttg.async_copy_global_to_local %a, %b : tensor<64xi32>
      scf.yield %6 : i32
    } loc(#loc)
    %7 = tt.load %p : tensor<64x!tt.ptr<i32>>
    scf.for %j = %c0 to %n step %c1  : i32 {
      %8 = tt.dot %q, %k, %zero
    }
"""


def test_an_inner_loop_keeps_its_own_instructions():
    code = sass.parse(LISTING)
    assert code.once == Counter(["LDC", "ISETP.GE.AND", "BRA", "STG.E", "EXIT"])
    outer, inner = code.loops
    assert inner.counts == Counter(["MUFU.EX2", "FSEL", "BRA"])
    assert outer.counts == Counter(["LDGSTS.E.BYPASS.LTC128B.128", "IADD3", "BRA.U"])
    assert (outer.size, inner.size) == (3, 3)


def test_executed_instructions_and_their_cycles():
    counts = sass.parse(LISTING).executed([2, 10])
    assert sass.named(counts, "MUFU") == 10
    assert sass.cycles(counts) == (5 + 2 * 3 + 10 * 3, 2 * (1 + 10 + 2), 8 * 10)


def test_order_of_copies_products_and_waits():
    assert sass.order(TTGIR) == [["wait 2", "dot", "load", "copy"], ["dot"]]
