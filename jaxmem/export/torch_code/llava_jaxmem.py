"""LLaVA-NeXT and LLaVA-OneVision with any projector and any tiling that jaxmem trains them with.

transformers' own classes know one projector, which makes a token of every patch, and stitch images accordingly. Here
the projector of config.json is in its place, and images are stitched on the coarser grid that it leaves. Everything
else is inherited. `config.jaxmem["tiles"]` says what these classes must know:

    {"aspect": "anyres" | "anyres_max_K" | "single", "feature_layers": [hidden states of the tower that are projected],
     "side": patches per side of a tile, "grid": tokens per side (null: no grid), "tokens": N', "projector": {...}}

Letters: T tiles of all images, n of one image (the thumbnail first), P patches and N' tokens of a tile, W width of the
tower, D of the decoder.
"""

import contextlib

import torch
from torch import nn
from transformers import LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from .projectors_jaxmem import make_projector
from .tiling_jaxmem import Tiling


class TiledImages:
    """What the two models share: tiles through tower and projector, and their tokens in the order of the prompt.

    Attributes:
      memory_levels: hidden states of the tower that a memory reads; `get_image_features` keeps them.
    """

    memory_levels = ()

    def __init__(self, config):
        super().__init__(config)
        self.tiling = Tiling.of(config.to_dict())
        self.multi_modal_projector = make_projector(config.jaxmem["tiles"]["projector"])
        self.vision_tower.post_layernorm = nn.Identity()  # it and the head serve pooling, which no projector reads
        if getattr(self.vision_tower, "use_head", False):
            self.vision_tower.use_head, self.vision_tower.head = False, None
        self.post_init()

    @property
    def tiles(self):
        """What config.json says of them."""
        return self.config.jaxmem["tiles"]

    def get_image_features(self, pixel_values, image_sizes, batch_num_images=None, **unused):
        """The features of every image in the order of its tokens.

        Args:
          pixel_values: [images, most tiles, 3, side, side], padded, or the tiles of all images [T, 3, side, side].
          image_sizes: [images, 2], (height, width) in pixels.
          batch_num_images: images of each prompt (LLaVA-OneVision).
          unused: what config.json states.

        Returns:
          The tower's output; `pooler_output` is a list of [tokens of the image, D]. For memories it also has `levels`
          {hidden state: [T, P, W]}, `image_rows`, a list of [tokens of the image] (the token of all tiles T N' that
          stands there, -1 for a newline), and `image_tiles`, a list of ((height, width), n, was the image padded to a
          square).
        """
        sizes = [tuple(int(length) for length in size) for size in image_sizes]
        several = [False] * len(sizes)
        if batch_num_images is not None:
            several = [int(count) != 1 for count in batch_num_images for _ in range(int(count))]
        counts = [self.tiling.count_tiles(*image) for image in zip(sizes, several, strict=True)]
        if pixel_values.dim() == 5:
            pixel_values = torch.cat([image[:count] for image, count in zip(pixel_values, counts, strict=True)])
        tokens, outputs = self.project(pixel_values.to(self.vision_tower.dtype))
        images = zip(tokens.split(counts), sizes, strict=True)
        outputs.pooler_output = [self.tiling.arrange(*image, self.image_newline) for image in images]
        if self.memory_levels:  # never with "anyres_max_K", whose tokens are mixtures
            rows = torch.arange(tokens[..., 0].numel(), device=tokens.device).view(*tokens.shape[:2], 1)
            images, newline = zip(rows.split(counts), sizes, strict=True), rows.new_full((1,), -1)
            outputs.image_rows = [self.tiling.arrange(*image, newline)[:, 0] for image in images]
            padded = [one and self.tiling.single_when_several for one in several]
            outputs.image_tiles = list(zip(sizes, counts, padded, strict=True))
        return outputs

    def project(self, pixel_values):
        """[T, 3, side, side] -> tokens [T, N', D], and the tower's output with its `levels`."""
        own, settings = self.tiles["feature_layers"], self.tiles["projector"]
        further = settings["levels"] if settings["name"] == "tokenpacker" else ()
        patches = self.tiles["side"] ** 2
        with hidden_states(self.vision_tower, {*own, *further, *self.memory_levels}) as states:
            outputs = self.vision_tower(pixel_values, return_dict=True)
        states = {level: state[:, -patches:] for level, state in states.items()}  # without a class token
        features = torch.cat([states[level] for level in own], dim=-1)
        tokens = self.multi_modal_projector(features, [states[level] for level in further])
        outputs.levels = {level: states[level] for level in self.memory_levels}
        return tokens, outputs

    def apply_pooling(self, image_features):
        """Of videos, which LLaVA-OneVision's own projector takes alone."""
        if self.tiles["projector"]["name"] != "mlp":
            raise ValueError(
                f"videos are not seen through the projector {self.tiles['projector']['name']!r}; give their frames as"
                " images"
            )
        return super().apply_pooling(image_features)


@contextlib.contextmanager
def hidden_states(tower, levels):
    """A dict that fills while the tower of CLIP or SigLIP runs: hidden states [T, places, W] by their numbers.

    Numbers are those of transformers' `hidden_states`: 0 enters the first block, k leaves block k (counted from 1),
    always before the norm behind the blocks; negative ones count from the last.
    """
    blocks, found, hooks = tower.encoder.layers, {}, []
    for level in levels:
        number = level % (len(blocks) + 1)

        def keep(module, args, output=None, level=level):
            found[level] = args[0] if output is None else output

        if number:
            hooks.append(blocks[number - 1].register_forward_hook(keep))
        else:
            hooks.append(blocks[0].register_forward_pre_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class NextModel(TiledImages, LlavaNextModel):
    """LLaVA-NeXT without a head: every image is tiled."""


class OnevisionModel(TiledImages, LlavaOnevisionModel):
    """LLaVA-OneVision without a head: an image is tiled where it is the only one of its prompt."""


class RepeatedPrompts:
    """Prompts that `generate` continues several times, with all of their images.

    Recent releases of transformers look at images before they repeat a prompt; older ones repeat each image by itself,
    which mixes up the images of prompts with several.
    """

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **inputs):
        """[prompts, ...] -> [prompts * expand_size, ...]."""
        held = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes") if inputs.get(name) is not None}
        if held and expand_size > 1:
            held = self._repeated(**held, ids=input_ids, several=inputs.get("batch_num_images"), times=expand_size)
        ids, inputs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **inputs)
        return ids, inputs | held

    def _repeated(self, pixel_values, image_sizes, ids, several, times):
        """The images of every prompt, one prompt's after the other's, `times` in a row."""
        tiling, sizes = self.model.tiling, [tuple(int(length) for length in size) for size in image_sizes]
        alone = [True] * len(sizes) if several is None else [int(n) == 1 for n in several for _ in range(int(n))]
        tiles = [tiling.count_tiles(size, not one) for size, one in zip(sizes, alone, strict=True)]
        tokens = [tiling.count_tokens(size, not one) for size, one in zip(sizes, alone, strict=True)]
        order, images = [], iter(range(len(sizes)))
        for left in (ids == self.config.image_token_id).sum(1).tolist():
            own = []
            while left > 0:
                own.append(next(images))
                left -= tokens[own[-1]]
            order += own * times
        if pixel_values.dim() == 4:
            parts = pixel_values.split(tiles)
            return {"pixel_values": torch.cat([parts[i] for i in order]), "image_sizes": image_sizes[order]}
        return {"pixel_values": pixel_values[order], "image_sizes": image_sizes[order]}


class CompressedLlavaNext(RepeatedPrompts, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with the projector of its configuration."""

    def __init__(self, config):
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = NextModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


class CompressedLlavaOnevision(RepeatedPrompts, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with the projector of its configuration."""

    def __init__(self, config):
        super(LlavaOnevisionForConditionalGeneration, self).__init__(config)
        self.model = OnevisionModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
