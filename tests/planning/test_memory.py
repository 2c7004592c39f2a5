"""Bytes by kind, and what the compiler says when they are too many."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.planning.memory import Bytes, memory_by_kind, parse_exhausted, refused, tree_bytes

SHORT = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.62G) exceeds"
    " available HBM (15.75G)."
)
LONG = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.60G of 16.00G hbm. Exceeded by 1.60G.

Total hbm usage >= 17.60G:
    reserved        528.00M
    program          17.08G

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(step)/while/body/dot_general"
     Shape: bf16[64,2048,32768]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 8.00G
     XLA label: %fusion.7 = bf16[64] fusion(...)
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: f32[128]{0}
     XLA label: %copy.2 = f32[128]
     ==========================
"""


def test_the_short_message():
    found = parse_exhausted(SHORT)
    assert (found.needed, found.limit, found.largest) == (16.62 * 2**30, 15.75 * 2**30, ())


def test_the_long_message():
    found = parse_exhausted(LONG)
    assert (found.needed, found.limit) == (17.6 * 2**30, 16 * 2**30)
    assert [(a.size, a.what) for a in found.largest] == [
        (8 * 2**30, "bf16[64,2048,32768] jit(step)/while/body/dot_general"),
        (512 * 2**20, "f32[128] %copy.2 = f32[128]"),
    ]


def test_one_array_that_is_too_large():
    single = "RESOURCE_EXHAUSTED: Allocation (size=34359738368) would exceed memory (size=17179869184) :: %s0 = operand"
    found = parse_exhausted(single)
    assert (found.needed, found.limit, found.largest) == (2**35, 0, ())
    x = jax.ShapeDtypeStruct((2**31,), jnp.float32)
    bytes_ = refused(single, {"inputs": x}, 15.75 * 2**30)
    assert (bytes_.total, bytes_.limit, bytes_.fits) == (2**35, 15.75 * 2**30, False)


def test_another_message_is_refused():
    with pytest.raises(ValueError, match="not a message"):
        parse_exhausted("INTERNAL: something else")


def test_trees_count_what_one_device_holds():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), (AxisType.Auto,) * 2)
    tree = {
        "cut": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp"))),
        "both": jax.ShapeDtypeStruct((16, 2), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp")))),
        "whole": jax.ShapeDtypeStruct((3,), jnp.int8, sharding=NamedSharding(mesh, P())),
        "small": jax.ShapeDtypeStruct((10,), jnp.int4),
    }
    assert tree_bytes(tree) == 2 * 6 * 2 + 2 * 2 * 4 + 3 + 5
    abstract = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"), (AxisType.Auto,) * 2)
    leaf = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=NamedSharding(abstract, P("fsdp")))
    assert tree_bytes(leaf) == tree_bytes(tree["cut"])


def test_a_compiled_program():
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)  # noqa: E731
    weights, optimizer, x = shape(256, 256), shape(256, 256), shape(64, 256)

    def step(weights, optimizer, x):
        return weights + optimizer * (jnp.tanh(x @ weights) @ weights).sum()

    compiled = jax.jit(step, donate_argnums=0).lower(weights, optimizer, x).compile()
    found = memory_by_kind(compiled, {"weights": weights, "optimizer": optimizer, "inputs": x}, limit=2**20)
    matrix, rows = 4 * 256 * 256, 4 * 64 * 256
    assert found.kinds == {"weights": matrix, "optimizer": matrix, "inputs": rows}
    assert found.outputs == 0  # the result takes the place of the donated weights
    assert 2 * matrix + rows < found.total < 4 * matrix
    assert found.fits and not memory_by_kind(compiled, {"weights": weights}, limit=2**19).fits


def test_what_rests_comes_on_top():
    x, original = jax.ShapeDtypeStruct((16,), jnp.float32), jax.ShapeDtypeStruct((1024,), jnp.float32)
    compiled = jax.jit(lambda x: x + 1).lower(x).compile()
    alone = memory_by_kind(compiled, {"weights": x}, 2**20)
    both = memory_by_kind(compiled, {"weights": x}, 2**20, {"weights": original, "optimizer": original})
    assert both.total == alone.total + 2 * 4096
    assert both.kinds == {"weights": 64 + 4096, "optimizer": 4096}
    assert refused(SHORT, {"weights": x}, 1.0, {"weights": original}).total == 16.62 * 2**30 + 4096


def test_arguments_that_a_program_does_not_use_still_count():
    unused, x = jax.ShapeDtypeStruct((1024,), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.float32)
    compiled = jax.jit(lambda unused, x: x + 1).lower(unused, x).compile()
    assert memory_by_kind(compiled, {"weights": unused, "inputs": x}).total >= 4096 + 64


def test_a_refused_program_keeps_the_compilers_total():
    x = jax.ShapeDtypeStruct((2**30,), jnp.float32)
    found = refused(SHORT, {"weights": x}, limit=1.0)
    assert found.total == 16.62 * 2**30 and found.limit == 15.75 * 2**30
    assert found.temporaries == pytest.approx(12.62 * 2**30) and not found.fits


def test_rows_put_the_largest_first():
    assert list(Bytes({"weights": 3.0, "cache": 0.0}, temporaries=5.0, code=1.0).rows()) == [
        "temporaries",
        "weights",
        "code",
    ]
