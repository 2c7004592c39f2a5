"""Parts of a tiny LLaVA-style model that knows digit boards: a decoder and a tower, as Hugging Face folders.

The decoder is that of the embedded Qwen3-VL, which reads a board from visual rows of the decoder's width, behind one
more layer that does nothing yet: the embedded one looks at images from its first layer on, and what acts behind a layer
comes too late for that. The tower is
a CLIP that learns, in a minute, to tell digit and cell of each cell's patches through two maps and in the decoder's own
words, as the embedded model's tower did: it stands for a tower and a projector that were trained on captions.
`jaxmem.checkpoints.assemble` joins them.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from jaxmem.assets import TINY
from jaxmem.backbones import clip, projectors, registry, vit
from jaxmem.backbones.clip_config import ClipConfig
from jaxmem.backbones.projectors import ProjectorConfig
from jaxmem.backbones.vit import ViTConfig
from jaxmem.checkpoints import clip_names, huggingface, projector_names
from jaxmem.checkpoints.table import write_tree
from jaxmem.checkpoints.weights import SINGLE, open_file, read_json, staged, write_file, write_json
from jaxmem.data.boards import CELL_PIXELS, SIDE, BoardDataset, board_tokens

PATCH = CELL_PIXELS // 2
MAPS = "maps.safetensors"
READ_LAYER = -2
"""The hidden state that a LLaVA-NeXT reads of a CLIP, and that the tower learns to fill."""
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
_MEAN = _STD = 0.5


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """The tower and how it learns.

    Attributes:
      depth, width, mlp_width, heads: of the blocks.
      steps, batch_size, learning_rate: of AdamW, with warm-up and cosine.
    """

    depth: int = 6
    width: int = 64
    mlp_width: int = 128
    heads: int = 2
    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 3e-3

    @property
    def clip(self) -> ClipConfig:
        """As a folder with a vision tower alone holds it."""
        side = SIDE * CELL_PIXELS
        tower = ViTConfig(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_width=self.mlp_width,
            act="quick_gelu",
            norm_eps=1e-5,
            image_size=side,
            patch_size=PATCH,
        )
        return ClipConfig("clip_vision_model", tower)

    @property
    def maps(self) -> ProjectorConfig:
        """From the mean of a cell's patches to a row of the embedded decoder."""
        tower = self.clip.vision
        width = registry.config_from_hf(huggingface.read_config(TINY)).text.width
        return ProjectorConfig("avgpool", tower.width, width, tower.side, ratio=CELL_PIXELS // PATCH)


def write_decoder(folder: Path) -> None:
    """The embedded model's decoder as a Qwen3 folder with its tokenizer, and a layer more in front."""
    hf = huggingface.read_config(TINY)
    config = registry.config_from_hf(hf)
    base = huggingface.load_backbone(TINY, config, dtype=jnp.float32)
    rope = {"rope_type": "default", "rope_theta": config.text.rope_theta}
    section = {key: value for key, value in hf["text_config"].items() if key not in ("rope_scaling", "rope_theta")}
    alone = section | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": config.text.layers + 1,
        "dtype": "float32",
        "rope_parameters": rope,
        "tie_word_embeddings": config.text.tied,
    }
    part = {name: base[name] for name in base if name != "visual"} | {"layers": _behind_one(base["layers"])}
    folder.mkdir(parents=True, exist_ok=True)
    huggingface.save_backbone(folder, part, registry.config_from_hf(alone), hf_config=alone, overwrite=True)
    for name in _BESIDE:
        shutil.copy(TINY / name, folder)


def _behind_one(layers: Any) -> Any:
    """Stacked layers behind a copy of the first one that adds nothing: what its two branches end in is zero."""
    layers = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:1], leaf]), layers)
    for branch, last in (("attention", "o"), ("ffn", "down")):
        layers[branch][last]["kernel"] = layers[branch][last]["kernel"].at[0].set(0)
    return layers


def write_tower(folder: Path, config: TowerConfig, seed: int) -> float:
    """Trains a tower with its maps and writes both; returns the share of digits told right in the last steps."""
    params, maps, right = train_tower(config, seed)
    table = projector_names.table(config.maps)
    with staged(folder, (MAPS,)) as stage:
        write_file(stage / MAPS, list(write_tree(table, {"projector": maps})))
    save_tower(folder, config.clip, params)
    return right


def load_maps(folder: Path, config: TowerConfig) -> Any:
    """The parameters of the two maps that a tower was trained with: of the projectors "mlp" and "avgpool"."""
    shapes = {"projector": projectors.shapes(config.maps)}
    path = folder / MAPS
    return huggingface.load_tree(path, open_file(path), projector_names.table(config.maps), shapes)["projector"]


def train_tower(config: TowerConfig, seed: int) -> tuple[Any, Any, float]:
    """The tower's parameters (`clip.init`) and its maps' after training, and the share of digits right at the end.

    A row should point along the head's vector of its digit and along the embedding of its cell's name.
    """
    key, maps = jax.random.split(jax.random.key(seed))
    whole = clip.init(key, config.clip)
    params = {"visual": whole["visual"], "maps": projectors.init(maps, config.maps)}
    warm = max(1, config.steps // 20)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warm, config.steps)
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=1e-4))
    state, seen = rule.init(params), []
    update = jax.jit(functools.partial(_update, config, rule, _words()), donate_argnums=(0, 1))
    for patches, grid in _pictures(config, seed):
        params, state, right = update(params, state, patches, grid)
        seen.append(right)
    right = float(np.mean([float(right) for right in seen[-20:]]))
    return {**whole, "visual": params["visual"]}, params["maps"], right


def _words() -> tuple[Any, Any]:
    """The decoder's vectors of digits [10, D] and of cells' names [2, 16, D], without and with a leading space."""
    backbone = registry.config_from_hf(huggingface.read_config(TINY))
    base = huggingface.load_backbone(TINY, backbone, dtype=jnp.float32)
    ids = board_tokens(Tokenizer.from_file(str(TINY / "tokenizer.json")))
    return base["head"][np.array(ids.digits)], base["embed"][np.reshape(ids.cells, (2, SIDE**2))]


def _pictures(config: TowerConfig, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(patches [B, P, C], digits [B, 16]) per step."""
    boards = BoardDataset("train", 1000 + seed, size=config.steps * config.batch_size)
    for step in range(config.steps):
        some = [boards[step * config.batch_size + row] for row in range(config.batch_size)]
        pixels = np.stack([board.image for board in some]).astype(np.float32) / 255
        yield vit.patchify(config.clip.vision, (pixels - _MEAN) / _STD), np.array([board.grid for board in some])


def _update(
    config: TowerConfig,
    rule: optax.GradientTransformation,
    words: Any,
    params: Any,
    state: Any,
    patches: Any,
    grid: Any,
) -> tuple[Any, Any, Any]:
    """One step of cross-entropy of every cell's digit and name."""
    digits, names = words

    def loss(params: Any) -> tuple[Any, Any]:
        (features,) = vit.forward(config.clip.vision, params["visual"], patches, (READ_LAYER,))
        rows = projectors.project(config.maps, params["maps"], features[:, 1:])
        digit = jnp.einsum("bmd,cd->bmc", rows, digits)
        name = jnp.einsum("bmd,acd->abmc", rows, names)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        cells = jnp.broadcast_to(jnp.arange(SIDE**2), name.shape[:-1])
        return entropy(digit, grid).mean() + entropy(name, cells).mean(), (digit.argmax(-1) == grid).mean()

    (_, right), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    change, state = rule.update(gradient, state, params)
    return optax.apply_updates(params, change), state, right


def save_tower(folder: Path, config: ClipConfig, params: Any) -> None:
    """A folder with a CLIP vision tower alone."""
    tower = config.vision
    hf = {
        "architectures": ["CLIPVisionModel"],
        "model_type": config.model_type,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.act,
        "layer_norm_eps": tower.norm_eps,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
    }
    size = {"height": tower.image_size, "width": tower.image_size}
    pixels = {"image_processor_type": "CLIPImageProcessor", "image_mean": [_MEAN] * 3, "image_std": [_STD] * 3}
    with staged(folder, (SINGLE,)) as stage:
        write_file(stage / SINGLE, list(write_tree(clip_names.table(config), params)))
        write_json(stage / "config.json", hf)
        write_json(stage / "preprocessor_config.json", pixels | {"size": size, "crop_size": size})


def has_parts(folder: Path) -> bool:
    """Was the folder written to its end?"""
    return (folder / SINGLE).is_file() and bool(read_json(folder / "config.json"))
