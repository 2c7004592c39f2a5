"""The programs of real configurations, compiled for a small TPU and counted against other ways of counting."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxmem import cli
from jaxmem import config as configs
from jaxmem.backbones import qwen3_vl, registry
from jaxmem.backbones.published import PUBLISHED
from jaxmem.distributed.mesh import make_mesh
from jaxmem.errors import ConfigError
from jaxmem.memory import comem, former, pvm, vismem
from jaxmem.memory.former import Seen
from jaxmem.model import Spec, init_memory, read
from jaxmem.planning import hlo, programs
from jaxmem.planning.needed import Needed
from jaxmem.training import trees
from jaxmem.training.settings import TrainConfig
from tests.distributed import world as w

CONFIGS = Path(__file__).parents[2] / "configs"


def plan(capsys, *words):
    code = cli.main(["plan", *words, "--json"])
    out, err = capsys.readouterr()
    assert code in (0, 1), err
    return code, json.loads(out)


def test_a_supervised_recipe_is_planned_for_a_tpu(capsys):
    pytest.importorskip("libtpu")
    words = (f"--config={CONFIGS}/digits_quickstart.py", "--topology=v5e:2x2", "--mesh=fsdp=2,tensor=2")
    code, found = plan(capsys, *words)
    assert code == 0 and found["fits"] and found["label"] == "compiled, not run"
    assert found["topology"]["chips"] == 4 and found["mesh"] == {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 2}
    (step,) = found["programs"]
    assert step["name"] == "train step" and step["tokens"] == 32 * 208
    model = cli_model()
    trained = sum(leaf.size * 4 for leaf in jax.tree.leaves(model[1]))
    assert trained / 4 < step["bytes"]["trained weights"] <= trained  # cut over the mesh as far as it goes
    assert 1.9 < step["bytes"]["optimizer"] / step["bytes"]["trained weights"] < 2.1  # two moments
    base = sum(leaf.size * 4 for leaf in jax.tree.leaves(model[0]))
    assert base / 4 < step["bytes"]["weights"] < base / 3
    assert {"all-gather", "all-reduce"} <= {each["kind"] for each in step["collectives"]}
    assert step["flops"] * 4 > step["model_flops"] * 0.8 > 0


def cli_model():
    """The quickstart's weights and memory, as shapes."""
    config = configs.build(TrainConfig, configs.load(f"{CONFIGS}/digits_quickstart.py"), "config")
    backbone = programs.backbone_of(config)
    spec = programs.spec_of(config, backbone)
    memory = jax.eval_shape(lambda: init_memory(jax.random.key(0), spec))
    return qwen3_vl.shapes(backbone, jnp.float32), memory


@pytest.mark.slow
def test_a_grpo_recipe_is_planned_with_rollout_and_prefill(capsys):
    pytest.importorskip("libtpu")
    words = (f"--config={CONFIGS}/digits_pvm_grpo.py", "--topology=v5e:2x2", "--mesh=fsdp=2,sequence=2")
    code, found = plan(capsys, *words)
    assert code == 0
    assert [program["name"] for program in found["programs"]] == ["prefill", "rollout", "update"]
    prefill, rollout, update = found["programs"]
    assert rollout["tokens"] == update["tokens"] == 8 * 8 * 28 and prefill["tokens"] == 8 * 240
    text = programs.backbone_of(configs.build(TrainConfig, configs.load(f"{CONFIGS}/digits_pvm_grpo.py"), "c")).text
    per_token = text.layers * 2 * text.kv_heads * text.head_dim * 4  # keys and values, float32
    prompts, answers = 8 * 240 * per_token / 2, 64 * 28 * per_token / 4  # over fsdp, and over fsdp x sequence
    assert rollout["bytes"]["cache"] == pytest.approx(prompts + answers, rel=0.2)
    assert rollout["bytes"]["optimizer"] > 0  # rests in the memory meanwhile


def test_gpus_are_planned_by_arithmetic(capsys):
    for recipe in ("pvm_qwen3vl.py:8b", "pvm_qwen3vl_grpo.py:8b"):
        code, found = plan(capsys, f"--config={CONFIGS}/{recipe}", "--topology=h100:2x8")
        assert code == 0 and found["fits"] and found["label"] == "by arithmetic, not compiled"
        assert all(program["tokens_per_second"] > 0 for program in found["programs"])


TRANSFER = (
    f"--config={CONFIGS}/comem_qwen25vl_7b.py",
    "--config.backbone=Qwen2.5-7B-Instruct",
    "--config.encoder=Qwen2.5-VL-7B-Instruct",
    "--topology=h100:2x8",
)


def test_an_encoder_beside_the_model_is_planned(capsys):
    code, found = plan(capsys, *TRANSFER)
    (step,), both = found["programs"], (PUBLISHED["Qwen2.5-7B-Instruct"], PUBLISHED["Qwen2.5-VL-7B-Instruct"])
    assert code == 0 and found["fits"]
    counts = [
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(registry.backbone(one.model_type).shapes(one)))
        for one in both
    ]
    assert counts == [7_615_616_512, 8_292_166_656]
    assert step["bytes"]["weights"] == pytest.approx(2 * sum(counts) / 16, rel=0.01)  # bfloat16, over fsdp
    words = configs.load(f"{CONFIGS}/comem_qwen25vl_7b.py", ["--config.encoder=Qwen2.5-VL-7B-Instruct"])
    buckets = configs.build(TrainConfig, words, "config").data.buckets
    (tokens, patches), count = (buckets.tokens[-1], buckets.patches[-1]), buckets.items[-1]
    item, asked = (buckets.item_tokens[-1], buckets.item_patches[-1]), (buckets.query_tokens[-1], patches)
    sees = Needed(Spec(both[1], (comem.create(both[1]),)), {}, tokens, patches, items=(count, *item))
    reads = Needed(Spec(both[1]), {}, *asked).read_row()
    answers = Needed(Spec(both[0]), {}, tokens, 0)
    spec = Spec(both[0], (comem.create(both[0], encoder=both[1]),))
    whole = Needed(spec, {}, tokens, patches, items=(count, *item), query=asked)
    assert whole.read_row() == pytest.approx(answers.read_row() + sees.encode() + reads, rel=1e-9)
    assert whole.encode() > 1.2 * sees.encode()  # its prompt, too


def test_an_encoder_that_nothing_uses_is_refused(capsys):
    pvm = configs.build(TrainConfig, configs.load(f"{CONFIGS}/digits_quickstart.py"), "config")
    with pytest.raises(ConfigError, match="config.encoder reads for a CoMEM, and the model has none"):
        programs.programs(dataclasses.replace(pvm, encoder="Qwen2.5-VL-7B-Instruct").resolved(1), make_mesh(data=1))
    assert cli.main(["plan", *TRANSFER[:2], "--config.encoder=Qwen2.5-VL-8B", TRANSFER[-1]]) == 2
    assert "config.encoder: no folder 'Qwen2.5-VL-8B'" in capsys.readouterr().err
    assert cli.main(["plan", *TRANSFER, "--config.trainable=base"]) == 2
    assert "the encoder's backbone stays as it is" in capsys.readouterr().err


def test_stages_are_planned_one_by_one(capsys):
    words = (f"--config={CONFIGS}/vismem_qwen25vl_7b.py", "--topology=h100:2x8")
    code, found = plan(capsys, *words)
    assert code == 0 and [one["name"].partition(":")[0] for one in found] == ["1_warm_up", "2_memory", "3_invocation"]
    names = [[program["name"] for program in one["programs"]] for one in found]
    reinforced = ["prefill", "rollout", "score", "update"]
    assert names == [["update"], reinforced, reinforced]
    warm_up, memory, invocation = (one["programs"][-1] for one in found)
    assert warm_up["tokens"] * 16 == memory["tokens"] == invocation["tokens"] == 8 * 16 * 1024
    assert memory["model_flops"] > 1.5 * invocation["model_flops"]  # forms memories and reads completions twice
    assert memory["bytes"]["optimizer"] > 1000 * invocation["bytes"]["optimizer"]  # Stage II trains rows alone
    code, alone = plan(capsys, f"{words[0]}:2_memory", words[1])  # whose memory_folder is not there yet
    assert code == 0 and alone["programs"] == found[1]["programs"]
    assert cli.main(["plan", *words, "--scaling_svg=weak.svg"]) == 2
    assert "has stages" in capsys.readouterr().err


@pytest.mark.slow  # the compiler takes two minutes
def test_rollouts_with_memories_are_counted_once_per_memory(capsys):
    pytest.importorskip("libtpu")
    words = (f"--config={CONFIGS}/digits_vismem.py", "--topology=v5e:2x2", "--mesh=fsdp=2,sequence=2")
    code, found = plan(capsys, *words)
    rollouts = [program for one in found for program in one["programs"] if program["name"] == "rollout"]
    assert code == 0 and len(rollouts) == 2
    for rollout in rollouts:
        assert 0.5 < rollout["flops"] * 4 / rollout["model_flops"] < 4
        assert rollout["bytes"]["cache"] > 0


def test_what_cannot_be_planned_says_why(capsys, tmp_path):
    def refused(*words):
        assert cli.main(["plan", f"--config={CONFIGS}/pvm_qwen3vl.py:8b", *words]) == 2
        return capsys.readouterr().err

    assert "plan needs --topology" in refused()
    assert "v5e" in refused("--topology=v9:2x2") and "v5e:4x4" in refused("--topology=v5e:4x5")
    assert "unknown mesh axis in --mesh=fspd=4" in refused("--topology=h100:8", "--mesh=fspd=4")
    assert "is not AXIS=NUMBER" in refused("--topology=h100:8", "--mesh=fsdp=x")
    assert "needs a multiple of 3 devices, there are 8" in refused("--topology=h100:8", "--mesh=fsdp=-1,tensor=3")
    text = refused("--topology=h100:2x8", "--mesh=tensor=16")
    assert "mesh.tensor = 16 does not divide the decoder's 8 key heads; use 1, 2, 4, 8" in text
    text = refused("--topology=h100:8", "--mesh=fsdp=-1", "--config.backbone=Qwen3-VL-9B-Instruct")
    assert "no folder 'Qwen3-VL-9B-Instruct'" in text and "Qwen3-VL-8B-Instruct" in text
    text = refused("--topology=h100:8", "--mesh=fsdp=-1", "--config.loop.batch_size=12", "--config.loop.accumulate=1")
    assert "12 rows per microbatch cannot be shared by mesh data x fsdp = 8 devices" in text


def test_a_plan_that_does_not_fit_says_what_would_help(capsys):
    words = (f"--config={CONFIGS}/pvm_qwen3vl_grpo.py:8b", "--topology=a100-40gb:2")
    code, found = plan(capsys, *words, "--mesh=sequence=2", "--config.grpo.group=8")
    assert code == 1 and not found["fits"] and any("optimizer" in line for line in found["advice"])


@pytest.mark.parametrize("name", sorted(name for name in PUBLISHED if name.startswith("Qwen3-VL")))
def test_published_architectures_have_the_published_sizes(name):
    """Parameters of the released checkpoints; a tied head counts once."""
    wanted = {"2B": 2_127_532_032, "4B": 4_437_815_808, "8B": 8_767_123_696, "32B": 33_357_390_064}
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(qwen3_vl.shapes(PUBLISHED[name])))
    assert count == wanted[name.split("-")[2]]


def test_needed_operations_are_those_of_the_forward_pass():
    """Against the dots of the compiled program, whose attention computes the whole square."""
    rows, shape = 2, (48, 32)
    config = w.BACKBONE
    spec = Spec(config, (pvm.create(config, layers=(1,), latent=64),))
    tree = {"base": qwen3_vl.shapes(config), "memory": jax.eval_shape(lambda: init_memory(jax.random.key(0), spec))}
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), w.batch(rows))
    compiled = jax.jit(lambda base, memory, batch: read(spec, base, memory, batch)).lower(**tree, batch=batch).compile()
    counted = hlo.count(compiled.as_text(), branch_share={"DecoderLayer": 1 / 2}).counts.flops
    needed = Needed(spec, trees.split(tree, "memory")[0], *shape)
    square = config.text.layers * 4 * config.text.heads * config.text.head_dim * shape[0] ** 2 / 2
    assert counted == pytest.approx(rows * (needed.read_row() + square), rel=0.02)


def test_needed_operations_of_a_memory_are_those_of_its_forming():
    """Against the dots of the compiled former and query builder, whose attention computes whole squares."""
    visual, text, config = 24, 16, w.BACKBONE
    own = vismem.create(config, queries=4, short=8, long=8, builder_heads=4, builder_length=48, text_cap=text)
    spec = Spec(config, (own,))
    tree = {"base": qwen3_vl.shapes(config), "memory": jax.eval_shape(lambda: init_memory(jax.random.key(0), spec))}
    seen = lambda size: Seen(*(jax.ShapeDtypeStruct((1, size, *more), t) for more, t in (((64,), "f4"), ((), bool))))  # noqa: E731

    def form(base, memory, visual, text):
        return former.form(own, config, base, memory, visual, text, jnp.zeros(1, int))

    compiled = jax.jit(form).lower(tree["base"], tree["memory"]["vismem"], seen(visual), seen(text)).compile()
    counted = hlo.count(compiled.as_text()).counts.flops
    needed = Needed(spec, trees.split(tree, "memory")[0], 48, 4 * visual, 1, text)
    size, hidden = visual + text + own.queries + own.short, visual + text
    square = config.text.layers * 4 * config.text.heads * config.text.head_dim * size**2 / 2
    square += own.builder_layers * 4 * config.text.width * (own.queries * hidden)  # states do not look at queries
    adapters = config.text.layers * 2 * size * own.rank * 2 * (2 * 64 + 8 * 16 + 4 * 16)
    assert counted == pytest.approx(needed.form() + square + adapters, rel=0.02)


def test_a_plan_is_lowered_from_the_configuration_alone(tmp_path):
    """No folder of the backbone, no memory, no data: the recipe's files need not be there."""
    words = ["--config.mesh.fsdp=1", "--config.mesh.sequence=4", "--config.mesh.tensor=2"]
    config = configs.load(f"{CONFIGS}/pvm_qwen3vl_grpo.py:4b-lora", words)
    config = configs.build(TrainConfig, config, "config").resolved(8)
    found = programs.programs(config, make_mesh(sequence=4, tensor=2), programs.Shape(256, 256))
    assert [program.name for program in found] == ["prefill", "rollout", "score", "update"]
