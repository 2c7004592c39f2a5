"""The TPU compiler's own programs, on machines where libtpu is installed; no TPU is needed."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.errors import ConfigError
from jaxmem.planning import chips
from jaxmem.planning.measure import plan_program

pytest.importorskip("libtpu", reason="the TPU compiler comes with jaxmem[tpu]")

LAYERS, WIDTH, HIDDEN, TOKENS = 2, 1024, 4096, 8192


@pytest.fixture(scope="module")
def topology():
    return chips.topology("v5e:2x4")


@pytest.fixture(scope="module")
def mesh(topology):
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2, devices=topology.abstract_devices())


def on(mesh, shape, *spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def loss(weights, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    out, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
    return jnp.square(out.astype(jnp.float32)).mean()


def test_a_scanned_gradient_with_remat(topology, mesh):
    weights = {
        "up": on(mesh, (LAYERS, WIDTH, HIDDEN), None, "fsdp", "tensor"),
        "down": on(mesh, (LAYERS, HIDDEN, WIDTH), None, "tensor", "fsdp"),
    }
    x = on(mesh, (TOKENS, WIDTH), "fsdp")

    def lower():
        return jax.jit(jax.grad(loss)).lower(weights, x)

    plan = plan_program("update", lower, {"weights": weights, "inputs": x}, topology, model_flops=1.0, tokens=TOKENS)
    product = 2 * TOKENS * WIDTH * HIDDEN
    executed = LAYERS * product * (2 + 1 + 4)  # forward, `up` again (`down`'s result is not needed), backward
    assert plan.counts.flops == pytest.approx(executed / 8, rel=0.02)
    assert plan.warnings == ()  # every loop's count is known
    gathered = 2 * WIDTH * HIDDEN / 2  # one matrix of one layer, whole over fsdp, half over tensor
    assert 0.5 * gathered * LAYERS < plan.counts.wire
    assert {group for kind, group in plan.counts.collectives if kind == "all-reduce"} >= {2}
    assert plan.bytes.kinds["weights"] == LAYERS * 2 * WIDTH * HIDDEN * 2 / 8
    assert plan.bytes.kinds["inputs"] == TOKENS * WIDTH * 2 / 4
    assert plan.bytes.fits and plan.bytes.temporaries > 0
    boundary = (LAYERS + 1) * TOKENS * WIDTH * 2 / 4
    assert plan.bytes.total > plan.bytes.kinds["weights"] + boundary


def test_a_program_too_large_is_refused_with_its_figures(topology, mesh):
    x = on(mesh, (4 * 2**20, 8192), "fsdp", dtype=jnp.float32)

    def lower():
        return jax.jit(lambda x: jnp.sin(x)).lower(x)

    plan = plan_program("large", lower, {"inputs": x}, topology)
    argument = 4 * 2**20 * 8192 * 4 / 4
    assert plan.counts is None and plan.roofline is None
    assert not plan.bytes.fits
    assert plan.bytes.kinds["inputs"] == argument
    assert plan.bytes.limit == topology.memory
    assert plan.bytes.total >= argument > plan.bytes.limit  # libtpu 0.0.41 counts nothing beside the largest array


def test_bytes_are_those_that_the_compiler_compares_with_its_limit(topology, mesh):
    """12 GiB that go in and come out in place, and 3 GiB more: fits; with 4 GiB more it does not."""

    def plan(more):
        x = on(mesh, (12 * 2**15, 8192 * 8), ("fsdp", "tensor"), dtype=jnp.float32)
        y = on(mesh, (more * 2**15, 8192 * 8), ("fsdp", "tensor"), dtype=jnp.float32)
        in_place = jax.jit(lambda x, y: (x + 1.0, y.sum()), donate_argnums=0)
        return plan_program("p", lambda: in_place.lower(x, y), {"weights": x, "inputs": y}, topology)

    fits, refused = plan(3), plan(4)
    assert fits.bytes.fits and fits.bytes.total == pytest.approx(15 * 2**30, rel=0.002)
    assert not refused.bytes.fits and refused.bytes.total == pytest.approx(16 * 2**30, rel=0.01)


def test_a_two_core_chip_has_two_devices():
    found = chips.topology("tpu7x:2x2x1")
    assert len(found.abstract_devices()) == found.devices == 8
    assert len(chips.topology("v4:2x2x1").abstract_devices()) == 4
    assert len(chips.topology("v6e:1x1").abstract_devices()) == 1


def test_every_small_topology_is_known_to_the_compiler():
    for chip in chips.CHIPS.values():
        for shape in chips.shapes(chip)[:8] if chip.kind == "tpu" else ():
            found = chips.topology(chips._written(chip, shape))
            assert len(found.abstract_devices()) == found.devices, found.name


def test_what_the_compiler_refuses_is_a_config_error():
    wrong = chips.Topology("v5e:3x5", chips.CHIPS["v5e"], (3, 5), 3)
    with pytest.raises(ConfigError, match="the TPU compiler says"):
        wrong.abstract_devices()
