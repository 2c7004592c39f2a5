"""Compiler flags: every preset is understood by the compiler it is for, and the user's own flags win."""

import json
import os
import subprocess
import sys

import pytest

from jaxmem.distributed import flags
from jaxmem.errors import ConfigError

LATENCY = "xla_gpu_enable_latency_hiding_scheduler"
OPTIONS = """
import hashlib
from jax._src.lib import xla_client
print(hashlib.md5(xla_client.CompileOptions().SerializeAsString()).hexdigest())
"""
AHEAD = """
import hashlib, json, re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = topologies.make_mesh(topologies.get_topology_desc("v5e:2x2", platform="tpu"), (2, 2), ("fsdp", "tensor"))
shape = lambda *sizes, spec: jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
layer = lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None)
loss = lambda w, x: jax.lax.scan(layer, x, w)[0].astype(jnp.float32).mean()
weights = (shape(2, 1024, 4096, spec=P(None, "fsdp", "tensor")), shape(2, 4096, 1024, spec=P(None, "tensor", "fsdp")))
lowered = jax.jit(jax.grad(loss)).lower(weights, shape(1024, 1024, spec=P("fsdp")))
for options in json.loads(sys.argv[1]):
    text = lowered.compile(compiler_options=options).as_text()
    print(hashlib.md5(text.encode()).hexdigest())
"""


def run(code, *arguments, **variables):
    """What a fresh Python says: the lines it prints and its errors."""
    clean = {name: value for name, value in os.environ.items() if name not in flags.VARIABLES.values()}
    clean |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", **variables}
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=clean, capture_output=True, text=True, timeout=300
    )
    return ended.returncode, ended.stdout.split(), ended.stderr


def test_names_are_unique_and_every_flag_has_a_reason():
    for preset in flags.PRESETS.values():
        for backend in flags.VARIABLES:
            names = [flag.name for flag in preset.flags(backend)]
            assert len(set(names)) == len(names)
            assert all(flag.why for flag in preset.flags(backend))


def test_presets_touch_their_own_variable_alone():
    assert flags.environment("none", current={}) == {}
    assert flags.environment("default", current={}) == {"XLA_FLAGS": f"--{LATENCY}=true"}
    assert list(flags.environment("tpu-overlap", current={})) == ["LIBTPU_INIT_ARGS"]
    assert list(flags.environment("gpu-overlap", current={})) == ["XLA_FLAGS"]


@pytest.mark.parametrize("theirs", [f"--{LATENCY}=false", f"--no{LATENCY}", f"--{LATENCY}", f"-{LATENCY}=0"])
def test_the_users_flags_win(theirs):
    current = {"XLA_FLAGS": f"--xla_cpu_enable_fast_math=false {theirs}"}
    assert flags.environment("default", current=current) == {}
    merged = flags.environment("gpu-overlap", [f"--{LATENCY}=true"], current)["XLA_FLAGS"].split()
    assert merged[:2] == current["XLA_FLAGS"].split()
    assert sum(LATENCY in word for word in merged) == 1
    assert LATENCY not in flags.compiler_options("gpu", "gpu-overlap", current=current)


def test_a_longer_name_of_the_user_is_another_flag():
    current = {"XLA_FLAGS": f"--{LATENCY}_of_mine=false"}
    assert f"--{LATENCY}=true" in flags.environment("default", current=current)["XLA_FLAGS"].split()


def test_extra_flags_win_over_the_preset_and_find_their_variable():
    extra = ["--xla_tpu_scoped_vmem_limit_kib=65536", f"--{LATENCY}=false", "--xla_gpu_enable_triton_gemm"]
    found = flags.environment("default", extra, current={})
    assert found["LIBTPU_INIT_ARGS"] == extra[0]
    assert found["XLA_FLAGS"] == f"--{LATENCY}=false --xla_gpu_enable_triton_gemm=true"
    assert flags.compiler_options("gpu", "default", extra, {}) == {LATENCY: False, "xla_gpu_enable_triton_gemm": True}
    assert flags.compiler_options("tpu", "default", extra, {}) == {"xla_tpu_scoped_vmem_limit_kib": "65536"}


def test_merging_twice_changes_nothing():
    once = flags.environment("gpu-overlap", current={})
    assert flags.environment("gpu-overlap", current=once) == {}


@pytest.mark.parametrize(
    ("preset", "extra", "current", "message"),
    [
        ("gpu-overlpa", (), {}, "there are none, default, tpu-overlap, gpu-overlap"),
        ("none", ["xla_gpu_x=1"], {}, "no compiler flag"),
        ("none", ["--xla_gpu_x=1 --xla_gpu_y=2"], {}, "one text per flag"),
        ("none", ["--xla_disable_hlo_passes=x"], {}, "LIBTPU_INIT_ARGS or XLA_FLAGS"),
        ("default", (), {"XLA_FLAGS": "my_flags.txt"}, "names the file 'my_flags.txt'"),
    ],
)
def test_wrong_flags_say_what_would_be_right(preset, extra, current, message):
    with pytest.raises(ConfigError, match=message):
        flags.environment(preset, extra, current)


@pytest.mark.parametrize("name", [flag.name for flag in flags.GPU_OVERLAP])
def test_the_gpu_flags_that_are_not_on_already_change_the_compile_options(name, plain_options):
    """XLA parses each flag; those whose reason starts with (on) are what it does by itself."""
    flag = next(flag for flag in flags.GPU_OVERLAP if flag.name == name)
    code, options, errors = run(OPTIONS, XLA_FLAGS=str(flag))
    assert code == 0, errors
    assert (options == plain_options) == flag.why.startswith("(on)")


@pytest.fixture(scope="module")
def plain_options():
    return run(OPTIONS)[1]


def test_xla_understands_every_preset_and_refuses_an_unknown_flag():
    for preset in flags.PRESETS:
        code, _, errors = run("import jax; jax.devices()", **flags.environment(preset, current={}))
        assert code == 0, errors
    code, _, errors = run("import jax; jax.devices()", XLA_FLAGS="--xla_gpu_no_such_flag=1")
    assert code != 0 and "Unknown flag" in errors


def test_gpu_options_compile():
    code = """
import json, sys, jax
jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=json.loads(sys.argv[1]))
"""
    ended, _, errors = run(code, json.dumps(flags.compiler_options("gpu", "gpu-overlap", current={})))
    assert ended == 0, errors


def test_libtpu_understands_every_tpu_flag_and_both_ways_make_one_program():
    pytest.importorskip("libtpu")
    preset = flags.compiler_options("tpu", "tpu-overlap", current={})
    serial = {"xla_tpu_enable_latency_hiding_scheduler": False}
    code, by_option, errors = run(AHEAD, json.dumps([preset, serial]))
    assert code == 0, errors
    code, by_variable, errors = run(AHEAD, "[{}]", **flags.environment("tpu-overlap", current={}))
    assert code == 0, errors
    assert by_variable == by_option[:1]
    code, late, errors = run(AHEAD, "[{}]", LIBTPU_INIT_ARGS="--xla_tpu_enable_latency_hiding_scheduler=false")
    assert late == by_option[1:], errors
    assert by_option[0] != by_option[1]  # the flags reach the compiler


def test_libtpu_refuses_an_unknown_flag():
    pytest.importorskip("libtpu")
    code, _, errors = run(AHEAD, "[{}]", LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=1")
    assert code != 0 and "Unknown command line flag 'xla_tpu_no_such_flag'" in errors


def test_apply_comes_before_jax_starts():
    code = """
from jaxmem.distributed import flags
first = flags.apply("gpu-overlap")
import os, jax
jax.devices()
print(list(first) == ["XLA_FLAGS"] and os.environ["XLA_FLAGS"] == first["XLA_FLAGS"], flags.apply("gpu-overlap") == {})
"""
    ended, printed, errors = run(code)
    assert ended == 0, errors
    assert printed == ["True", "True"]


@pytest.fixture
def environ(monkeypatch):
    for name in flags.VARIABLES.values():
        monkeypatch.setenv(name, "")
    return os.environ


def test_flags_of_a_running_backend_come_too_late(monkeypatch, environ):
    monkeypatch.setattr(flags, "_running", lambda: ["gpu"])
    with pytest.raises(ConfigError, match="come too late.*XLA_FLAGS='--xla_gpu"):
        flags.apply("gpu-overlap")
    with pytest.raises(ConfigError, match="come too late"):
        flags.apply("default", [f"--{LATENCY}=false"])
    assert environ["XLA_FLAGS"] == ""
    assert flags.apply("default") == {}  # nobody asked for it by name
    assert list(flags.apply("tpu-overlap")) == ["LIBTPU_INIT_ARGS"]  # libtpu has not started


def test_on_the_cpu_nothing_is_too_late(environ):
    import jax

    jax.devices()
    assert flags._running() == []
    assert list(flags.apply("default")) == ["XLA_FLAGS"]
