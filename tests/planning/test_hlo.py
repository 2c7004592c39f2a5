"""Counts of small programs against figures worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.planning import hlo
from jaxmem.planning.hlo_collectives import group_size
from jaxmem.planning.hlo_work import _positions

F32 = jnp.float32


def counted(function, *shapes, **options):
    compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, F32) for s in shapes)).compile()
    return hlo.count(compiled.as_text(), **options)


def mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))


def on(mesh, shape, *spec, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def test_a_chain_of_products():
    program = counted(lambda a, b, c: a @ b @ c, (96, 64), (64, 160), (160, 32))
    assert program.counts.flops == 2 * 96 * 64 * 160 + 2 * 96 * 160 * 32
    assert program.counts == program.most
    read = 4 * (96 * 64 + 64 * 160 + 160 * 32)
    between, written = 2 * 4 * 96 * 160, 4 * 96 * 32
    assert program.counts.moved == read + between + written


def test_batched_products():
    program = counted(lambda q, k: jnp.einsum("bthk,bshk->bhts", q, k), (2, 48, 4, 16), (2, 40, 4, 16))
    assert program.counts.flops == 2 * 2 * 4 * 48 * 40 * 16


def test_a_convolution_counts_only_real_elements():
    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    pairs = 3 * 16 - 2  # along an axis of 16 the two outer places miss one of three
    program = counted(convolve, (2, 16, 16, 8), (3, 3, 8, 24))
    assert program.counts.flops == 2 * 2 * pairs * pairs * 8 * 24


@pytest.mark.parametrize("seed", range(20))
def test_positions_of_windows(seed):
    rng = np.random.default_rng(seed)
    data, kernel, out, stride, pad, holes, spread = (
        int(rng.integers(low, high)) for low, high in ((1, 9), (1, 7), (1, 9), (1, 4), (0, 5), (1, 4), (1, 3))
    )
    real = {holes * place for place in range(data)}
    expected = sum(o * stride + k * spread - pad in real for o in range(out) for k in range(kernel))
    assert _positions(data, kernel, out, stride, pad, holes, spread) == expected


def test_scans_count_their_body_as_often_as_it_runs():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0], None

    def outer(x, ws):
        return jax.lax.scan(inner, x, ws)[0]

    program = counted(outer, (24, 64), (7, 64, 64))
    assert program.counts.flops == 7 * 5 * 2 * 24 * 64 * 64
    assert sorted((loop.trips, loop.known) for loop in program.loops) == [(5, "exact"), (7, "exact")]


def halve(x, w):
    """Multiplies until the sum is small: how often is known to nobody, but at most 12 times."""

    def more(state):
        i, x = state
        return (i < 12) & (jnp.abs(x).sum() > 1.0)

    return jax.lax.while_loop(more, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]


def test_a_loop_that_may_end_early_counts_its_bound_or_what_is_given():
    one = 2 * 16 * 32 * 32
    bound = counted(halve, (16, 32), (32, 32))
    assert bound.counts.flops == 12 * one
    assert [loop.known for loop in bound.loops] == ["at most"]
    assert "may end before 12 passes" in bound.notes[0]
    given = counted(halve, (16, 32), (32, 32), unknown_trips=4.5)
    assert given.counts.flops == 4.5 * one
    assert [loop.known for loop in given.loops] == ["given"] and not given.notes


def nested(x, w):
    """Open loops three deep, with a product of another size in each."""

    def innermost(x):
        return jax.lax.while_loop(lambda x: jnp.abs(x).sum() > 3.0, lambda x: x @ w, x)

    def inner(x):
        half = lambda x: innermost(x.at[:8].set(x[:8] @ w))  # noqa: E731
        return jax.lax.while_loop(lambda x: jnp.abs(x).sum() > 2.0, half, x)

    def outer(state):
        i, x = state
        return i + 1, inner(x.at[:4].set(x[:4] @ w))

    more = lambda state: (state[0] < 12) & (jnp.abs(state[1]).sum() > 1.0)  # noqa: E731
    return jax.lax.while_loop(more, outer, (0, x))[1]


def test_open_loops_in_open_loops_have_numbers_of_their_own():
    row = 2 * 32 * 32
    counts = lambda trips: counted(nested, (16, 32), (32, 32), unknown_trips=trips)  # noqa: E731
    given = counts((10.0, 0.5, 0.2))
    assert given.counts.flops == pytest.approx(10 * row * (4 + 0.5 * (8 + 0.2 * 16)))
    assert [(loop.trips, loop.known) for loop in given.loops] == [(n, "given") for n in (10.0, 0.5, 0.2)]
    assert counts((10.0, 0.5)).counts.flops == pytest.approx(10 * row * (4 + 0.5 * (8 + 0.5 * 16)))
    assert counts(3).counts.flops == pytest.approx(3 * row * (4 + 3 * (8 + 3 * 16)))
    assert counts(None).counts.flops == pytest.approx(12 * row * (4 + 8 + 16))


def test_a_loop_without_a_bound_counts_once_and_says_so():
    def endless(x, w):
        return jax.lax.while_loop(lambda x: jnp.abs(x).sum() > 1.0, lambda x: x @ w, x)

    program = counted(endless, (16, 32), (32, 32))
    assert program.counts.flops == 2 * 16 * 32 * 32
    assert [loop.known for loop in program.loops] == ["unknown"] and "counted once" in program.notes[0]


def test_loops_without_the_compilers_note_are_read_from_their_condition():
    def step(x, w):
        return jax.lax.fori_loop(3, 20, lambda i, x: jnp.tanh(x @ w), x)

    text = jax.jit(step).lower(jnp.ones((16, 32)), jnp.ones((32, 32))).compile().as_text()
    assert "known_trip_count" in text
    bare = hlo.count(text.replace("known_trip_count", "something_else"))
    assert [(loop.trips, loop.known) for loop in bare.loops] == [(17, "exact")]


def branched(x, w, flags):
    def layer(x, flag):
        return jax.lax.cond(flag > 0.5, lambda x: jnp.tanh(x @ w) @ w, lambda x: x + 1.0, x), None

    with jax.named_scope("memory"):
        return jax.lax.scan(layer, x, flags)[0]


def test_branches_count_at_their_costliest_and_by_their_share():
    costly = 2 * 2 * 16 * 32 * 32
    shapes = (16, 32), (32, 32), (36,)
    always = counted(branched, *shapes)
    assert always.counts.flops == always.most.flops == 36 * costly
    assert always.branches[0].share == 1.0 and sorted(always.branches[0].flops) == [0, costly]
    some = counted(branched, *shapes, branch_share={"memory": 3 / 36, ".*": 0.5})
    assert some.counts.flops == pytest.approx(3 * costly) and some.most.flops == 36 * costly
    other = counted(branched, *shapes, branch_share={"elsewhere": 0.0})
    assert other.counts.flops == 36 * costly
    assert counted(branched, *shapes, branch_share=0.25).counts.flops == pytest.approx(9 * costly)


def test_slices_of_stacked_weights_move_only_themselves():
    def layers(x, ws):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    program = counted(layers, (8, 256), (10, 256, 256))
    weights, stacked = 4 * 256 * 256, 4 * 10 * 256 * 256
    assert program.counts.moved < 10 * 4 * weights < 10 * stacked


def test_a_cache_update_moves_only_its_row():
    def write(cache, row):
        body = lambda i, cache: jax.lax.dynamic_update_slice(cache, row + i, (i, 0))  # noqa: E731
        return jax.lax.fori_loop(0, 50, body, cache)

    compiled = jax.jit(write, donate_argnums=0).lower(jnp.ones((4096, 256)), jnp.ones((1, 256))).compile()
    assert hlo.count(compiled.as_text()).counts.moved < 2 * 4 * 4096 * 256


def test_weights_gathered_over_fsdp():
    devices = mesh(fsdp=8)
    x, w = on(devices, (64, 256), "fsdp"), on(devices, (256, 512), "fsdp")
    out = NamedSharding(devices, P("fsdp"))

    def gather(x, w):
        return x @ jax.lax.with_sharding_constraint(w, NamedSharding(devices, P()))

    program = hlo.count(jax.jit(gather, out_shardings=out).lower(x, w).compile().as_text())
    (found,) = program.counts.collectives.values()
    assert (found.kind, found.group, found.count) == ("all-gather", 8, 1)
    assert found.payload == 4 * 256 * 512 and found.wire == found.payload * 7 / 8
    assert program.counts.flops == 2 * 64 / 8 * 256 * 512


def test_gradients_reduced_over_data_and_scattered_over_fsdp():
    devices = mesh(data=2, fsdp=4)
    x = on(devices, (64, 256), ("data", "fsdp"))
    w = on(devices, (256, 512))

    def mapped(x, w):
        part = x.T @ jnp.tanh(x @ w)
        whole = jax.lax.psum(part, "data")
        return jax.lax.psum_scatter(whole, "fsdp", tiled=True)

    sharded = jax.shard_map(mapped, mesh=devices, in_specs=(P(("data", "fsdp")), P()), out_specs=P("fsdp"))
    counts = hlo.count(jax.jit(sharded).lower(x, w).compile().as_text()).counts
    reduced, scattered = counts.collectives["all-reduce", 2], counts.collectives["reduce-scatter", 4]
    assert reduced.payload == 4 * 256 * 512 and reduced.wire == reduced.payload
    assert scattered.payload == 4 * 256 * 512 and scattered.wire == scattered.payload * 3 / 4


def test_collectives_inside_loops_count_every_pass():
    devices = mesh(tensor=8)

    def mapped(x):
        def body(x, _):
            left = jax.lax.ppermute(x, "tensor", [(i, (i + 1) % 8) for i in range(8)])
            return left + jax.lax.all_to_all(x.reshape(8, -1, 64), "tensor", 0, 0).reshape(x.shape), None

        return jax.lax.scan(body, x, None, length=6)[0]

    sharded = jax.shard_map(mapped, mesh=devices, in_specs=P("tensor"), out_specs=P("tensor"))
    counts = hlo.count(jax.jit(sharded).lower(on(devices, (512, 64), "tensor")).compile().as_text()).counts
    block = 4 * 64 * 64
    permuted, exchanged = counts.collectives["collective-permute", 8], counts.collectives["all-to-all", 8]
    assert (permuted.count, permuted.wire) == (6, 6 * block)
    assert (exchanged.count, exchanged.wire) == (6, 6 * block * 7 / 8)


@pytest.mark.parametrize(
    "written, size",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0','axis_2'}", 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([4,2]T(1,0)) {'axis_0'}", 4),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("replica_groups={}", 8),
        ("source_target_pairs={{0,0},{1,2},{2,1},{7,5},{5,3},{3,6}}", 4),
        ("source_target_pairs={{0,4},{4,2},{2,0},{1,5},{5,3},{3,1}}", 3),
    ],
)
def test_group_sizes(written, size):
    assert group_size(f"channel_id=1, {written}, dimensions={{0}}", 8) == size


def test_costs_are_known_by_operation():
    def step(x, w):
        with jax.named_scope("grow"):
            x = x @ w
        return jax.lax.fori_loop(0, 9, lambda _, x: jnp.tanh(x @ w.T @ w), x)

    counts = counted(step, (16, 32), (32, 64)).counts
    assert sum(each[0] for each in counts.operations.values()) == counts.flops
    assert sum(each[1] for each in counts.operations.values()) == pytest.approx(counts.moved)
    grown = sum(each[0] for name, each in counts.operations.items() if "grow" in name)
    assert grown == 2 * 16 * 32 * 64 and counts.flops == 19 * grown
    assert "while" in counts.largest(0, 1)[0][0]


def test_kernels_are_listed():
    text = """HloModule m, num_partitions=1
ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %k = f32[8,128]{1,0:T(8,128)} custom-call(%a), custom_call_target="tpu_custom_call"
}
"""
    program = hlo.count(text)
    assert program.counts.kernels == {"tpu_custom_call": 1}
    assert program.counts.moved == 2 * 4 * 8 * 128
    assert "FLOPs are not in the HLO" in program.notes[0]


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.count("hello")
