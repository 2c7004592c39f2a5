"""The tiny LLaVA-NeXT of the baselines' tests, with 2x2 pooled tokens, and torch's own pieces of the same model.

A tile has 4x4 patches and 4 tokens. All batches have the same shapes. Torch computes tower, projector and decoder; how
tokens stand in the prompt is our processor's word (`visual_rows`), which the tests of LLaVA hold against transformers.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxmem
from jaxmem import model as functions
from jaxmem.api import Model
from jaxmem.backbones import decoder, registry
from jaxmem.backbones.batch import Batch
from jaxmem.checkpoints import huggingface
from jaxmem.data.batching import Buckets
from jaxmem.data.loading import load_processor
from jaxmem.model import Spec
from jaxmem.sampling import cache
from tests.backbones.prompts import image, text, user
from tests.llava_folder import amend, write_llava

SIDE, RATIO, LAYERS = 4, 2, 5
BUCKETS = Buckets(tokens=(72,), patches=(144,))
CHATS = [
    user(image(84, 14), text("describe the streets")),
    user(text("what?"), image(56, 56, 1), text("and"), image(30, 100, 2), text("digits")),
    user(text("what do they see?")),
]


@dataclasses.dataclass(frozen=True)
class World:
    """The bare model, torch's, and the prompts as a batch: one image, two images, text alone."""

    model: Model
    theirs: Any
    batch: Batch
    logits: np.ndarray

    def lengths(self) -> np.ndarray:
        """[B] tokens of each row."""
        return (np.asarray(self.batch.segments) > 0).sum(1)


def make_world(folder: Path) -> World:
    """The world in a folder of its own."""
    theirs = write_llava("next", folder, seed=1, text={"num_hidden_layers": LAYERS})
    loaded = jaxmem.load(folder)
    amend(folder, projector={"name": "avgpool", "ratio": RATIO})  # the same two maps behind a mean
    config = registry.config_from_hf(huggingface.read_config(folder))
    model = dataclasses.replace(loaded, spec=Spec(config), processor=load_processor(folder, config))
    batch = model.batch(CHATS, buckets=BUCKETS)
    return World(model, theirs, batch, np.asarray(model.logits(batch)))


def tower(world: World, row: int) -> list[torch.Tensor]:
    """All hidden states [tiles, patches, width] of a row's tiles, without the class token, by torch."""
    patches = np.asarray(world.batch.patches[row]).reshape(-1, SIDE, SIDE, 3, 7, 7)
    pixels = torch.tensor(patches.transpose(0, 3, 1, 4, 2, 5).reshape(len(patches), 3, SIDE * 7, SIDE * 7))
    with torch.no_grad():
        found = world.theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return [states[:, 1:] for states in found]


def cells(patches: torch.Tensor) -> torch.Tensor:
    """[tiles, 16, W] -> [tiles, 4, 4, W]: the patches of every token's cell, by their coordinates."""
    found = []
    for i in range(SIDE // RATIO):
        for j in range(SIDE // RATIO):
            own = [(i * RATIO + y) * SIDE + j * RATIO + x for y in range(RATIO) for x in range(RATIO)]
            found.append(patches[:, own])
    return torch.stack(found, dim=1)


def project(world: World, features: torch.Tensor) -> torch.Tensor:
    """torch's projector: [..., W] -> [..., D]."""
    with torch.no_grad():
        return world.theirs.model.multi_modal_projector(features)


def embedded(world: World, row: int) -> torch.Tensor:
    """[1, n, D] what enters the decoder for a row's n tokens."""
    n, rows = world.lengths()[row], torch.tensor(np.asarray(world.batch.visual_rows[row]), dtype=torch.long)
    with torch.no_grad():
        words = world.theirs.get_input_embeddings()(torch.tensor(np.asarray(world.batch.tokens[row]), dtype=torch.long))
        tokens = project(world, cells(tower(world, row)[-2]).mean(2)).flatten(0, 1)
        visual = torch.cat([world.theirs.model.image_newline[None], tokens])
        return torch.where(rows[:, None] >= 0, visual[rows.clamp(min=0)], words)[None, :n]


def decode(world: World, x: torch.Tensor) -> np.ndarray:
    """[n, V] logits of torch's decoder for what enters it."""
    with torch.no_grad():
        states = world.theirs.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state
        return world.theirs.lm_head(states)[0].numpy()


@functools.partial(jax.jit, static_argnames="spec")
def forward(spec: Spec, base: Any, memory: Any, batch: Batch) -> Any:
    """[B, T, D] normalised states."""
    return functions.hidden_states(spec, base, memory, batch)


@functools.partial(jax.jit, static_argnames="spec")
def stepped(spec: Spec, base: Any, memory: Any, batch: Batch, tokens: Any) -> Any:
    """[B, 1 + N, D] normalised states by prefill and N decoding steps."""
    layers = decoder.unstack(base["layers"], spec.backbone.text.layers)
    angle_of = functools.partial(registry.backbone(spec.backbone.model_type).rotary_angles, spec.backbone)
    hidden, state = cache.prefill(spec, base, memory, batch, batch.tokens.shape[1] + 3)
    active = jnp.ones((len(tokens), 1), bool)

    def one(state: Any, step: Any) -> Any:
        at, token = step
        place = jnp.full((len(tokens), 1), at)
        found, state = cache.step(spec, base, layers, memory, state, token[:, None], active, place, angle_of)
        return state, found[:, 0]

    count = tokens.shape[1]
    _, found = jax.lax.scan(one, cache.fork(state, 1, count), (jnp.arange(count), jnp.swapaxes(tokens, 0, 1)))
    return jnp.concatenate([hidden[:, None], jnp.swapaxes(found, 0, 1)], axis=1)


def answered(batch: Batch, tokens: np.ndarray) -> Batch:
    """The prompts of a right-padded batch with tokens [B, N] as their answers."""
    fields = {name: np.array(getattr(batch, name)) for name in ("tokens", "segments", "positions", "loss_mask")}
    for row, n in enumerate((np.asarray(batch.segments) > 0).sum(1)):
        here = slice(n, n + tokens.shape[1])
        fields["tokens"][row, here], fields["segments"][row, here], fields["loss_mask"][row, here] = tokens[row], 1, 1
        fields["positions"][row, :, here] = fields["positions"][row].max() + 1 + np.arange(tokens.shape[1])
    return dataclasses.replace(batch, **fields)


def behind(world: World, states: np.ndarray, count: int) -> np.ndarray:
    """Of [B, T, D] the states of each prompt's last token and the `count` tokens behind it, [B, 1 + count, D]."""
    return np.stack([states[row, n - 1 : n + count] for row, n in enumerate(world.lengths())])
