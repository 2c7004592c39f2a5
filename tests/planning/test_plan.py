"""Rooflines, reports, advice, arithmetic and scaling, against figures worked out by hand."""

import json
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.planning import gpu, report, scaling
from jaxmem.planning.advice import advice
from jaxmem.planning.chips import GIB, topology
from jaxmem.planning.hlo import Counts
from jaxmem.planning.hlo_collectives import Collective
from jaxmem.planning.memory import Bytes
from jaxmem.planning.report import Plan, ProgramPlan
from jaxmem.planning.roofline import roofline


def counts(flops=0.0, moved=0.0, wire=0.0, group=4):
    sent = {("all-gather", group): Collective("all-gather", group, 2, 2 * wire, wire)} if wire else {}
    return Counts(flops, moved, sent)


def test_the_slowest_of_the_three_is_the_roofline():
    found = roofline(counts(197e12, 1638e9, 20e9), topology("v5e:4x4"), model_flops=16 * 197e12, tokens=4000)
    assert (found.compute, found.memory, found.interconnect) == pytest.approx((1.0, 2.0, 0.1))
    assert (found.seconds, found.serial, found.bound) == (pytest.approx(2.0), pytest.approx(3.1), "memory")
    assert found.mfu == pytest.approx(0.5) and found.tokens_per_second == pytest.approx(2000)


def test_two_devices_share_a_chip():
    found = roofline(counts(2307e12 / 2, 7370e9 / 2, 300e9), topology("tpu7x:2x2x1"), model_flops=4 * 2307e12)
    assert (found.compute, found.memory, found.interconnect) == pytest.approx((1.0, 1.0, 1.0))
    assert found.mfu == pytest.approx(1.0)


def test_gpus_of_several_nodes_send_over_the_network():
    inside = roofline(counts(wire=450e9, group=8), topology("h100:2x8"))
    across = roofline(counts(wire=50e9, group=16), topology("h100:2x8"))
    assert inside.interconnect == across.interconnect == pytest.approx(1.0)


def test_nothing_to_do_takes_no_time():
    found = roofline(Counts(), topology("v5e:4x4"), model_flops=1.0, tokens=1.0)
    assert (found.seconds, found.mfu, found.tokens_per_second) == (0.0, 0.0, 0.0)


def plan(total=10.0, **bytes_):
    kinds = {"weights": 4 * GIB, "optimizer": 1 * GIB}
    found = Bytes(kinds, temporaries=(total - 5) * GIB, limit=15.75 * GIB, **bytes_)
    slices = topology("v5e:4x4")
    work = counts(197e10, 819e7, 2e9)
    roof = roofline(work, slices, model_flops=8 * 197e10, tokens=32768)
    program = ProgramPlan("update", found, work, roofline=roof, compile_seconds=12.0, warnings=("a note",))
    return Plan("recipe:8b", slices, {"data": 1, "fsdp": 8, "tensor": 2}, (program,))


def test_text_says_what_fits_and_how_fast():
    text = report.as_text(plan())
    assert "mesh data=1 x fsdp=8 x tensor=2: compiled, not run" in text
    assert "update: 10.00 of 15.75 GiB per device, 10 ms at best" in text
    assert "MFU <= 50.0%" in text and "3,276,800 tokens/s" in text
    assert "all-gather over 4: 2 times" in text and "note: a note" in text
    assert text.splitlines()[-1] == "fits"
    assert "DOES NOT FIT" in report.as_text(plan(20.0))


def test_json_has_the_named_keys():
    found = json.loads(report.as_json(plan()))
    assert set(found) == {"name", "topology", "mesh", "programs", "fits", "advice", "label"}
    assert found["fits"] is True and found["label"] == "compiled, not run"
    (program,) = found["programs"]
    assert program["bytes"]["total"] == 10 * GIB and program["bytes"]["weights"] == 4 * GIB
    assert program["collectives"][0]["kind"] == "all-gather" and program["mfu"] == pytest.approx(0.5)


def test_a_refused_program_is_reported():
    refused = ProgramPlan("rollout", Bytes({"cache": 9 * GIB}, 9 * GIB, limit=15.75 * GIB, needed=18 * GIB))
    found = Plan("recipe", topology("v5e:4x4"), {"fsdp": 16}, (refused,))
    assert not found.fits and "DOES NOT FIT" in report.as_text(found)
    assert json.loads(report.as_json(found))["programs"][0]["bytes"]["total"] == 18 * GIB
    assert "NO" in report.sweep_text([found])


def test_a_sweep_has_one_line_per_mesh():
    lines = report.sweep_text([plan(), plan(20.0)]).splitlines()
    assert len(lines) == 4
    assert "yes" in lines[1] and "fsdp=8 tensor=2" in lines[1] and "50.0%" in lines[1] and "NO" in lines[2]


def test_advice_names_what_dominates_and_by_how_much():
    assert advice(plan()) == []
    first, second = advice(plan(20.0))
    assert "4.25 GiB more" in first and "temporaries take 15.00 GiB: raise loop.accumulate" in first
    whole = 5 * 16
    assert f"{whole:.1f} GiB: at least 6 v5e chips, so v5e:2x4" in second


def test_advice_for_a_cache():
    program = ProgramPlan("rollout", Bytes({"cache": 14 * GIB, "weights": 4 * GIB}, limit=15.75 * GIB))
    lines = advice(Plan("recipe", topology("v5e:4x4"), {"fsdp": 4, "tensor": 4}, (program,)))
    assert "cache take 14.00 GiB: lower grpo.prompts_at_once" in lines[0]
    assert "weights take 4.00 GiB: raise mesh.fsdp" in lines[0]


def test_advice_when_no_slice_is_large_enough():
    program = ProgramPlan("update", Bytes({"weights": 400 * GIB}, limit=15.75 * GIB))
    lines = advice(Plan("recipe", topology("v5e:16x16"), {"fsdp": 256}, (program,)))
    assert "more than its largest slice" in lines[1]


def test_arithmetic_of_a_training_step():
    axes = {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 2}
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * 4)
    leaf = lambda shape, *spec: jax.ShapeDtypeStruct(  # noqa: E731
        shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec))
    )
    layers, width, hidden, tokens = 3, 64, 256, 4096
    weights = leaf((layers, width, hidden), None, ("fsdp", "sequence"), "tensor")
    trained = {"cut": leaf((width, 32), ("fsdp", "sequence")), "whole": leaf((width,))}
    step = gpu.Step(tokens=tokens, model_flops=1e12, layers=layers, width=width, kv_width=32)
    kinds = {"weights": weights, "trained weights": trained}
    found = gpu.arithmetic("update", kinds, step, topology("h100:2x8"), axes)
    matrix, cut, whole = layers * width * hidden * 2, width * 32 * 2, width * 2
    stream = tokens / 8 * width * 2  # data x fsdp x sequence share the tokens
    keys = tokens / 4 * 2 * 32 / 2 * 2  # of all tokens of a row, half of the heads
    assert found.bytes.kinds["weights"] == matrix / 8
    assert found.bytes.kinds["gradients"] == cut / 4 + whole
    assert found.counts.flops == pytest.approx(1e12 * 4 / 3 / 16)
    sent = found.counts.collectives
    assert sent["all-gather", 4].payload == pytest.approx(3 * (matrix / 2 + cut))
    assert sent["all-gather", 2].payload == pytest.approx(3 * layers * keys)
    assert sent["reduce-scatter", 4].payload == pytest.approx(cut)
    assert sent["all-reduce", 8].payload == whole
    assert sent["all-reduce", 2].payload == pytest.approx(cut / 4 + 2 * layers * 3 * stream)
    assert found.bytes.temporaries == pytest.approx(layers * stream / 2 + (matrix / 2 + cut + whole) / layers)
    assert found.label == "by arithmetic, not compiled"
    assert found.roofline.peak == pytest.approx(16 * 989.4e12)


def test_arithmetic_on_one_gpu_sends_nothing():
    weights = jax.ShapeDtypeStruct((4, 8, 8), jnp.bfloat16)
    step = gpu.Step(tokens=64, model_flops=1e9, layers=4, width=8, kv_width=8)
    found = gpu.arithmetic("update", {"weights": weights}, step, topology("h200:1"), {})
    assert found.counts.wire == 0 and found.bytes.fits


POINTS = [
    scaling.Point("v5e:16x16", 256, 1.05e12, 2.2e9),
    scaling.Point("v5e:4x4", 16, 1.0e12, 2.0e9),
]


def test_growth_is_relative_to_the_smallest():
    first, second = scaling.growth(POINTS)
    assert (first.flops, first.sent) == (0, 0)
    assert (second.flops, second.sent) == (pytest.approx(0.05), pytest.approx(0.1))
    assert "+10.0%" in scaling.table(POINTS)
    assert scaling.growth([scaling.Point("a", 1, 1.0, 0.0), scaling.Point("b", 2, 1.0, 1.0)])[1].sent == float("inf")


def test_the_plot_is_svg(tmp_path):
    path = scaling.write(POINTS, tmp_path)
    assert path.name == "weak_scaling.svg"
    assert ElementTree.fromstring(path.read_text()).tag.endswith("svg")
