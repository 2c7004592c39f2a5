"""Vision Remember: the mapping table between our tree and the modules of an exported folder.

| ours | theirs, behind the prefix |
| --- | --- |
| fusion/norm, of each level | fusion.norms.{level} |
| fusion/norm, of joined levels | fusion.norm |
| fusion/kernel, fusion/weights | fusion.linear.weight, fusion.weights |
| blocks/cross/q/kernel (k, v, o) | blocks.{slot}.cross.q.weight |
| blocks/cross/norm_query/scale (norm_key) | blocks.{slot}.cross.norm_query.weight |
| blocks/cross/saliency | blocks.{slot}.cross.saliency.weight |
| blocks/cross/position, gate | blocks.{slot}.cross.position, gate |
| blocks/bidirectional, text, ffn | blocks.{slot}.bidirectional, text, ffn, alike |
"""

from __future__ import annotations

import jax

from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints.table import Reshape, Rule, Table, Transpose, flatten
from jaxmem.memory import vision_remember
from jaxmem.memory.vision_remember import VisionRememberConfig

NAME = "vision_remember"
_WORDS = {"kernel": "weight", "scale": "weight", "saliency": "saliency.weight"}
_MAPS = ("kernel", "saliency")


def table(config: VisionRememberConfig, backbone: BackboneConfig, prefix: str = "memory.") -> Table:
    """One rule per leaf; blocks lie in the order of `config.layers`.

    Args:
      config: settings.
      backbone: what it is trained on; the names are the same on all of them.
      prefix: in front of their names.
    """
    shapes = jax.eval_shape(lambda: vision_remember.init(jax.random.key(0), config))
    return tuple(_rule(config, path, prefix) for path in flatten(shapes))


def _rule(config: VisionRememberConfig, path: str, prefix: str) -> Rule:
    """The rule of a leaf."""
    part, *between, last = path.split("/")
    word = _WORDS.get(last, last)
    if part == "fusion":
        return _fusion(config, path, prefix, word)
    steps = (Transpose(),) if last in _MAPS else ()
    if last == "gate" and config.gate_shape == "scalar":
        steps = (Reshape((1,), ()),)
    slots = (("slot", tuple(range(len(config.layers)))),)
    return Rule(path, ".".join([f"{prefix}blocks.{{slot}}", *between, word]), steps, slots)


def _fusion(config: VisionRememberConfig, path: str, prefix: str, word: str) -> Rule:
    """The rule of a leaf that all blocks share."""
    if not path.startswith("fusion/norm/"):
        kernel = path == "fusion/kernel"
        return Rule(path, f"{prefix}fusion.{'linear.' * kernel}{word}", (Transpose(),) if kernel else ())
    if config.level_norm == "joined":
        return Rule(path, f"{prefix}fusion.norm.{word}")
    return Rule(path, f"{prefix}fusion.norms.{{level}}.{word}", (), (("level", tuple(range(len(config.levels)))),))
