"""Acceptance checks 11 to 14 of CoMEM: what the encoder reads, and that an item's embeddings depend on it alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmem.data import knowledge
from jaxmem.data.batching import collate
from jaxmem.errors import ConfigError, DataError
from jaxmem.memory import comem, item_encoder
from jaxmem.retrieval.encoder import ItemEncoder
from tests.backbones.prompts import picture, torch_inputs
from tests.helpers import write_qwen2_tokenizer
from tests.memory import comem_world as w

TOLERANCE = {"rtol": 0, "atol": 1e-5}
read = jax.jit(item_encoder.read, static_argnums=0)
encode = jax.jit(comem.encode, static_argnums=(0, 1))


@pytest.mark.parametrize("family", w.FAMILIES)
def test_check_11_a_fresh_encoder_is_the_backbone(family):
    """Against transformers: last hidden states after the final norm, and in bfloat16 the most likely tokens."""
    ours, theirs = w.pair(family)
    ours = ours.attach("comem", **w.SMALL)
    items = [knowledge.encode_item(ours.processor, ours.spec.comem, item) for item in w.ITEMS]
    batch = collate(items, w.BUCKETS.of_items, ours.processor.pad_token)
    weights = comem.weights(ours.spec.comem, ours.base, ours.memory["comem"])
    found = np.asarray(read(ours.spec.backbone, weights, batch))
    for row, item in enumerate(items):
        with torch.no_grad():
            wanted = theirs.model(**torch_inputs("item", item)).last_hidden_state[0]
        np.testing.assert_allclose(found[row, : len(item)], wanted.numpy(), rtol=0, atol=1e-4)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ours.base)
    weights = comem.weights(ours.spec.comem, half, ours.memory["comem"])
    valid = np.asarray(batch.segments) > 0
    states = read(ours.spec.backbone, weights, batch)[valid]
    bare = read(ours.spec.backbone, half, batch)[valid]
    head = half["embed"] if ours.spec.backbone.text.tied else half["head"]
    np.testing.assert_array_equal((states @ head.T).argmax(-1), (bare @ head.T).argmax(-1))


def test_factors_change_every_part_of_the_encoder():
    """Factors of one part alone change the embeddings, whichever part it is."""
    model = w.model()
    whole, config = model.memory["comem"], model.spec.comem
    batch = collate([knowledge.encode_item(model.processor, config, w.ITEMS[0])], w.BUCKETS.of_items)
    run = lambda params: np.asarray(encode(config, model.spec.backbone, model.base, params, batch))  # noqa: E731
    zero = jax.tree.map(jnp.zeros_like, whole["encoder"])
    bare = run({**whole, "encoder": zero})
    for one in [p for p, _ in config.kernels]:
        alone = jax.tree_util.tree_map_with_path(
            lambda path, leaf, wanted=one: (
                leaf if wanted in jax.tree_util.keystr(path, simple=True, separator="/") else jnp.zeros_like(leaf)
            ),
            whole["encoder"],
        )
        assert np.abs(run({**whole, "encoder": alone}) - bare).max() > 1e-4, one


def test_factors_equal_merged_weights():
    """y = x W + alpha / rank (x a) b, for all kernels at once, against weights that were added up."""
    model = w.model("qwen2_5_vl", alpha=1.0)
    config, params = model.spec.comem, model.memory["comem"]
    batch = collate([knowledge.encode_item(model.processor, config, item) for item in w.ITEMS], w.BUCKETS.of_items)
    weights = comem.weights(config, model.base, params)

    def merged(node):
        if not isinstance(node, dict):
            return node
        if "lora_a" in node:
            update = 0.5 * np.asarray(node["lora_a"], np.float64) @ np.asarray(node["lora_b"], np.float64)
            kernel = np.asarray(node["kernel"], np.float64) + update
            return {"kernel": jnp.asarray(kernel, jnp.float32)} | ({"bias": node["bias"]} if "bias" in node else {})
        return {name: merged(child) for name, child in node.items()}

    states = lambda tree: np.asarray(read(model.spec.backbone, tree, batch))  # noqa: E731
    valid = np.asarray(batch.segments) > 0
    assert config.alpha / config.rank == 0.5
    np.testing.assert_allclose(
        states(weights)[valid], states(merged(weights))[valid], rtol=0, atol=3e-3
    )  # fp32 rounding of updates that are larger than the kernels
    assert np.abs(states(weights)[valid] - states(model.base)[valid]).max() > 0.1


def test_a_policy_with_lora_of_its_own_does_not_change_the_encoder():
    model = w.model()
    adapted = model.attach_lora(rank=2)
    noise = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.3 if "lora_b" in jax.tree_util.keystr(path) else leaf, adapted.base
    )
    adapted = dataclasses.replace(adapted, base=noise)
    np.testing.assert_array_equal(adapted.encode_items(w.ITEMS), model.encode_items(w.ITEMS))


def test_check_12_the_template_token_by_token(tmp_path):
    """The published format, spelt out: no system turn, image, suffix, text; 512 x 512 pixels are 324 tokens."""
    ids = write_qwen2_tokenizer(tmp_path, max_pixels=512 * 512)
    from jaxmem.data.loading import load_processor

    model = w.pair("qwen2_5_vl")[0]
    processor = load_processor(tmp_path, model.spec.backbone)
    config = comem.create(model.spec.backbone)
    item = knowledge.encode_item(processor, config, {"text": "animals in streets", "image": picture(512, 512, 1)})
    words = lambda text: processor.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    start, end, pad = ids["<|im_start|>"], ids["<|im_end|>"], ids["<|image_pad|>"]
    vision = [ids["<|vision_start|>"], *[pad] * 324, ids["<|vision_end|>"]]
    suffix = words(" Similar image and text knowledge for reference")
    text = words("animals in streets")
    user = [start, *words("user\n"), *vision, *suffix, end, *words("\n")]
    wanted = [*user, start, *words("assistant\n"), *text, end, *words("\n")]
    assert item.tokens.tolist() == wanted
    assert len(item.patches) == 36 * 36 and item.images == ((18, 18),)
    assert item.positions[:, -1].tolist() == [len(wanted) - 324 + 18 - 1] * 3  # the image spans 18 positions
    assert not item.loss_mask.any()


def test_images_are_squashed_and_limited():
    model = w.model("qwen2_5_vl")
    config = dataclasses.replace(model.spec.comem, squash=112)
    wide = {"image": picture(224, 56, 1)}
    read = lambda config: knowledge.encode_item(model.processor, config, wide).images  # noqa: E731
    assert read(config) == ((4, 4),) and read(dataclasses.replace(config, squash=0)) == ((2, 8),)
    assert read(dataclasses.replace(config, squash=0, item_max_pixels=4 * 28 * 28)) == ((1, 4),)


def test_check_13_an_item_changes_its_own_vectors_alone():
    """Within M and within a batch of any company and order; questions do not enter at all."""
    model = w.model()
    whole = model.encode_items(w.ITEMS)
    for place in range(len(w.ITEMS)):
        other = list(w.ITEMS)
        other[place] = {"text": "a brown fox", "image": picture(64, 64, 9)}
        found = model.encode_items(other)
        kept = np.arange(len(w.ITEMS)) != place
        np.testing.assert_allclose(found[kept], whole[kept], **TOLERANCE)
        assert np.abs(found[place] - whole[place]).max() > 0.05
        np.testing.assert_allclose(model.encode_items([w.ITEMS[place]], batch=1)[0], whole[place], **TOLERANCE)
    np.testing.assert_allclose(model.encode_items(w.ITEMS[::-1], batch=3)[::-1], whole, **TOLERANCE)
    batch = w.batch_of(model, w.QUESTIONS, [w.ITEMS, w.ITEMS[:1], w.ITEMS[1:]])
    rows = batch.vectors.reshape(3, -1, 3, batch.vectors.shape[-1])
    np.testing.assert_allclose(rows[0, :4], whole, **TOLERANCE)
    np.testing.assert_allclose(rows[2, :3], whole[1:], **TOLERANCE)


def test_check_14_long_texts_are_cut():
    model = w.model()
    long = "a fox " * 2000
    tokens = lambda text, **more: knowledge.encode_item(  # noqa: E731
        model.processor, dataclasses.replace(model.spec.comem, **more), {"text": text}
    ).tokens.tolist()
    assert tokens(long) == tokens(long[:5000]) != tokens(long[:4999])
    assert tokens(long, text_limit=5) == tokens("a fox")


def test_special_tokens_in_a_text_stay_text():
    model = w.model()
    item = knowledge.encode_item(model.processor, model.spec.comem, {"text": "<|im_end|><|image_pad|>"})
    assert (item.visual_rows < 0).all() and (item.tokens == model.spec.backbone.image_token).sum() == 0


def test_items_that_cannot_be_used_are_named(tmp_path):
    model = w.model()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(DataError, match=r"item 1 has neither an image nor a text"):
        model.encode_items([w.ITEMS[0], {"text": " "}])
    with pytest.raises(DataError, match=r"image 0 of item 0 .*broken.png"):
        model.encode_items([{"text": "a", "image": str(tmp_path / "broken.png")}])
    with pytest.raises(DataError, match=r"row 0 has \d+ tokens and the longest bucket is 64"):
        model.encode_items([{"text": "fox " * 200}], buckets=w.BUCKETS)
    with pytest.raises(ConfigError, match="no CoMEM"):
        w.pair("qwen3_vl")[0].encode_items(w.ITEMS)
    assert model.encode_items([]).shape == (0, 3, 64)


def test_check_39_one_program_per_bucket_whatever_the_number_of_items():
    encoder = ItemEncoder(w.model(), batch=4, buckets=w.BUCKETS)
    from jaxmem.retrieval import encoder as module

    encoder.encode(w.items(4))
    before = module._encode._cache_size()
    for count in (1, 3, 5, 8, 13):
        assert len(encoder.encode(w.items(count, seed=count))) == count
    assert module._encode._cache_size() <= before + 1  # text alone has no patches: at most one further program


def test_other_widths_get_a_linear_map():
    model = w.model(target_width=48)
    assert model.memory["comem"]["adapter"]["kernel"].shape == (64, 48)
    assert model.encode_items(w.ITEMS).shape == (4, 3, 48)
    with pytest.raises(ConfigError, match="vectors of width 48 .* of a model of width 64"):
        model.logits(w.batch_of(model, w.QUESTIONS[:1], [w.ITEMS[:1]]))


def test_fewer_layers_read_less():
    model = w.model(encoder_layers=1)
    assert model.encode_items(w.ITEMS).shape == (4, 3, 64)
    assert np.abs(model.encode_items(w.ITEMS) - w.model().encode_items(w.ITEMS)).max() > 0.05


def test_a_memory_comes_back_from_its_folder(tmp_path):
    model = w.model()
    model.save(tmp_path)
    again = w.pair("qwen3_vl")[0].restore(tmp_path)
    assert again.spec == model.spec
    np.testing.assert_array_equal(again.encode_items(w.ITEMS), model.encode_items(w.ITEMS))
    assert ItemEncoder(again).digest == ItemEncoder(model).digest != ItemEncoder(w.model(depth=3)).digest
    assert ItemEncoder(again).template != ItemEncoder(w.model(text_limit=9)).template
