"""DeepStack and the spatial vision aggregator as memories of a LLaVA-NeXT, against torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jaxmem import model as functions  # noqa: E402
from jaxmem.backbones import llava, qwen3_vl  # noqa: E402
from jaxmem.errors import ConfigError  # noqa: E402
from jaxmem.memory import deepstack, sva  # noqa: E402
from jaxmem.model import Spec  # noqa: E402
from tests.memory import baseline_world as b  # noqa: E402
from tests.memory.world import BACKBONE as QWEN  # noqa: E402
from tests.memory.world import random_like  # noqa: E402

SVA = {"layers": (0, 2, 4), "levels": (1, 3), "inner": 32, "heads": 4}
ANSWER = np.random.default_rng(3).integers(0, 400, (3, 4)).astype(np.int32)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> b.World:
    return b.make_world(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def attached(world: b.World) -> dict[str, Any]:
    return {"deepstack": world.model.attach("deepstack"), "sva": with_sva(world)}


def with_sva(world: b.World, **settings: Any) -> Any:
    """An aggregator whose every parameter is random."""
    model = world.model.attach("sva", **(SVA | settings))
    return dataclasses.replace(model, memory=random_like(model.memory, 7))


def valid(world: b.World) -> np.ndarray:
    """[B, T] bool: tokens."""
    return np.asarray(world.batch.segments) > 0


def with_hooks(layers: Any, hooks: dict[int, Any], run: Any, before: bool) -> Any:
    """`run()` with functions of hidden states in front of, or behind, some of torch's decoder layers."""

    def ahead(change: Any) -> Any:
        return lambda module, args, kwargs: ((change(args[0]), *args[1:]), kwargs)

    def after(change: Any) -> Any:
        return lambda module, args, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handles = [
        layers[at].register_forward_pre_hook(ahead(change), with_kwargs=True)
        if before
        else layers[at].register_forward_hook(after(change))
        for at, change in hooks.items()
    ]
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


def shown(world: b.World, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of a row's visual tokens that are no newlines, and which tile token each of them shows, counted from 0."""
    rows = np.asarray(world.batch.visual_rows[row])
    places = np.flatnonzero(rows > 0)
    return torch.tensor(places), torch.tensor(rows[places] - 1, dtype=torch.long)


@pytest.mark.parametrize("row", [0, 1])
def test_check_26_deepstack_adds_exactly_the_given_features_at_the_given_layers(
    world: b.World, attached: Any, row: int
) -> None:
    model = attached["deepstack"]
    assert model.memory == {"deepstack": {}}
    found = np.asarray(model.logits(world.batch))[row, : world.lengths()[row]]
    each = b.project(world, b.cells(b.tower(world, row)[-2])).flatten(0, 1)  # [tokens, 4 samples, D]
    places, own = shown(world, row)

    def adding(sample: int) -> Any:
        return lambda x: x.index_add(1, places, each[own, sample][None])

    hooks = {1 + sample: adding(sample) for sample in range(4)}
    run = lambda: b.decode(world, b.embedded(world, row))  # noqa: E731
    wanted = with_hooks(world.theirs.model.language_model.layers, hooks, run, before=True)
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
    assert np.abs(wanted - run()).max() > 0.1
    np.testing.assert_allclose(world.logits[row, : len(wanted)], run(), atol=1e-4, rtol=0)


def ports_of(model: Any, world: b.World) -> Any:
    """The port of the only memory, for the prompts."""
    (config,) = model.spec.memories
    module = {"deepstack": deepstack, "sva": sva}[config.name]
    visual = jax.jit(llava.see, static_argnums=0, static_argnames="levels")(
        model.spec.backbone, model.base, world.batch, levels=model.spec.levels
    )
    found = module.prompt_ports(config, model.memory[config.name], model.base, visual, world.batch)
    assert not found.beside_ffn and len(found.after_layer) == 1
    return found.after_layer[0]


@pytest.mark.parametrize("name", ["deepstack", "sva"])
def test_check_14_text_and_newlines_pass_through_bit_for_bit(world: b.World, attached: Any, name: str) -> None:
    port = ports_of(attached[name], world)
    rows = np.asarray(world.batch.visual_rows)
    x = np.random.default_rng(4).standard_normal((*rows.shape, 64)).astype(np.float32)
    each = jax.jit(lambda slots, x: jax.lax.map(lambda slot: port.act(slot, x, None), slots))
    for out in np.asarray(each(port.slots, x)):
        np.testing.assert_array_equal(out[rows <= 0], x[rows <= 0])
        assert np.abs(out - x)[rows > 0].max(axis=-1).min() > 1e-3


@pytest.mark.parametrize("name", ["deepstack", "sva"])
def test_rows_without_images_and_batches_without_images_are_the_backbone_s(
    world: b.World, attached: Any, name: str
) -> None:
    n = world.lengths()[2]
    found = np.asarray(attached[name].logits(world.batch))
    np.testing.assert_allclose(found[2, :n], world.logits[2, :n], atol=1e-6, rtol=0)
    for row in (0, 1):
        assert np.abs(found - world.logits)[row][valid(world)[row]].max() > 0.1
    alone = attached[name].batch([b.CHATS[2]], buckets=b.BUCKETS)
    assert alone.patches.shape[1] == 0
    np.testing.assert_allclose(np.asarray(attached[name].logits(alone))[0, :n], found[2, :n], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["deepstack", "sva"])
def test_check_19_prefill_and_decoding_equal_the_whole_forward(world: b.World, attached: Any, name: str) -> None:
    model = attached[name]
    trees = (model.spec, model.base, model.memory)
    whole = np.asarray(b.forward(*trees, b.answered(world.batch, ANSWER)))
    found = np.asarray(b.stepped(*trees, world.batch, ANSWER))
    np.testing.assert_allclose(found, b.behind(world, whole, ANSWER.shape[1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["deepstack", "sva"])
def test_a_bfloat16_backbone_stays_bfloat16(world: b.World, attached: Any, name: str) -> None:
    model = attached[name]
    base = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model.base)
    run = lambda *trees: functions.hidden_states(model.spec, *trees, world.batch)  # noqa: E731
    assert jax.eval_shape(run, base, model.memory).dtype == "bfloat16"


def test_deepstack_says_what_it_cannot_do(world: b.World) -> None:
    config = world.model.spec.backbone

    def with_projector(**section: Any) -> Any:
        projector = dataclasses.replace(config.vision.projector, **section)
        return dataclasses.replace(config, vision=dataclasses.replace(config.vision, projector=projector))

    for backbone, settings, message in (
        (config, {"start": 0}, "start 0 must be at least 1"),
        (config, {"interval": 0}, "interval 0 must be at least 1"),
        (config, {"start": 2}, r"4 samples need the layers 2 to 5 in steps of 1, and the decoder has 5, 0 to 4"),
        (config, {"interval": 2}, r"4 samples need the layers 1 to 7 in steps of 2"),
        (config, {"gate": 0.0}, "no setting gate"),
        (with_projector(name="pixel_shuffle", norm_eps=1e-5), {}, "'pixel_shuffle' has no such MLP; use .*avgpool"),
        (with_projector(name="resampler", ratio=1, kind="perceiver"), {}, "'resampler' has no such MLP"),
        (with_projector(name="ldpv2", ratio=1, queries=9), {}, "has no grid of tokens"),
        (QWEN, {}, "qwen3_vl has no such MLP"),
    ):
        with pytest.raises(ConfigError, match=message):
            deepstack.create(backbone, **settings)
    pooled = with_projector(name="ldpv2", ratio=1, queries=4)
    assert deepstack.create(pooled).cells.ratio == 2
    deeper = dataclasses.replace(config, text=dataclasses.replace(config.text, layers=12))
    assert deepstack.create(deeper, start=2, interval=3).layers == (1, 4, 7, 10)


def test_deepstack_samples_of_cells_over_the_border_add_nothing(world: b.World) -> None:
    config = world.model.spec.backbone
    projector = dataclasses.replace(config.vision.projector, ratio=3)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, projector=projector))
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, layers=10))
    made = deepstack.create(config)
    assert made.layers == tuple(range(9))
    see = jax.jit(llava.see, static_argnums=0, static_argnames="levels")
    visual = see(config, world.model.base, world.batch, levels=made.levels)
    found = np.asarray(deepstack.samples(made, world.model.base, visual))  # [9, B, 1 + tiles * 4, D]
    plain = np.asarray(b.project(world, b.tower(world, 0)[-2]))  # [tiles, 16, D]
    for tile, token, sample in np.ndindex(len(plain), 4, 9):
        y, x = 3 * (token // 2) + sample // 3, 3 * (token % 2) + sample % 3
        wanted = plain[tile, 4 * y + x] if max(y, x) < 4 else 0 * plain[0, 0]
        np.testing.assert_allclose(found[sample, 0, 1 + 4 * tile + token], wanted, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(found[:, :, 0], 0)


@pytest.mark.parametrize(("together", "groups"), [(2, [(0, 1), (2, 3)]), (3, [(0, 1, 2), (3,)]), (4, [(0, 1, 2, 3)])])
def test_samples_of_one_layer_are_added_together(
    world: b.World, attached: Any, together: int, groups: list[tuple[int, ...]]
) -> None:
    each = np.asarray(ports_of(attached["deepstack"], world).slots)
    port = ports_of(world.model.attach("deepstack", together=together), world)
    assert port.layers == tuple(range(len(groups)))
    wanted = np.stack([each[list(group)].sum(0) for group in groups])
    np.testing.assert_allclose(np.asarray(port.slots), wanted, atol=1e-5, rtol=0)


def test_as_few_samples_together_as_the_decoder_has_room_for(world: b.World) -> None:
    config = world.model.spec.backbone  # 5 layers: four of them, from 1 on, take a sample
    found = [deepstack.create(config, together=0, **{"interval": step}).together for step in (1, 2, 4)]
    assert found == [1, 2, 4]
    with pytest.raises(ConfigError, match="together -1 must be at least 0"):
        deepstack.create(config, together=-1)


class TorchSampler(torch.nn.Module):
    """The aggregator's layer, written from its description: concat, proj_in, attention over a window, norm, MLP."""

    def __init__(self, width: int, features: int, inner: int, heads: int, levels: int, keys: int):
        super().__init__()
        linear = lambda *sizes: torch.nn.Linear(*sizes, bias=False)  # noqa: E731
        self.heads = heads
        self.proj_context, self.proj_in = linear(features, inner), linear(width + inner, inner)
        self.norm_q, self.q = torch.nn.LayerNorm(inner), linear(inner, inner)
        for name in "kv":
            setattr(self, f"norm_{name}", torch.nn.ModuleList(torch.nn.LayerNorm(features) for _ in range(levels)))
            setattr(self, name, torch.nn.ModuleList(linear(features, inner) for _ in range(levels)))
        self.position = torch.nn.ParameterList(torch.randn(keys, features) for _ in range(levels))
        self.o, self.norm = linear(inner, inner), torch.nn.LayerNorm(inner)
        self.mlp = torch.nn.Sequential(linear(inner, inner), torch.nn.GELU(), linear(inner, width))

    def forward(self, x: Any, context: Any, windows: list[Any], mask: Any) -> Any:
        """x [n, D], context [n, C], windows [n, K, C] per level, mask [n, K] bool -> [n, D], the residual included."""
        query = self.proj_in(torch.cat([x, self.proj_context(context)], dim=-1))
        seen = [window + place for window, place in zip(windows, self.position, strict=True)]
        key = torch.cat([k(norm(w)) for k, norm, w in zip(self.k, self.norm_k, seen, strict=True)], dim=1)
        value = torch.cat([v(norm(w)) for v, norm, w in zip(self.v, self.norm_v, seen, strict=True)], dim=1)
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        allowed = (mask | ~mask.any(1, keepdim=True)).repeat(1, len(windows))[:, None, None]
        found = torch.nn.functional.scaled_dot_product_attention(
            split(self.q(self.norm_q(query))[:, None]), split(key), split(value), attn_mask=allowed
        )
        query = query + self.o(found.transpose(1, 2).flatten(2)[:, 0])
        return x + self.mlp(self.norm(query))


def torch_sampler(config: Any, params: Any) -> TorchSampler:
    """The torch layer with our parameters of one slot."""
    made = TorchSampler(
        config.width, config.tower_width, config.inner, config.heads, len(config.levels), config.keys
    ).eval()
    tensor = lambda leaf: torch.tensor(np.asarray(leaf))  # noqa: E731
    weights = {"proj_context": "context", "proj_in": "in", "q": "q", "o": "o", "mlp.0": "fc1", "mlp.2": "fc2"}
    norms = {"norm_q": "norm_q", "norm": "norm"}
    for level in range(len(config.levels)):
        weights |= {f"{name}.{level}": f"{name}_{level}" for name in "kv"}
        norms |= {f"norm_{name}.{level}": f"norm_{name}_{level}" for name in "kv"}
    state = {f"{theirs}.weight": tensor(params[ours]["kernel"]).T for theirs, ours in weights.items()}
    for theirs, ours in norms.items():
        state |= {f"{theirs}.weight": tensor(params[ours]["scale"]), f"{theirs}.bias": tensor(params[ours]["bias"])}
    state |= {f"position.{level}": tensor(params[f"position_{level}"]) for level in range(len(config.levels))}
    made.load_state_dict(state)
    return made


def test_check_26_the_sampler_equals_torch_on_random_weights() -> None:
    rng = np.random.default_rng(0)
    config = dataclasses.replace(
        sva.create(dataclasses.replace(QWEN, text=dataclasses.replace(QWEN.text, width=24)), inner=32, heads=16),
        levels=(1, 2, 3),
        tower_width=20,
    )
    params = random_like(jax.eval_shape(lambda: sva.init(jax.random.key(0), config)), 1)["blocks"]
    params = jax.tree.map(lambda leaf: leaf[0], params)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    x, context, regions = draw(2, 5, 24), draw(2, 3, 20), tuple(3 * draw(2, 5, 4, 20) for _ in range(3))
    own, mask = rng.integers(0, 3, (2, 5)).astype(np.int32), rng.random((2, 5, 4)) < 0.6
    mask[0, 1] = False  # a window without any patch is seen whole
    found = np.asarray(jax.jit(sva.Sampler(config).apply)({"params": params}, x, context, own, regions, mask)) + x
    theirs = torch_sampler(config, params)
    with torch.no_grad():
        for row in range(2):
            windows = [torch.tensor(region[row]) for region in regions]
            wanted = theirs(
                torch.tensor(x[row]), torch.tensor(context[row, own[row]]), windows, torch.tensor(mask[row])
            )
            np.testing.assert_allclose(found[row], wanted.numpy(), atol=1e-5, rtol=0)
    assert np.abs(found - x).max() > 0.5


def layer_norm(x: torch.Tensor, scale: Any, bias: Any) -> torch.Tensor:
    """LayerNorm with our parameters."""
    return torch.nn.functional.layer_norm(
        x, x.shape[-1:], torch.tensor(np.asarray(scale)), torch.tensor(np.asarray(bias)), 1e-5
    )


@pytest.mark.parametrize("row", [0, 1])
def test_the_aggregator_inside_the_decoder_equals_torch(world: b.World, attached: Any, row: int) -> None:
    model = attached["sva"]
    (config,), params = model.spec.memories, model.memory["sva"]
    norm, states = params["norm"], b.tower(world, row)
    levels = [layer_norm(states[at], norm["scale"][i], norm["bias"][i]) for i, at in enumerate(config.levels)]
    tiles = len(states[0])
    inside = torch.tensor(np.asarray(world.batch.patch_segments[row]).reshape(tiles, 16) > 0)
    mean = torch.stack(levels).mean(0)
    used = inside.any(1)  # the others pad the batch
    context = torch.stack([mean[t][inside[t]].mean(0) if used[t] else 0 * mean[t][0] for t in range(tiles)])
    windows = [b.cells(level).flatten(0, 1) for level in levels]
    mask = b.cells(inside[..., None].float()).flatten(0, 1)[..., 0] > 0
    places, own = shown(world, row)
    assert row == 1 or not inside[used].all()  # the wide picture has bars above and below
    assert row == 1 or 0 < mask[own].sum() < mask[own].numel()

    def sampling(slot: int) -> Any:
        theirs = torch_sampler(config, jax.tree.map(lambda leaf: leaf[slot], params["blocks"]))

        def change(x: Any) -> Any:
            asked = theirs(x[0, places], context[own // 4], [window[own] for window in windows], mask[own])
            return x.index_copy(1, places, asked[None])

        return change

    hooks = {layer: sampling(slot) for slot, layer in enumerate(config.layers)}
    run = lambda: b.decode(world, b.embedded(world, row))  # noqa: E731
    wanted = with_hooks(world.theirs.model.language_model.layers, hooks, run, before=False)
    found = np.asarray(model.logits(world.batch))[row, : len(wanted)]
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


def test_a_gate_at_zero_is_the_backbone_and_an_open_one_the_published_form(world: b.World, attached: Any) -> None:
    model, real = world.model.attach("sva", gate=0.0, **SVA), valid(world)
    assert model.memory["sva"]["blocks"]["gate"].tolist() == [0, 0, 0]

    def logits(gate: float) -> np.ndarray:
        params = attached["sva"].memory["sva"]
        blocks = {**params["blocks"], "gate": np.full(3, gate, np.float32)}
        return np.asarray(dataclasses.replace(model, memory={"sva": params | {"blocks": blocks}}).logits(world.batch))

    np.testing.assert_allclose(logits(0.0)[real], world.logits[real], atol=1e-6, rtol=0)
    published = np.asarray(attached["sva"].logits(world.batch))
    np.testing.assert_allclose(logits(20.0)[real], published[real], atol=1e-5, rtol=0)
    fresh = world.model.attach("sva", **SVA).memory["sva"]["blocks"]
    assert "gate" not in fresh and 0.9 < float(np.std(fresh["position_0"])) < 1.1
    assert np.abs(published - world.logits)[real].max() > 1


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(32, range(0, 30, 3)), (40, range(0, 40, 4)), (28, range(0, 28, 3)), (24, range(0, 20, 2)), (4, range(4))],
)
def test_default_layers_are_ten_samplers_three_apart_at_32(world: b.World, depth: int, layers: Any) -> None:
    config = world.model.spec.backbone
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, layers=depth))
    made = sva.create(config)
    assert made.layers == tuple(layers)
    assert (made.inner, made.heads, made.gate, made.levels) == (1024, 16, None, (2, 3, 4))


def test_sva_says_what_it_cannot_do(world: b.World) -> None:
    config = world.model.spec.backbone
    scaled = dataclasses.replace(config, vision=dataclasses.replace(config.vision, aspect="anyres_max_9"))
    resampler = dataclasses.replace(config.vision.projector, name="resampler", ratio=1, kind="perceiver")
    for backbone, settings, message in (
        (config, {"layers": (0, 6)}, r"layers \(0, 6\) must be different and within 0..4"),
        (config, {"levels": (2, 2)}, "must name different hidden states"),
        (config, {"levels": (9,)}, "9"),
        (config, {"inner": 30, "heads": 4}, "inner 30 is not a multiple of 4 heads"),
        (config, {"halo": 1}, "no setting halo"),
        (scaled, {}, "'anyres_max_9' scales grids"),
        (dataclasses.replace(config, vision=dataclasses.replace(config.vision, projector=resampler)), {}, "no grid"),
    ):
        with pytest.raises(ConfigError, match=message):
            sva.create(backbone, **settings)


def test_the_aggregator_works_on_the_qwen_family() -> None:
    """Every row's mean is that of its own frame, and its window its own four patches."""
    config = sva.create(QWEN, inner=32, heads=4, layers=(1,), levels=(1, 3))
    rng = np.random.default_rng(2)
    segments = np.array([[1] * 8 + [2] * 4 + [0] * 4], np.int32)
    levels = [rng.standard_normal((1, 16, 32)).astype(np.float32) for _ in range(2)]
    batch = qwen_batch(segments)
    mean, own = sva.means(config, levels, batch, 4)
    both = (levels[0] + levels[1]) / 2
    np.testing.assert_array_equal(np.asarray(own), [[0, 0, 1, 0]])
    np.testing.assert_allclose(np.asarray(mean)[0, 0], both[0, :8].mean(0), atol=1e-6)
    np.testing.assert_allclose(np.asarray(mean)[0, 1], both[0, 8:12].mean(0), atol=1e-6)
    assert qwen3_vl.cells(QWEN) == config.cells and config.tile_patches == 0
    assert Spec(QWEN, (config,)).levels == (1, 3)


def qwen_batch(segments: np.ndarray) -> Any:
    """A batch of which only the patches' frames are read."""
    from jaxmem.backbones.batch import text_batch

    return dataclasses.replace(text_batch(np.zeros((1, 4), np.int32)), patch_segments=segments)


@pytest.mark.parametrize("name", ["deepstack", "sva", "fastv"])
def test_saved_and_restored_they_are_the_same(world: b.World, attached: Any, tmp_path: Any, name: str) -> None:
    model = attached[name] if name in attached else world.model.attach("fastv", keep=3)
    model.save(tmp_path)
    found = world.model.restore(tmp_path)
    assert found.spec == model.spec
    jax.tree.map(np.testing.assert_array_equal, found.memory, model.memory)
    absent = dataclasses.replace(found, memory={}) if name != "sva" else found  # as after training, without leaves
    np.testing.assert_array_equal(np.asarray(absent.logits(world.batch)), np.asarray(model.logits(world.batch)))
