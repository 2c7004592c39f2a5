"""Floating-point operations that a step needs: the numerator of model FLOP utilisation.

Convention: a multiplication and an addition are two operations. A forward pass takes 2 for each weight and token; a
backward pass 2 more for the gradient of each activation that something below it needs, and 2 more for each weight that
trains. Causal attention counts half of the square. Recomputation (remat) is not needed, so it does not count. Every row
is taken to be as long as its bucket.

A memory of VisMem takes the query builder, and the decoder without its head over visual and text states, queries and
the mean of the types' vectors; adapters are left out. Every completion has as many memories as the caller says.
Rollouts read the visual states once per prompt and type, training reads them for each memory. Where formers train,
completions are read twice forwards: memories are formed of the states that the first pass leaves.

A CoMEM takes, for each item of a row, the vision tower and the decoder without its head, and the Q-Former, whose keys
of the item are made once; of its factors only the Q-Former's weights are counted. Where another backbone reads for the
one that answers, these are its tower and decoder, and it reads the prompt too.

A tower that trains takes two more forward passes for its backward pass. Vision Remember takes the products of its
formulas, on prompts alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmem.backbones import registry
from jaxmem.backbones.llava_config import TileVision
from jaxmem.memory.mlp_branch import MLPConfig
from jaxmem.memory.pvm import PVMConfig
from jaxmem.memory.vision_remember import VisionRememberConfig
from jaxmem.memory.vismem import TYPES
from jaxmem.model import Spec
from jaxmem.training import trees


@dataclasses.dataclass(frozen=True)
class Needed:
    """Operations per row.

    Attributes:
      spec: what is computed.
      trainable: what trains (shapes).
      tokens: T of a prompt or row.
      patches: P of a row.
      memories: of VisMem in each completion.
      text: states of the text that each of them is formed of.
      items: of CoMEM: knowledge items of a row, and their T and P.
      query: of CoMEM: T and P of the prompt as an encoder beside the model reads it.
    """

    spec: Spec
    trainable: Any
    tokens: int
    patches: int
    memories: int = 0
    text: int = 0
    items: tuple[int, int, int] = (0, 0, 0)
    query: tuple[int, int] = (0, 0)

    @property
    def _layer(self) -> float:
        """Weights of one decoder layer's matrices."""
        t = self.spec.backbone.text
        return t.width * t.head_dim * (2 * t.heads + 2 * t.kv_heads) + 3 * t.width * t.mlp_width

    @property
    def _head(self) -> float:
        return self.spec.backbone.text.vocab * self.spec.backbone.text.width

    def _attention(self, pairs: float) -> float:
        """Scores and weighted sums of one layer for (query, key) pairs."""
        t = self.spec.backbone.text
        return 4.0 * t.heads * t.head_dim * pairs

    @property
    def _share_above(self) -> float:
        """Share of the layers through which a gradient flows back."""
        if "base" in self.trainable:
            return 1.0
        return 1.0 - self.spec.first_port_layer / self.spec.backbone.text.layers

    def _tower(self, patches: int | None = None) -> float:
        """The vision tower with its mergers or projector, forwards; images are taken to fill all patches of a row in
        one frame, or in tiles.

        Attention in windows is taken to fill them.
        """
        backbone, patches = self.spec.backbone, self.patches if patches is None else patches
        if backbone.vision is None:
            return 0.0
        shapes = registry.backbone(backbone.model_type).shapes(backbone)
        if isinstance(backbone.vision, TileVision):
            return self._tiles(backbone.vision, shapes, patches / backbone.vision.tile_patches)
        vision, visual = backbone.vision, shapes["visual"]
        blocks = trees.count(visual["blocks"]) + trees.count(visual["patch_embed"])
        mergers = trees.count(visual["merger"]) + trees.count(visual.get("deepstack", {}))
        windowed = vision.depth - len(vision.full_blocks) if vision.window else 0
        pairs = (vision.depth - windowed) * patches + windowed * min(vision.window_patches, patches)
        attention = 4.0 * vision.width * patches * pairs
        return 2.0 * (patches * blocks + patches / vision.merge_unit * mergers) + attention

    @staticmethod
    def _tiles(vision: TileVision, shapes: Any, tiles: float) -> float:
        """A CLIP or SigLIP over tiles and the maps of the projector, whose weights every visual row passes once."""
        tower, seen = vision.tower, vision.tower.places
        blocks = trees.count(shapes["visual"]["blocks"]) * vision.depth_used / tower.depth
        embed, attention = trees.count(shapes["visual"]["patch_embed"]), 4.0 * tower.width * seen**2 * vision.depth_used
        maps = vision.projector.tokens * trees.count(shapes["projector"])
        return tiles * (2.0 * (seen * blocks + vision.tile_patches * embed + maps) + attention)

    @property
    def _tower_trains(self) -> bool:
        """Does the vision tower train? A backward pass takes twice its forward pass then."""
        return "visual" in self.trainable.get("base", {})

    def _remember(self, config: VisionRememberConfig) -> float:
        """Vision Remember over the rows of a prompt, forwards (the products of its formulas)."""
        rows, patches = self.spec.backbone.visual_rows(self.patches), self.patches
        c, s = config, config.layer
        joined = c.tower_width * len(c.levels)
        fused = 2.0 * patches * joined * c.features if c.fusion == "concat_linear" else 0.0
        keys = s.keys or patches
        direct = 4.0 * rows * keys * c.features * c.inner + 4.0 * rows * keys * c.inner
        absorbed = 4.0 * rows * c.features * c.inner + 4.0 * rows * keys * c.heads * c.features
        block = 4.0 * rows * c.width * c.inner + (absorbed if c.impl == "absorbed" else direct)
        if c.bidirectional:
            block += 8.0 * rows * c.width * c.inner + 4.0 * rows**2 * c.inner
        return fused + len(c.layers) * block

    def _q_former(self) -> float:
        """One item's hidden states to its embeddings, forwards."""
        assert self.spec.comem is not None
        c, length = self.spec.comem.q_former, self.items[1]
        inner = c.heads * c.head_dim
        once = 2.0 * length * (c.in_width * c.width + 2 * c.width * inner) + 2.0 * c.latents * c.width**2
        each = 2.0 * c.latents * c.width * (4 * inner + 2 * c.ff_mult * c.width)
        looks = 4.0 * c.latents * inner * (length + c.latents)
        return once + c.depth * (each + looks)

    def _encoded(self, tokens: int, patches: int) -> float:
        """An item or a prompt in CoMEM's encoder, forwards."""
        beside = None if self.spec.comem is None else self.spec.comem.encoder
        reader = self if beside is None else dataclasses.replace(self, spec=Spec(beside))
        return reader._tower(patches) + reader._decoder(tokens, tokens**2 / 2)

    def encode(self) -> float:
        """The items of a row, and its prompt where an encoder beside the model reads it, forwards."""
        (count, *lengths), asked = self.items, self.query[0]
        items = count * (self._encoded(*lengths) + self._q_former()) if count else 0.0
        return items + (self._encoded(*self.query) if asked else 0.0)

    def _learn_items(self) -> float:
        """The same, forwards and backwards where something of CoMEM trains."""
        trains = "comem" in self.trainable.get("memory", {})
        return self.encode() * (2 if trains else 1) + (self.items[0] * self._q_former() if trains else 0.0)

    def _memory(self, tokens: float) -> float:
        """Branches of the memories for some tokens, which ask all visual rows."""
        rows, total = self.spec.backbone.visual_rows(self.patches), 0.0
        for config in self.spec.memories:
            if not isinstance(config, PVMConfig | MLPConfig):
                continue  # acts between tokens, in front of them, or on prompts alone (`_look`)
            per_layer = 2 * config.width * config.latent + 2 * config.latent**2 + 3 * config.latent * config.mlp_width
            total += len(config.layers) * (2.0 * tokens * per_layer + 4.0 * tokens * rows * config.latent)
        return total

    def _look(self) -> float:
        """What memories do that look at the tower's features while a prompt is read."""
        return sum(self._remember(config) for config in self.spec.memories if isinstance(config, VisionRememberConfig))

    def _decoder(self, tokens: float, pairs: float) -> float:
        """All layers without the head."""
        return self.spec.backbone.text.layers * (2.0 * tokens * self._layer + self._attention(pairs))

    @property
    def _visual(self) -> float:
        """Visual states that a memory is formed of."""
        assert self.spec.vismem is not None
        return min(self.spec.backbone.visual_rows(self.patches), self.spec.vismem.visual_cap)

    def _builder(self) -> float:
        """The queries of one memory, forwards."""
        assert self.spec.vismem is not None
        c = self.spec.vismem.builder
        hidden = self._visual + min(self.text, self.spec.vismem.text_cap)
        pairs = hidden**2 + c.queries * (hidden + c.queries)
        return c.layers * ((hidden + c.queries) * 2.0 * c.width**2 * (4 + 2 * c.ff_mult) + 4.0 * c.width * pairs)

    def _former(self) -> float:
        """What follows the visual states of one memory, forwards."""
        assert self.spec.vismem is not None
        own = min(self.text, self.spec.vismem.text_cap) + self.spec.vismem.queries + sum(self.spec.vismem.sizes) / 2
        return self._decoder(own, own * (self._visual + own / 2))

    def _prefix(self) -> float:
        """The visual states of a memory, forwards."""
        return self._decoder(self._visual, self._visual**2 / 2)

    def form(self) -> float:
        """One memory from its states, forwards."""
        return self._builder() + self._prefix() + self._former()

    @property
    def _forms(self) -> bool:
        """Are memories formed again, because something trains that forms them?"""
        return bool(self.memories) and any(
            name != "rows" for name in self.trainable.get("memory", {}).get("vismem", {})
        )

    def _backward(self, forward: float, tokens: float, head: float) -> float:
        """What a backward pass adds to a decoder's and a head's forward operations."""
        trained = self.trainable.get("base", {})
        looked_up = () if self.spec.backbone.text.tied else ("embed",)  # a tied embedding is the head too
        looked_up += ("visual", "projector", "newline")  # which other rows pass (`_learn_tower`)
        size = trees.count({name: leaf for name, leaf in trained.items() if name not in looked_up})
        return forward * self._share_above + head + 2.0 * tokens * size

    def read_row(self) -> float:
        """A prompt, forwards, with the logits of its last token."""
        body = self._decoder(self.tokens, self.tokens**2 / 2)
        return self.encode() + self._tower() + self._look() + body + self._memory(self.tokens)

    def _learn_tower(self) -> float:
        """The tower, forwards, and backwards where it trains; and what looks at it."""
        return self._tower() * (3 if self._tower_trains else 1) + 3 * self._look()

    def learn_row(self) -> float:
        """A supervised row whose tokens all count, forwards and backwards."""
        body = self._decoder(self.tokens, self.tokens**2 / 2)
        head, memory = 2.0 * self.tokens * self._head, self._memory(self.tokens)
        own = self._learn_items() + self._learn_tower() + body + head + 3 * memory
        return own + self._backward(body, self.tokens, head)

    def _group(self, group: int, new: int) -> tuple[float, float]:
        """(decoder, head) operations of a group's completions behind their prompt, forwards."""
        pairs = group * new * (self.tokens + new / 2)
        return self._decoder(group * new, pairs), 2.0 * group * new * self._head

    def write_group(self, group: int, new: int) -> float:
        """Sampling a group's completions, one token after the other, behind a prompt that was read."""
        found = sum(self._group(group, new)) + self._memory(group * new)
        if self.memories:
            found += group * self.memories * (self._builder() + self._former()) + len(TYPES) * self._prefix()
        return found

    def score_group(self, group: int, new: int) -> float:
        """Log-probabilities of a group's completions with their prompt, forwards."""
        body, head = self._group(group, new)
        found = self.read_row() + body + head + self._memory(group * new)
        if self._forms:
            found += body + group * self.memories * self.form()
        return found

    def learn_group(self, group: int, new: int) -> float:
        """The same, forwards and backwards."""
        body, head = self._group(group, new)
        prompt, tokens = self._decoder(self.tokens, self.tokens**2 / 2), self.tokens + group * new
        if self.spec.vismem is not None and "base" not in self.trainable:
            return self.score_group(group, new) + self._backward_of_memories(body, head, group)
        body += prompt
        own = self._learn_items() + self._learn_tower() + body + head + 3 * self._memory(tokens)
        return own + self._backward(body, tokens, head)

    def _backward_of_memories(self, body: float, head: float, group: int) -> float:
        """What a backward pass adds where VisMem alone trains: none of it flows into prompts."""
        found = body + head
        if self._forms:
            formed = group * self.memories
            found += formed * (self.form() + self._builder())
            found += body if self.spec.vismem and self.spec.vismem.backprop_hidden else 0.0
        return found
