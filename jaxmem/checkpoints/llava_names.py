"""LLaVA-NeXT and LLaVA-OneVision: the mapping table between the official tensor names and our tree.

There are four layouts of names: that of most published folders; the same without the tower's inner prefix, as
`save_pretrained` of releases 5 of transformers writes; and as releases 4 and 5 hold the models in memory. The
projector's names below its prefix are those of `projector_names`.
"""

from __future__ import annotations

import dataclasses

from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.llava_config import MODEL_TYPES
from jaxmem.checkpoints import clip_names, projector_names, qwen_names
from jaxmem.checkpoints.qwen_names import Layout, repeated
from jaxmem.checkpoints.table import Rule, Table

__all__ = ["IGNORED", "LAYOUTS", "MODEL_TYPES", "repeated", "table"]


@dataclasses.dataclass(frozen=True)
class LlavaLayout(Layout):
    """Also in front of the names of the projector and of the newline."""

    joint: str = ""


PUBLISHED = LlavaLayout("language_model.model", "vision_tower.vision_model.", "language_model.lm_head.weight")
SAVED = LlavaLayout("language_model.model", "vision_tower.", "language_model.lm_head.weight")
RELEASE_4 = LlavaLayout("model.language_model", "model.vision_tower.vision_model.", joint="model.")
RELEASE_5 = LlavaLayout("model.language_model", "model.vision_tower.", joint="model.")
LAYOUTS = (PUBLISHED, SAVED, RELEASE_4, RELEASE_5)
IGNORED = r"vision_tower\.(vision_model\.)?(post_layernorm|head)\."
"""What follows the tower's last block in folders: it belongs to pooling, which no projector reads."""


def table(config: BackboneConfig, layout: LlavaLayout = PUBLISHED) -> Table:
    """The rules of a LLaVA-NeXT or LLaVA-OneVision; a tied one has no `head`."""
    vision = config.vision
    return (
        *qwen_names.decoder(config.text, layout),
        *clip_names.tower(vision.tower, "visual/", layout.visual),
        *projector_names.table(vision.projector, "projector/", f"{layout.joint}multi_modal_projector."),
        Rule("newline", f"{layout.joint}image_newline"),
    )
