"""Bytes moved by single instructions, as the TPU compiler writes them."""

import pytest

from jaxmem.planning import hlo

BIG, ROW = 4 * 8 * 1024 * 128, 4 * 1024 * 128
HEAD = "HloModule m, num_partitions=4\n\n"
LAYOUT = "f32[8,1024,128]{2,1,0:T(8,128)"


def moved(fused, entry):
    return hlo.count(f"{HEAD}{fused}\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n{entry}\n}}\n").counts.moved


def test_an_update_in_place_behind_a_change_of_layout():
    fused = """%layout (in: f32[8,1024,128]) -> f32[8,1024,128] {
  %in = f32[8,1024,128]{2,1,0:T(16,128)} parameter(0)
  ROOT %copy = f32[8,1024,128]{2,1,0:T(8,128)} copy(%in)
}

%fused (p: f32[8,1024,128], q: f32[1024,128], i: s32[]) -> f32[8,1024,128] {
  %p = f32[8,1024,128]{2,1,0:T(16,128)} parameter(0)
  %l = f32[8,1024,128]{2,1,0:T(8,128)} fusion(%p), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%layout
  %q = f32[1024,128]{1,0:T(8,128)} parameter(1)
  %b = f32[1,1024,128]{2,1,0:T(8,128)} bitcast(%q)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %d = f32[8,1024,128]{2,1,0:T(16,128)} dynamic-update-slice(%l, %b, %i, %z, %z)
}"""
    entry = f"""  %a = {LAYOUT}}} parameter(0)
  %r = f32[1024,128]{{1,0:T(8,128)}} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = {LAYOUT}}} fusion(%a, %r, %i), kind=kLoop, calls=%fused"""
    assert moved(fused, entry) == pytest.approx(2 * ROW, abs=16)


def test_a_slice_of_a_fusion_reads_only_itself():
    fused = """%fused (p: f32[8,1024,128], i: s32[]) -> f32[1024,128] {
  %p = f32[8,1024,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,1024,128]{2,1,0:T(8,128)} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,1024,128}
  ROOT %b = f32[1024,128]{1,0:T(8,128)S(1)} bitcast(%s)
}"""
    entry = f"""  %a = {LAYOUT}}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[1024,128]{{1,0:T(8,128)S(1)}} fusion(%a, %i), kind=kLoop, calls=%fused"""
    assert moved(fused, entry) == pytest.approx(ROW, abs=16)  # read from main memory, written to vector memory


def test_vector_memory_costs_nothing_and_prefetches_cost_once():
    entry = f"""  %a = {LAYOUT}}} parameter(0)
  %s = ({LAYOUT}S(1)}}, {LAYOUT}}}, u32[]{{:S(2)}}) copy-start(%a)
  %v = {LAYOUT}S(1)}} copy-done(%s)
  %n = {LAYOUT}S(1)}} negate(%v)
  %w = (({LAYOUT}}}), f32[1,1024,128]{{2,1,0:T(8,128)S(1)}}, s32[]{{:S(2)}}) slice-start(%a), slice={{[0:1]}}
  %x = f32[1,1024,128]{{2,1,0:T(8,128)S(1)}} slice-done(%w)
  %c = {LAYOUT}S(1)}} custom-call(%x), custom_call_target="ConcatBitcast"
  ROOT %e = {LAYOUT}}} exponential(%n)"""
    assert moved("", entry) == BIG + ROW + BIG


def test_a_collective_spread_over_fusions_counts_once():
    chain = 'replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="7"}'
    part, whole = "f32[2,1024,128]{2,1,0:T(8,128)}", f"{LAYOUT}}}"
    fused = f"""%begin (p: f32[2,1024,128]) -> (f32[2,1024,128], f32[8,1024,128], s32[]) {{
  %p = {part} parameter(0)
  %g = {whole} all-gather(%p), channel_id=1, {chain}
  ROOT %c = ({part}, {whole}, s32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%middle (p: f32[2,1024,128], w: f32[8,1024,128], x: f32[256,256]) -> (f32[256,256], f32[8,1024,128]) {{
  %p = {part} parameter(0)
  %w = {whole} parameter(1)
  %x = f32[256,256]{{1,0:T(8,128)}} parameter(2)
  %g = {whole} all-gather(%p), channel_id=1, {chain}
  %d = f32[256,256]{{1,0:T(8,128)}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = (f32[256,256]{{1,0:T(8,128)}}, {whole}) tuple(%d, %g)
}}

%end (p: f32[2,1024,128], w: f32[8,1024,128]) -> f32[8,1024,128] {{
  %p = {part} parameter(0)
  %w = {whole} parameter(1)
  %g = {whole} all-gather(%p), channel_id=1, {chain}
  ROOT %c = {whole} custom-call(%p, %w, %g), custom_call_target="AsyncCollectiveDone"
}}"""
    entry = f"""  %a = {part} parameter(0)
  %x = f32[256,256]{{1,0:T(8,128)}} parameter(1)
  %s = ({part}, {whole}, s32[]) fusion(%a), kind=kCustom, calls=%begin
  %s0 = {part} get-tuple-element(%s), index=0
  %s1 = {whole} get-tuple-element(%s), index=1
  %m = (f32[256,256]{{1,0:T(8,128)}}, {whole}) fusion(%s0, %s1, %x), kind=kOutput, calls=%middle
  %m1 = {whole} get-tuple-element(%m), index=1
  ROOT %e = {whole} fusion(%s0, %m1), kind=kCustom, calls=%end"""
    counts = hlo.count(f"{HEAD}{fused}\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n{entry}\n}}\n").counts
    (gather,) = counts.collectives.values()
    assert (gather.count, gather.payload, gather.wire) == (1, BIG, BIG * 3 / 4)
    assert counts.flops == 2 * 256**3
    assert counts.moved == (BIG / 4 + BIG) + 2 * 4 * 256 * 256


def test_a_kernel_that_reduces_and_keeps_its_slice_is_a_reduce_scatter():
    part, whole = "f32[2,1024,128]{2,1,0:T(8,128)}", f"{LAYOUT}}}"
    fused = f"""%all-reduce-scatter (p: f32[8,1024,128]) -> f32[2,1024,128] {{
  %p = {whole} parameter(0)
  %r = {whole} all-reduce(%p), channel_id=1, replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  %i = s32[] constant(0)
  ROOT %s = {part} dynamic-slice(%r, %i, %i, %i), dynamic_slice_sizes={{2,1024,128}}
}}"""
    entry = f"""  %a = {whole} parameter(0)
  ROOT %f = {part} fusion(%a), kind=kCustom, calls=%all-reduce-scatter"""
    counts = hlo.count(f"{HEAD}{fused}\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n{entry}\n}}\n").counts
    (found,) = counts.collectives.values()
    assert (found.kind, found.group, found.wire) == ("reduce-scatter", 4, BIG * 3 / 4)
    assert counts.moved == BIG + BIG / 4
