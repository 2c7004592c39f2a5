"""PVM and its control as exported folders: transformers' Auto classes load them and say what jaxmem says."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxmem
from jaxmem.backbones import llava
from jaxmem.backbones.batch import visual_at
from jaxmem.data.batching import Buckets, collate
from jaxmem.export import hf
from tests.backbones.prompts import picture, text, user
from tests.helpers import write_qwen2_tokenizer, write_tokenizer
from tests.memory import world

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests import tiny  # noqa: E402
from tests.llava_folder import write_llava  # noqa: E402

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "llava_onevision")
PVM = {"layers": (0, 2), "latent": 32, "gate": 0.5}
NEW = 20
PICTURES = [picture(96, 64, 1), picture(64, 128, 2)], [], [picture(90, 24, 3)]


def chats(pictures: Any) -> list[Any]:
    """One chat per list of pictures, text in front of and between them; without any, text alone."""
    words = ("first", "then", "and")
    rows = []
    for row in pictures:
        parts = [part for word, one in zip(words, row, strict=False) for part in (text(word), _image(one))]
        rows.append(user(*parts, text("which street do they see?")))
    return rows


def _image(pixels: np.ndarray) -> dict[str, Any]:
    return {"type": "image", "image": pixels}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model of ours and the same as torch loads it from the folder that was exported."""

    family: str
    ours: jaxmem.Model
    theirs: Any
    plain: Any

    def batch(self, pictures: Any) -> tuple[Any, Any]:
        """Prompts, alone and as a batch that is padded on the left."""
        rows = [self.ours.processor.encode(chat, add_generation_prompt=True) for chat in chats(pictures)]
        buckets = Buckets((max(map(len, rows)),), (max(1, *(len(row.patches) for row in rows)),))
        return rows, collate(rows, buckets, self.ours.processor.pad_token, "left")

    def inputs(self, pictures: Any) -> dict[str, Any]:
        """What torch takes for these prompts: our tokens; our patches (Qwen), or transformers' own tiles (LLaVA)."""
        rows, batch = self.batch(pictures)
        inputs = {
            "input_ids": torch.tensor(np.asarray(batch.tokens), dtype=torch.long),
            "attention_mask": torch.tensor(np.asarray(batch.segments) > 0).long(),
        }
        if self.family.startswith("llava"):
            reader = transformers.AutoImageProcessor.from_pretrained(self.ours.folder, backend="pil")
            tiled = [[Image.fromarray(one) for one in row] for row in pictures if row]
            return inputs | (dict(reader(images=tiled, return_tensors="pt")) if tiled else {})
        inputs["mm_token_type_ids"] = torch.tensor(np.asarray(batch.is_visual), dtype=torch.int32)
        grids = [(1, 2 * down, 2 * across) for row in rows for down, across in row.images]
        if grids:
            inputs["pixel_values"] = torch.tensor(np.concatenate([row.patches for row in rows if row.images]))
            inputs["image_grid_thw"] = torch.tensor(grids)
        return inputs


def exported(family: str, memory: str, folder: Any, **settings: Any) -> Pair:
    """Random weights everywhere, gates open, written and read again."""
    if family.startswith("llava"):
        plain = write_llava(family.removeprefix("llava_"), folder / "base", seed=3, layers=2)
    else:
        (write_tokenizer if family == "qwen3_vl" else write_qwen2_tokenizer)(folder / "base")
        plain = getattr(tiny, f"write_{family}")(folder / "base", seed=5, layers=3)
    ours = jaxmem.load(folder / "base").attach(memory, **(PVM | settings))
    params = world.random_like(ours.memory[memory], seed=1) | {"gate_alpha": jnp.asarray([0.5, -0.7])}
    ours = dataclasses.replace(ours, memory={memory: params})
    (folder / "out").mkdir()
    hf.write(ours, folder / "out")
    load = transformers.AutoModelForImageTextToText.from_pretrained
    theirs, found = load(folder / "out", trust_remote_code=True, output_loading_info=True, dtype=torch.float32)
    odd = set().union(*(found[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")))
    assert not odd
    return Pair(family, ours, theirs.eval(), plain)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return exported(request.param, "pvm", tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return exported("qwen3_vl", "pvm", tmp_path_factory.mktemp("qwen3"))


def torch_logits(model: Any, inputs: dict[str, Any]) -> np.ndarray:
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def generate(model: Any, pair: Pair, inputs: dict[str, Any], **options: Any) -> np.ndarray:
    """NEW tokens of every row; media tokens are banned, as in ours."""
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    banned = list(pair.ours.spec.backbone.media_tokens)
    out = model.generate(**inputs, **fixed, **({"do_sample": False} | options), suppress_tokens=banned)
    return out[:, inputs["input_ids"].shape[1] :].numpy()


def behind(batch: Any, tokens: np.ndarray) -> Any:
    """The left-padded batch with tokens [B, N] behind each prompt."""
    count, last = tokens.shape[1], jax.tree.map(np.asarray, batch)
    grown = lambda x, value: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)], constant_values=value)  # noqa: E731
    after = last.positions.max((1, 2))[:, None, None] + 1 + np.arange(count)
    taps = {}
    if last.visual_taps is not None:
        taps = {"visual_taps": grown(last.visual_taps, 0), "visual_weights": grown(last.visual_weights, 0)}
    return dataclasses.replace(
        last,
        **taps,
        tokens=np.concatenate([last.tokens, tokens], 1),
        positions=np.concatenate([last.positions, np.broadcast_to(after, (len(tokens), 3, count))], 2),
        segments=grown(last.segments, 1),
        loss_mask=grown(last.loss_mask, 0),
        visual_rows=grown(last.visual_rows, -1),
    )


def our_logits(pair: Pair, batch: Any) -> np.ndarray:
    spec, base, memory = pair.ours.spec, pair.ours.base, pair.ours.memory
    states = world.quick_hidden(spec, base, memory, jax.tree.map(jnp.asarray, batch))
    return np.array(world.logits(spec, base, states))


def assert_same(pair: Pair, pictures: Any = PICTURES) -> None:
    """Logits of a left-padded batch, and greedy answers: ours to their answers are most likely their next tokens."""
    inputs, (_, batch) = pair.inputs(pictures), pair.batch(pictures)
    answers = generate(pair.theirs, pair, inputs)
    found, wanted = our_logits(pair, behind(batch, answers)), torch_logits(pair.theirs, inputs)
    valid, length = np.asarray(batch.segments) > 0, batch.tokens.shape[1]
    assert not valid.all() and np.abs(wanted).max() > 1
    np.testing.assert_allclose(found[:, :length][valid], wanted[valid], atol=1e-4, rtol=0)
    found[..., list(pair.ours.spec.backbone.media_tokens)] = -np.inf
    np.testing.assert_array_equal(found[:, length - 1 : -1].argmax(-1), answers)


def test_logits_and_twenty_greedy_tokens_equal_ours(pair: Pair) -> None:
    assert_same(pair)


def test_without_its_memory_the_model_is_the_backbone_to_the_bit(pair: Pair) -> None:
    inputs = pair.inputs(PICTURES)
    with_memory = torch_logits(pair.theirs, inputs)
    pair.theirs.use_memory = False
    try:
        bare, answers = torch_logits(pair.theirs, inputs), generate(pair.theirs, pair, inputs)
    finally:
        pair.theirs.use_memory = True
    np.testing.assert_array_equal(bare, torch_logits(pair.plain, inputs))
    np.testing.assert_array_equal(answers, generate(pair.plain, pair, inputs))
    changed = np.abs(with_memory - bare).max((1, 2))
    assert changed[0] > 0.5 and changed[2] > 0.5
    np.testing.assert_allclose(with_memory[1], bare[1], atol=1e-5)  # a row of text among rows with images


def test_import_gives_every_tensor_back(pair: Pair) -> None:
    back = jaxmem.load(pair.ours.folder.parent / "out")
    assert back.spec == pair.ours.spec
    jax.tree.map(np.testing.assert_array_equal, (back.base, back.memory), (pair.ours.base, pair.ours.memory))


def test_several_answers_to_a_prompt_share_its_images(pair: Pair) -> None:
    inputs = pair.inputs(PICTURES)
    single = generate(pair.theirs, pair, inputs)
    several = generate(pair.theirs, pair, inputs, do_sample=True, top_k=1, num_return_sequences=2)
    np.testing.assert_array_equal(several.reshape(len(single), 2, NEW), np.repeat(single[:, None], 2, axis=1))


def test_text_without_images_answers_as_the_backbone_after_a_prompt_with_some(pair: Pair) -> None:
    generate(pair.theirs, pair, pair.inputs(PICTURES))
    inputs = pair.inputs([[], []])
    np.testing.assert_array_equal(torch_logits(pair.theirs, inputs), torch_logits(pair.plain, inputs))


def test_beams_that_change_places_in_the_cache_look_at_their_own_images(qwen3: Pair) -> None:
    inputs = qwen3.inputs(PICTURES)
    beams = generate(qwen3.theirs, qwen3, inputs, num_beams=2)
    np.testing.assert_array_equal(beams, generate(qwen3.theirs, qwen3, inputs, num_beams=2, use_cache=False))
    assert (beams != generate(qwen3.theirs, qwen3, inputs)).any()


def test_our_own_decoding_gives_the_same_answers(qwen3: Pair) -> None:
    rows, batch = qwen3.batch(PICTURES)
    buckets = Buckets((batch.tokens.shape[1],), (batch.patches.shape[1],))
    ours = qwen3.ours.generate(chats(PICTURES), max_new_tokens=NEW, stop_tokens=(), buckets=buckets)
    theirs = generate(qwen3.theirs, qwen3, qwen3.inputs(PICTURES))
    np.testing.assert_array_equal([answer.tokens for answer in ours], theirs)


@pytest.mark.parametrize(
    ("family", "memory", "settings"),
    [
        ("qwen3_vl", "pvm", {"visibility": "all", "silence": False, "query": "normed", "output_norm": False}),
        ("llava_next", "pvm", {"source": "hidden", "silence": False}),
        ("llava_onevision", "mlp", {}),
        ("qwen2_vl", "mlp", {"silence": False, "query": "normed", "output_norm": False}),
    ],
)
def test_other_settings_and_the_control(family: str, memory: str, settings: dict[str, Any], tmp_path: Any) -> None:
    pair = exported(family, memory, tmp_path, **settings)
    assert_same(pair)
    inputs = pair.inputs(PICTURES)
    on = torch_logits(pair.theirs, inputs)
    pair.theirs.use_memory = False
    off = torch_logits(pair.theirs, inputs)
    np.testing.assert_array_equal(off, torch_logits(pair.plain, inputs))
    assert np.abs(on - off)[0].max() > 0.5


def cached(pair: Pair, cache: Any = None, **inputs: Any) -> tuple[np.ndarray, Any]:
    """Logits, and the cache under the name that the release of transformers has for it."""
    name = "cache" if "cache" in inspect.signature(type(pair.plain).forward).parameters else "past_key_values"
    with torch.no_grad():
        out = pair.theirs(**inputs, **{name: cache}, use_cache=True)
    return out.logits.numpy(), out[name]


def test_a_prompt_in_a_cache_that_was_reset_begins_anew(qwen3: Pair) -> None:
    cache = transformers.StaticCache(config=qwen3.theirs.config, max_cache_len=128)
    cached(qwen3, cache, **qwen3.inputs(PICTURES))
    cache.reset()
    inputs = qwen3.inputs([[], [], []])
    found, _ = cached(qwen3, cache, **inputs)
    np.testing.assert_allclose(found, torch_logits(qwen3.plain, inputs), atol=1e-5)


def test_images_of_a_second_turn_are_added_to_those_in_the_cache(qwen3: Pair) -> None:
    both = [PICTURES[0]]
    rows, batch = qwen3.batch(both)
    whole = qwen3.inputs(both)
    images = np.flatnonzero(np.diff(rows[0].visual_rows, prepend=-1, append=-1) < 0)
    cut = int(images[0]) + 1  # one token of text behind the first image
    count = int(whole["image_grid_thw"][0].prod())
    places = torch.tensor(rows[0].positions, dtype=torch.long)[:, None]
    logits, cache = [], None
    for tokens, patches, number in ((slice(cut), slice(count), 0), (slice(cut, None), slice(count, None), 1)):
        turn = {
            "input_ids": whole["input_ids"][:, tokens],
            "position_ids": places[..., tokens],
            "pixel_values": whole["pixel_values"][patches],
            "image_grid_thw": whole["image_grid_thw"][number : number + 1],
        }
        found, cache = cached(qwen3, cache, **turn)
        logits.append(found)
    np.testing.assert_allclose(np.concatenate(logits, 1), our_logits(qwen3, batch), atol=1e-4, rtol=0)


def test_continuations_of_a_repeated_cache_look_at_its_images(qwen3: Pair) -> None:
    prompts = qwen3.inputs(PICTURES)
    _, cache = cached(qwen3, **prompts)
    before = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    length, tokens = prompts["input_ids"].shape[1], np.arange(5, 23).reshape(6, 3)
    twice = jax.tree.map(lambda x: np.repeat(np.asarray(x), 2, axis=0), qwen3.batch(PICTURES)[1])
    whole = behind(twice, tokens)
    later = {
        "input_ids": torch.tensor(tokens),
        "position_ids": torch.tensor(whole.positions, dtype=torch.long).movedim(1, 0)[..., length:],
        "attention_mask": torch.tensor(whole.segments > 0).long(),
    }
    found, _ = cached(qwen3, cache, **later)
    np.testing.assert_allclose(found, our_logits(qwen3, whole)[:, length:], atol=1e-4, rtol=0)
    first = {name: x[:, ::2] if name == "position_ids" else x[::2] for name, x in later.items()}
    alone, _ = cached(qwen3, before, **first)  # what was copied remembers, too
    np.testing.assert_allclose(alone, found[::2], atol=1e-5)
    with pytest.raises(ValueError, match="4 rows continue a cache whose images were read in 3 rows"):
        cached(qwen3, before, input_ids=torch.tensor(tokens[:4]), position_ids=torch.zeros(3, 4, 3).long())


def test_rows_of_a_map_that_was_scaled_down_are_what_its_tokens_show(tmp_path: Any) -> None:
    pair = exported("llava_onevision", "pvm", tmp_path)
    large = [[picture(331, 173, 4)], [picture(90, 24, 3), picture(96, 64, 1)]]
    assert_same(pair, large)
    _, batch = pair.batch(large)
    torch_logits(pair.theirs, pair.inputs(large))
    assert batch.visual_taps is not None
    seen = llava.see(pair.ours.spec.backbone, pair.ours.base, batch)
    shown = np.asarray(visual_at(seen.rows, batch))[0]
    rows = np.asarray(batch.visual_rows)[0]
    chosen = [at for at in range(len(rows)) if rows[at] > 0 or (rows[at] == 0 and at == np.flatnonzero(rows == 0)[-1])]
    reading = pair.theirs.model.language_model.layers[0].pvm_block.reading
    np.testing.assert_array_equal(reading.memory.place[0].numpy(), chosen)
    np.testing.assert_allclose(reading.rows[0].numpy(), shown[chosen], atol=1e-5)
