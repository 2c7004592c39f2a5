"""Tiny models that look at images, their exported folders, and what torch is asked of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import jaxmem
from jaxmem.backbones import registry
from jaxmem.checkpoints import huggingface
from jaxmem.data.batching import Buckets, collate
from jaxmem.export import hf
from jaxmem.memory import vision_remember
from tests.backbones.prompts import image, text, user
from tests.llava_folder import amend, write_llava

SQUARE, WIDE, TALL = image(70, 58, 1), image(100, 28, 2), image(26, 90, 3)
CHATS = {
    "square": user(SQUARE, text("what do they see?")),
    "wide": user(text("here is"), WIDE, text("describe the streets")),
    "several": user(text("first"), WIDE, TALL, text("which of them is older?\n")),
    "text": user(text("seven wizards describe what?")),
    "turns": [
        *user(TALL, text("how many dogs?")),
        {"role": "assistant", "content": "seven dogs and a fox"},
        *user(text("and what colours?")),
    ],
}
TOKENS = 20


def write(kind: str, folder: Path, *, projector: Any = None, family: str = "qwen2", seed: int = 1, **settings: Any):
    """A LLaVA of random weights, nothing of them trivial.

    Args:
      kind: "next" or "onevision".
      folder: gets all files.
      projector: the section of config.json.
      family: of the decoder.
      seed: of the weights.
      **settings: of config.json.
    """
    made = config(kind, folder, projector, family=family, **settings)
    shapes = registry.backbone(made.model_type).shapes(made)
    huggingface.save_backbone(folder, random_like(shapes, seed), made)
    return jaxmem.load(folder)


def config(kind: str, folder: Path, projector: Any = None, **settings: Any) -> Any:
    """All files but the weights."""
    write_llava(kind, folder, weights=False, text={"num_hidden_layers": 4}, **settings)
    amend(folder, **({} if projector is None else {"projector": projector}))
    return registry.config_from_hf(huggingface.read_config(folder))


def random_like(shapes: Any, seed: int) -> Any:
    """Matrices that keep the size of their input, norm scales around 1, biases around 0."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        noise, kind = rng.standard_normal(leaf.shape).astype(np.float32), path[-1].key
        if kind == "scale":
            return 1 + 0.3 * noise
        if kind == "gate":
            return 0.5 + 0.1 * noise
        rows = 9 if leaf.shape[:2] == (3, 3) else leaf.shape[-2] if kind == "kernel" else leaf.shape[-1:] or 1
        return noise / np.prod(rows) ** 0.5 if leaf.ndim > 1 and kind != "bias" else 0.2 * noise

    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes))


def remembering(model: jaxmem.Model, seed: int = 3, **settings: Any) -> jaxmem.Model:
    """The model with a Vision Remember of random weights."""
    small = {"layers": (0, model.spec.backbone.text.layers - 1), "inner": 24, "heads": 3}
    config = vision_remember.create(model.spec.backbone, **(small | settings))
    shapes = jax.eval_shape(lambda: vision_remember.init(jax.random.key(0), config))
    return model._with(config, random_like(shapes, seed))


def export(model: jaxmem.Model, folder: Path) -> Path:
    """Writes the folder, without its proof."""
    folder.mkdir(parents=True)
    hf.write(model, folder)
    return folder


def load(folder: Path, **settings: Any) -> Any:
    """The torch model, with every tensor in place."""
    settings = {"trust_remote_code": True, "output_loading_info": True, "dtype": torch.float32} | settings
    model, found = transformers.AutoModelForImageTextToText.from_pretrained(folder, **settings)
    assert not any(found[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")), found
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Asked:
    """Some chats: for us a batch, for torch its inputs."""

    chats: list[Any]
    batch: Any
    inputs: dict[str, torch.Tensor]

    @property
    def valid(self) -> np.ndarray:
        """[B, T] bool."""
        return np.asarray(self.batch.segments) > 0


def ask(model: jaxmem.Model, names: Sequence[Any], padding: str = "left") -> Asked:
    """Chats (or names of `CHATS`) from our own processor, for both."""
    chats = [CHATS[name] if isinstance(name, str) else name for name in names]
    rows = [model.processor.encode(chat, add_generation_prompt=True) for chat in chats]
    up = lambda count: (-(-max(map(count, rows)) // 32) * 32,)  # noqa: E731
    buckets = Buckets(tokens=up(len), patches=up(lambda row: max(1, len(row.patches))))
    batch = collate(rows, buckets, model.processor.pad_token, padding)
    inputs = {
        "input_ids": torch.tensor(np.asarray(batch.tokens), dtype=torch.long),
        "attention_mask": torch.tensor(np.asarray(batch.segments) > 0, dtype=torch.long),
    }
    if model.processor.tiled:
        inputs |= tiled(model, rows, chats)
    else:
        inputs |= gridded(model, rows, batch)
    return Asked(chats, batch, inputs)


def pictures(chat: Any) -> list[np.ndarray]:
    """The images of a chat."""
    parts = [part for message in chat for part in message["content"] if isinstance(part, dict)]
    return [part["image"] for part in parts if part["type"] == "image"]


def tiled(model: jaxmem.Model, rows: Sequence[Any], chats: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Pixels of all tiles [T, 3, side, side], made of our patches, and the sizes of the images."""
    vision, found = model.spec.backbone.vision, [pictures(chat) for chat in chats]
    if not any(found):
        return {}
    side, size, patch = vision.tower.side, vision.tower.image_size, vision.tower.patch_size
    patches = np.concatenate([row.patches for row in rows]).reshape(-1, side, side, 3, patch, patch)
    pixels = np.zeros((len(patches), 3, size, size), np.float32)
    pixels[:, :, : side * patch, : side * patch] = patches.transpose(0, 3, 1, 4, 2, 5).reshape(
        len(patches), 3, side * patch, side * patch
    )
    sizes = torch.tensor([shown.shape[:2] for images in found for shown in images])
    inputs = {"pixel_values": torch.tensor(pixels), "image_sizes": sizes}
    if model.spec.backbone.model_type == "llava_onevision":
        inputs["batch_num_images"] = torch.tensor([len(images) for images in found])
    return inputs


def gridded(model: jaxmem.Model, rows: Sequence[Any], batch: Any) -> dict[str, torch.Tensor]:
    """Patches and grids of images of the Qwen-VL family."""
    kind = (np.asarray(batch.visual_rows) >= 0).astype(np.int32)
    inputs = {"mm_token_type_ids": torch.tensor(kind)}
    grids = [(1, 2 * down, 2 * across) for row in rows for down, across in row.images]
    if grids:
        inputs["pixel_values"] = torch.tensor(np.concatenate([row.patches for row in rows]))
        inputs["image_grid_thw"] = torch.tensor(grids)
    return inputs


def logits(model: Any, asked: Asked, **settings: Any) -> np.ndarray:
    """[B, T, V] of torch."""
    with torch.no_grad():
        return model(**asked.inputs, **settings).logits.float().numpy()


def greedy(model: Any, asked: Asked, banned: Sequence[int], **settings: Any) -> list[list[int]]:
    """Continuations of torch."""
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    out = model.generate(**asked.inputs, **options, eos_token_id=None, suppress_tokens=list(banned), **settings)
    return out[:, asked.inputs["input_ids"].shape[1] :].tolist()


def answers(model: jaxmem.Model, asked: Asked) -> list[list[int]]:
    """Our greedy continuations."""
    buckets = Buckets(tokens=(asked.batch.tokens.shape[1],), patches=(max(1, asked.batch.patches.shape[1]),))
    done = model.generate(asked.chats, max_new_tokens=TOKENS, stop_tokens=(), buckets=buckets)
    return [list(answer.tokens) for answer in done]


def continued(asked: Asked, said: Sequence[Sequence[int]]) -> Any:
    """The batch with continuations behind its prompts, which are padded on the left."""
    batch, new = asked.batch, np.asarray(said, np.int32)
    last = np.asarray(batch.positions).max(axis=(1, 2))
    places = np.broadcast_to((last[:, None] + 1 + np.arange(new.shape[1]))[:, None], (len(new), 3, new.shape[1]))
    grown = {"tokens": new, "positions": places, "segments": np.ones_like(new), "loss_mask": np.zeros(new.shape)}
    grown |= {"visual_rows": np.full_like(new, -1)}
    taps = np.zeros((len(new), 4, new.shape[1]))
    optional = {"question": np.zeros(new.shape), "visual_taps": taps, "visual_weights": taps}
    grown |= {name: value for name, value in optional.items() if getattr(batch, name) is not None}
    joined = lambda old, new: np.concatenate([old, new.astype(old.dtype)], axis=-1)  # noqa: E731
    return dataclasses.replace(batch, **{key: joined(np.asarray(getattr(batch, key)), x) for key, x in grown.items()})


def check(ours: jaxmem.Model, theirs: Any, asked: Asked) -> np.ndarray:
    """Logits of prompts, and every token of torch's greedy continuations, are ours; returns our logits [B, T, V].

    A continuation is ours when each of its tokens is what we find most likely behind the ones before it.
    """
    banned = list(ours.spec.backbone.media_tokens)
    said = greedy(theirs, asked, banned)
    scores = np.asarray(ours.logits(continued(asked, said)))
    length = asked.batch.tokens.shape[1]
    close(scores[:, :length], logits(theirs, asked), asked)
    allowed = scores[:, length - 1 : -1].copy()
    allowed[..., banned] = -np.inf
    assert allowed.argmax(-1).tolist() == said and len(said[0]) == TOKENS
    return scores[:, :length]


def close(ours: np.ndarray, theirs: np.ndarray, asked: Asked) -> None:
    """Logits of all tokens to 1e-4, and they say something."""
    assert np.abs(ours[asked.valid]).max() > 1
    np.testing.assert_allclose(theirs[asked.valid], ours[asked.valid], atol=1e-4, rtol=0)


def check_both(ours: jaxmem.Model, theirs: Any, asked: Asked) -> None:
    """`check` with the memory and without; it changes what is said of images, and nothing else."""
    on = check(ours, theirs, asked)
    theirs.use_memory = False
    off = check(ours.without_memory(), theirs, asked)
    theirs.use_memory = True
    seen = np.asarray([bool(pictures(chat)) for chat in asked.chats])
    change = np.abs(on - off).max(axis=(1, 2), where=asked.valid[..., None], initial=0)
    assert (change[seen] > 0.5).all() and (change[~seen] < 1e-4).all()
