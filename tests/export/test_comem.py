"""CoMEM as an exported folder: transformers' Auto classes load it, write items as jaxmem does, and say what it says."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxmem
from jaxmem.checkpoints import comem_names
from jaxmem.data import knowledge
from jaxmem.errors import ConfigError
from jaxmem.export import hf
from jaxmem.memory import comem
from jaxmem.spec import Spec
from tests.backbones.prompts import picture, text, user
from tests.memory import comem_world as w

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = w.SMALL | {"alpha": 2.0}
ROWS = ((0,), (), (1, 2, 3))
"""Items of each question."""
NEW = 20


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model of ours; the same as torch loads it from the exported folder; torch's bare backbone; a processor."""

    ours: jaxmem.Model
    theirs: Any
    plain: Any
    processor: Any

    def inputs(self, questions: Any = w.QUESTIONS) -> dict[str, Any]:
        """What torch takes for our prompts, padded on the left."""
        rows = [self.ours.processor.encode(question, add_generation_prompt=True) for question in questions]
        most = max(map(len, rows))
        ids = [[0] * (most - len(row)) + row.tokens.tolist() for row in rows]
        mask = [[0] * (most - len(row)) + [1] * len(row) for row in rows]
        found = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        found["mm_token_type_ids"] = (found["input_ids"] == self.ours.spec.backbone.image_token).int()
        grids = [(1, 2 * down, 2 * across) for row in rows for down, across in row.images]
        if grids:
            found["pixel_values"] = torch.tensor(np.concatenate([row.patches for row in rows if row.images]))
            found["image_grid_thw"] = torch.tensor(grids)
        return found

    def known(self, vectors: Any, rows: Any = ROWS) -> dict[str, Any]:
        """`memory` and `memory_mask` of some rows' items."""
        picked = [at for row in rows for at in row]
        return self.theirs.memory_rows(torch.tensor(np.asarray(vectors))[picked], list(map(len, rows)))

    def batch(self, vectors: Any, rows: Any = ROWS, questions: Any = w.QUESTIONS) -> Any:
        """The same rows for us."""
        items = None if vectors is None else [np.asarray(vectors)[list(row)] for row in rows]
        return self.ours.batch(questions, items=items, buckets=w.BUCKETS, padding="left")


def lively(bare: jaxmem.Model, **settings: Any) -> jaxmem.Model:
    """The model with a CoMEM whose parameters are all random and matter; drawn without compiling an `init`."""
    config = comem.create(bare.spec.backbone, **(SMALL | settings))
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> Any:
        name, noise = jax.tree_util.keystr(path), rng.standard_normal(leaf.shape).astype(np.float32)
        shift, size = (
            1.0 * ("scale" in name),
            0.3 if "lora_b" in name or len(leaf.shape) == 1 else leaf.shape[-2] ** -0.5,
        )
        return jnp.asarray(shift + noise * (leaf.shape[-1] ** -0.5 if "latents" in name else size))

    shapes = jax.eval_shape(lambda: comem.init(jax.random.key(0), config))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return dataclasses.replace(bare, spec=Spec(bare.spec.backbone, (config,)), memory={"comem": params})


def exported(family: str, folder: Any, **settings: Any) -> Pair:
    """Random weights everywhere, written and read again."""
    words, write = w.WRITERS[family]
    words(folder / "base")
    plain = write(folder / "base", seed=5)
    ours = lively(jaxmem.load(folder / "base"), **settings)
    (folder / "out").mkdir()
    hf.write(ours, folder / "out")
    load = transformers.AutoModelForImageTextToText.from_pretrained
    theirs, found = load(folder / "out", trust_remote_code=True, output_loading_info=True, dtype=torch.float32)
    assert not any(found[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    reader = transformers.AutoImageProcessor.from_pretrained(folder / "base", backend="pil")
    return Pair(ours, theirs.eval(), plain, SimpleNamespace(tokenizer=tokenizer, image_processor=reader))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    return functools.cache(lambda family: exported(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(params=w.FAMILIES)
def pair(request: pytest.FixtureRequest, pairs: Callable[[str], Pair]) -> Pair:
    return pairs(request.param)


@pytest.fixture
def qwen3(pairs: Callable[[str], Pair]) -> Pair:
    return pairs("qwen3_vl")


def pil(item: dict[str, Any]) -> dict[str, Any]:
    """An item as users of torch have it."""
    pixels = item.get("images") or [item[key] for key in ("image",) if key in item]
    return {"text": item["text"], "images": [Image.fromarray(one) for one in pixels]}


def encoded(pair: Pair, items: Any = w.ITEMS) -> np.ndarray:
    """Vectors [N, M, D] of items as torch reads them."""
    with torch.no_grad():
        return pair.theirs.encode_items(**pair.theirs.prepare_items(pair.processor, map(pil, items))).numpy()


def our_vectors(pair: Pair, items: Any = w.ITEMS) -> np.ndarray:
    return pair.ours.encode_items(items, batch=len(items), buckets=w.BUCKETS)


def torch_logits(model: Any, inputs: dict[str, Any]) -> np.ndarray:
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def generate(model: Any, pair: Pair, inputs: dict[str, Any], **options: Any) -> np.ndarray:
    """NEW tokens of every row; media tokens are banned, as in ours."""
    count = options.pop("count", NEW)
    fixed = {"max_new_tokens": count, "min_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    banned = list(pair.ours.spec.backbone.media_tokens)
    out = model.generate(**inputs, **fixed, **({"do_sample": False} | options), suppress_tokens=banned)
    return out[:, inputs["input_ids"].shape[1] :].numpy()


def behind(batch: Any, tokens: np.ndarray) -> Any:
    """The left-padded batch with tokens [B, N] behind each prompt."""
    count, last = tokens.shape[1], jax.tree.map(np.asarray, batch)
    grown = lambda x, value: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)], constant_values=value)  # noqa: E731
    after = last.positions.max((1, 2))[:, None, None] + 1 + np.arange(count)
    fields = {"segments": 1, "loss_mask": 0, "visual_rows": -1}
    fields |= {} if last.prefix_rows is None else {"prefix_rows": -1}
    return dataclasses.replace(
        last,
        tokens=np.concatenate([last.tokens, tokens], 1),
        positions=np.concatenate([last.positions, np.broadcast_to(after, (len(tokens), 3, count))], 2),
        **{name: grown(getattr(last, name), value) for name, value in fields.items()},
    )


def assert_same(pair: Pair, ours: jaxmem.Model, batch: Any, inputs: dict[str, Any]) -> float:
    """Logits of a left-padded batch, and greedy answers: to us, theirs are the most likely next tokens.

    Returns the largest difference of logits.
    """
    answers = generate(pair.theirs, pair, inputs)
    theirs, count = torch_logits(pair.theirs, inputs), np.asarray(inputs["attention_mask"]).sum(1)
    found = np.array(ours.logits(jax.tree.map(jnp.asarray, behind(batch, answers))))
    assert np.abs(theirs).max() > 1
    length = batch.tokens.shape[1]
    worst = 0.0
    for row, n in enumerate(count):
        one, two = found[row, length - n : length], theirs[row, -n:]
        np.testing.assert_allclose(one, two, atol=1e-4, rtol=0)
        worst = max(worst, float(np.abs(one - two).max()))
    found[..., list(ours.spec.backbone.media_tokens)] = -np.inf
    np.testing.assert_array_equal(found[:, length - 1 : -1].argmax(-1), answers)
    return worst


def test_items_are_written_and_encoded_as_ours(pair: Pair) -> None:
    rows = [knowledge.encode_item(pair.ours.processor, pair.ours.spec.comem, item) for item in w.ITEMS]
    found = pair.theirs.prepare_items(pair.processor, map(pil, w.ITEMS))
    for row, ids, mask in zip(rows, found["input_ids"], found["attention_mask"], strict=True):
        np.testing.assert_array_equal(ids[mask.bool()].numpy(), row.tokens)
        assert not mask[: len(mask) - len(row)].any()
    np.testing.assert_array_equal(found["pixel_values"].numpy(), np.concatenate([row.patches for row in rows]))
    theirs, ours = encoded(pair), our_vectors(pair)
    assert np.abs(theirs - theirs.mean(0)).max() > 0.5  # items differ
    np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=0)


def test_rows_with_none_one_and_three_items_and_twenty_greedy_tokens_equal_ours(pair: Pair) -> None:
    vectors, inputs = encoded(pair), pair.inputs()
    known = pair.known(vectors)
    assert known["memory_mask"].sum(1).tolist() == [3, 0, 9]
    assert_same(pair, pair.ours, pair.batch(vectors), inputs | known)
    with_items, bare = (torch_logits(pair.theirs, inputs | more) for more in (known, {}))
    changed = np.abs(with_items - bare)[:, -1].max(-1)
    assert changed[0] > 0.1 and changed[2] > 0.1
    np.testing.assert_allclose(with_items[1, -20:], bare[1, -20:], atol=1e-5)  # no items, beside rows with some


def test_without_memory_the_model_is_the_backbone_to_the_bit(pair: Pair) -> None:
    vectors, inputs = encoded(pair), pair.inputs()
    wanted, answers = torch_logits(pair.plain, inputs), generate(pair.plain, pair, inputs)
    np.testing.assert_array_equal(torch_logits(pair.theirs, inputs), wanted)  # after items were encoded
    none = pair.known(vectors, ((), (), ()))
    assert none["memory"].shape == (3, 0, 64)
    np.testing.assert_array_equal(torch_logits(pair.theirs, inputs | none), wanted)
    np.testing.assert_array_equal(generate(pair.theirs, pair, inputs | none), answers)
    pair.theirs.use_memory = False
    try:
        np.testing.assert_array_equal(torch_logits(pair.theirs, inputs | pair.known(vectors)), wanted)
        np.testing.assert_array_equal(generate(pair.theirs, pair, inputs | pair.known(vectors)), answers)
        assert_same(pair, pair.ours.without_memory(), pair.batch(None), inputs)
    finally:
        pair.theirs.use_memory = True


def test_import_gives_every_tensor_back(pair: Pair) -> None:
    back = jaxmem.load(pair.ours.folder.parent / "out")
    assert back.spec == pair.ours.spec
    jax.tree.map(np.testing.assert_array_equal, (back.base, back.memory), (pair.ours.base, pair.ours.memory))


def test_our_own_decoding_gives_the_same_answers(qwen3: Pair) -> None:
    vectors = encoded(qwen3)
    known = [vectors[list(row)] for row in ROWS]
    answers = qwen3.ours.generate(w.QUESTIONS, items=known, buckets=w.BUCKETS, max_new_tokens=NEW, stop_tokens=())
    theirs = generate(qwen3.theirs, qwen3, qwen3.inputs() | qwen3.known(vectors))
    np.testing.assert_array_equal([answer.tokens for answer in answers], theirs)


def test_one_call_from_items_to_memory(qwen3: Pair) -> None:
    known = qwen3.theirs.memory_of(qwen3.processor, [[pil(w.ITEMS[at]) for at in row] for row in ROWS])
    wanted = qwen3.known(encoded(qwen3))
    np.testing.assert_array_equal(known["memory_mask"], wanted["memory_mask"])
    valid = wanted["memory_mask"].bool()
    np.testing.assert_allclose(known["memory"][valid], wanted["memory"][valid], atol=1e-5)
    assert qwen3.theirs.memory_of(qwen3.processor, [[], []]) == {}


def test_beams_and_several_answers_share_a_prompts_items(qwen3: Pair) -> None:
    vectors, inputs = encoded(qwen3), qwen3.inputs()
    inputs |= qwen3.known(vectors)
    greedy = generate(qwen3.theirs, qwen3, inputs, count=6)
    several = generate(qwen3.theirs, qwen3, inputs, count=6, do_sample=True, top_k=1, num_return_sequences=2)
    np.testing.assert_array_equal(several, np.repeat(greedy, 2, axis=0))
    beams = generate(qwen3.theirs, qwen3, inputs, count=6, num_beams=3)
    np.testing.assert_array_equal(beams, generate(qwen3.theirs, qwen3, inputs, count=6, num_beams=3, use_cache=False))
    assert (beams != greedy).any()


def cached(pair: Pair, cache: Any, inputs: dict[str, Any]) -> Any:
    """A call's result; what the cache is called depends on the release of transformers."""
    name = "cache" if "cache" in inspect.signature(type(pair.plain).forward).parameters else "past_key_values"
    with torch.no_grad():
        out = pair.theirs(**inputs, **{name: cache}, use_cache=True)
    return out, out[name]


@pytest.mark.parametrize("padded", [True, False])
def test_token_by_token_a_cache_gives_the_logits_of_a_whole_row(qwen3: Pair, padded: bool) -> None:
    inputs = qwen3.inputs(w.QUESTIONS if padded else w.QUESTIONS[:1])
    rows, length = ROWS if padded else ROWS[:1], inputs["input_ids"].shape[1]
    known = qwen3.known(encoded(qwen3), rows)
    more = torch.tensor([[5, 6, 7]] * len(rows))
    grown = lambda mask: torch.cat([mask, torch.ones_like(more)], 1)  # noqa: E731
    whole = {"input_ids": torch.cat([inputs["input_ids"], more], 1), "attention_mask": grown(inputs["attention_mask"])}
    kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], 1)
    wanted = torch_logits(qwen3.theirs, inputs | known | whole | {"mm_token_type_ids": kinds})[:, length - 1 :]
    out, cache = cached(qwen3, None, inputs | known | ({} if padded else {"attention_mask": None}))
    found = [out.logits[:, -1]]
    for at in range(more.shape[1]):
        mask = whole["attention_mask"][:, : length + at + 1] if padded else None
        later = {"input_ids": more[:, at : at + 1], "attention_mask": mask}
        out, cache = cached(qwen3, cache, later | known)
        found.append(out.logits[:, -1])
    np.testing.assert_allclose(torch.stack(found, 1).numpy(), wanted, atol=1e-5)


def test_a_second_turn_goes_on_with_the_cache_of_the_first(qwen3: Pair) -> None:
    inputs = qwen3.inputs(w.QUESTIONS[:1])
    known = qwen3.known(encoded(qwen3), ROWS[:1])
    whole = generate(qwen3.theirs, qwen3, inputs | known, count=8)
    fixed = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "return_dict_in_generate": True}
    fixed |= {"suppress_tokens": list(qwen3.ours.spec.backbone.media_tokens)}
    first = qwen3.theirs.generate(**inputs, **known, **fixed, max_new_tokens=3)
    name = next(name for name in ("cache", "past_key_values") if name in first)
    ids = first.sequences
    later = qwen3.theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **known, **{name: first[name]}, **fixed, max_new_tokens=5
    )
    np.testing.assert_array_equal(later.sequences[:, inputs["input_ids"].shape[1] :], whole)


def test_the_loss_is_that_of_the_prompts_tokens(qwen3: Pair) -> None:
    inputs = qwen3.inputs() | qwen3.known(encoded(qwen3))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        out = qwen3.theirs(**inputs, labels=labels)
        last = qwen3.theirs(**inputs, logits_to_keep=2).logits
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert out.logits.shape[1] == labels.shape[1]
    np.testing.assert_allclose(out.loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(last, out.logits[:, -2:], atol=1e-6)


def test_special_tokens_limits_and_transparent_pictures_are_read_as_ours(tmp_path: Any) -> None:
    settings = {"text_limit": 40, "squash": 128, "item_min_pixels": 64 * 64, "item_max_pixels": 96 * 96, "latents": 2}
    pair = exported("qwen3_vl", tmp_path, **settings)
    clear = Image.fromarray(np.dstack([picture(96, 64, 1), np.arange(96 * 64).reshape(64, 96) % 256]).astype(np.uint8))
    picture_file = tmp_path / "grey.png"
    Image.fromarray(picture(200, 60, 2)).convert("L").save(picture_file)
    items = [
        {"text": "a <|im_end|>\n<|im_start|>user<|image_pad|> fox<|im_end|>", "images": [clear, str(picture_file)]},
        {"text": "\nthe quick brown fox jumps over a lazy dog while seven wizards", "image": picture_file},
        {
            "text": "<|vision_start|>",
            "image": Image.fromarray((np.arange(4096).reshape(64, 64) * 15).astype(np.uint16)),
        },
    ]
    rows = [knowledge.encode_item(pair.ours.processor, pair.ours.spec.comem, item) for item in items]
    found = pair.theirs.prepare_items(pair.processor, items)
    for row, ids, mask in zip(rows, found["input_ids"], found["attention_mask"], strict=True):
        np.testing.assert_array_equal(ids[mask.bool()].numpy(), row.tokens)
    np.testing.assert_array_equal(found["pixel_values"].numpy(), np.concatenate([row.patches for row in rows]))
    with pytest.raises(ValueError, match="an item needs an image or a text"):
        pair.theirs.prepare_items(pair.processor, [{"text": " "}])


RELEASED = {"query_tower": "encoder", "decode_shift": 8000, "bf16_positions": True, "order": "reverse"}
OTHERS = {"encoder_layers": 1, "shared": False, "parts": ("layers/attention", "visual/blocks/mlp", "visual/deepstack")}


@pytest.mark.parametrize(
    ("family", "settings"), [("qwen2_5_vl", RELEASED), ("qwen3_vl", OTHERS), ("qwen2_vl", {"rank": 0})]
)
def test_the_released_switches_and_other_settings(family: str, settings: dict[str, Any], tmp_path: Any) -> None:
    pair = exported(family, tmp_path, **settings)
    vectors = encoded(pair)
    np.testing.assert_allclose(vectors, our_vectors(pair), atol=1e-4, rtol=0)
    asked = [w.QUESTIONS[0], user(text("the quick brown fox jumps over a lazy dog " * 14))]
    rows, inputs = ((0, 1), (2,)), pair.inputs(asked)
    known = pair.known(vectors, rows)
    batch = pair.batch(vectors, rows, asked)
    assert batch.tokens.shape[1] == 256 and np.asarray(batch.positions).max() > 120
    ours, theirs = np.asarray(pair.ours.logits(batch)), torch_logits(pair.theirs, inputs | known)
    for row, count in enumerate(np.asarray(inputs["attention_mask"]).sum(1)):
        np.testing.assert_allclose(ours[row, -count:], theirs[row, -count:], atol=1e-4, rtol=0)
    if settings is RELEASED:
        items = [vectors[list(row)] for row in rows]
        answers = pair.ours.generate(asked, items=items, buckets=w.BUCKETS, max_new_tokens=8, stop_tokens=())
        np.testing.assert_array_equal(
            [answer.tokens for answer in answers], generate(pair.theirs, pair, inputs | known, count=8)
        )
        bare = copy.copy(pair.theirs)
        bare._comem = SimpleNamespace(**(vars(pair.theirs._comem) | {"query_tower": "frozen", "bf16_positions": False}))
        assert np.abs(torch_logits(bare, inputs | known) - theirs)[0, -1].max() > 1e-2  # the switches act


def test_encoding_leaves_the_backbone_as_it_was(qwen3: Pair) -> None:
    model, layers = qwen3.theirs, qwen3.theirs.model.language_model.layers
    hooks = lambda: sum(len(module._forward_hooks) for module in model.modules())  # noqa: E731
    before = hooks()
    with pytest.raises(Exception, match=".*"):
        model.encode_items(torch.tensor([[500]]), pixel_values=torch.zeros(3, 5))
    assert hooks() == before and model.model.language_model.layers is layers
    inputs = qwen3.inputs()
    np.testing.assert_array_equal(torch_logits(model, inputs), torch_logits(qwen3.plain, inputs))


def test_what_memory_does_not_go_with_is_refused(qwen3: Pair) -> None:
    inputs = qwen3.inputs(w.QUESTIONS[1:2])
    known = qwen3.known(encoded(qwen3), ((0,),))
    with pytest.raises(ValueError, match="leave out cache_implementation='static'"):
        generate(qwen3.theirs, qwen3, inputs | known, count=2, cache_implementation="static")
    embeds = qwen3.theirs.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds alone"):
        qwen3.theirs(inputs_embeds=embeds, **known)
    with pytest.raises(ValueError, match=r"memory of 1 prompts is \[1, S, 64\], not \[2, 3, 64\]"):
        qwen3.theirs(**inputs, memory=known["memory"].repeat(2, 1, 1))


def test_an_encoder_beside_the_model_is_refused(qwen3: Pair) -> None:
    config, backbone = qwen3.ours.spec.comem, qwen3.ours.spec.backbone
    comem_names.check_exportable(config, backbone)
    beside = comem.create(backbone, encoder=backbone, **SMALL)
    with pytest.raises(ConfigError, match=r"qwen3_vl reads the items beside .* export --to=original writes"):
        comem_names.check_exportable(beside)
    other = dataclasses.replace(backbone, model_type="llava_next")
    with pytest.raises(ConfigError, match="reads items on qwen2_vl, qwen2_5_vl, qwen3_vl, not on llava_next"):
        comem_names.check_exportable(config, other)
