"""What VisMem's paper's own code calls its tensors, and what the tensors of a file say of the memory.

Its state dict names all tensors of the backbone twice, as `base_model.*` and as `peft_model.base_model.model.*`, with
the adapters' factors among them, and the control tokens' rows as the last four of tables that were cut to the
tokenizer's tokens. How names go on follows the release of transformers: "nested" from 4.52 on, "flat" before.
Axis letters: D model width, V tokens of the tokenizer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints import vismem_names
from jaxmem.checkpoints.huggingface import BACKBONE_TABLES
from jaxmem.checkpoints.qwen_names import FLAT, NESTED, Layout
from jaxmem.checkpoints.table import Box, Rule, Table, View, write_tree
from jaxmem.checkpoints.vismem_names import ADAPTERS, fused
from jaxmem.checkpoints.weights import report
from jaxmem.errors import CheckpointError
from jaxmem.memory.vismem import KERNELS, TYPES, VisMemConfig

STYLES: Mapping[str, Layout] = {"nested": NESTED, "flat": FLAT}
BASE, ALIAS = "base_model.", "peft_model.base_model.model."
_FACTOR = re.compile(r"layers\.\d+\.(?:self_attn|mlp)\.(\w+)_proj\.lora_A\.(\w+)_former\.weight$")
_LAYER = "query_builder.encoder.layers."


def table(config: VisMemConfig, backbone: BackboneConfig, style: Layout) -> Table:
    """The rules of the memory's own tensors, in parts (see `vismem_names`)."""
    return vismem_names.table(config, backbone, "", f"{BASE}{style.text}.")


def slim(config: VisMemConfig, backbone: BackboneConfig, params: Any, style: Layout) -> dict[str, View]:
    """Names and tensors of the memory alone, the control tokens' rows as `mem_embed` and `mem_unembed`."""
    return fused(dict(write_tree(table(config, backbone, style), params)))


def once(config: VisMemConfig, backbone: BackboneConfig, base: Any, params: Any, style: Layout) -> dict[str, View]:
    """Names and tensors of memory and backbone, every one under its name `base_model.*`.

    Args:
      config, backbone: of the two trees.
      base, params: arrays, or ShapeDtypeStructs for names and shapes alone.
      style: an entry of `STYLES`.
    """
    own = slim(config, backbone, params, style)
    rows = own.pop("mem_embed")
    heads = own.pop("mem_unembed", rows)
    wrapped = {KERNELS[target] for target in (*config.short_targets, *config.long_targets)}
    rules = BACKBONE_TABLES[backbone.model_type].table(backbone, style)
    found = dict(write_tree(tuple(_wrapped(rule) if _linear(rule) in wrapped else rule for rule in rules), base))
    embed = f"{style.text}.embed_tokens.weight"
    found[style.head] = _longer(found.get(style.head, found[embed]), heads, config.vocab)
    found[embed] = _longer(found[embed], rows, config.vocab)
    return own | {f"{BASE}{name}": tensor for name, tensor in found.items()}


def twice(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """All of `once`, and those of the backbone and its adapters under their second names."""
    return {**tensors, **{alias(name): tensor for name, tensor in tensors.items() if name.startswith(BASE)}}


def alias(name: str) -> str:
    """The second name of a tensor `base_model.*`."""
    return ALIAS + name.removeprefix(BASE)


def _linear(rule: Rule) -> str:
    """The path of the Linear that a rule's leaf belongs to."""
    return rule.ours.rpartition("/")[0]


def _wrapped(rule: Rule) -> Rule:
    """The rule of a Linear that PEFT put an adapter around."""
    module, _, leaf = rule.theirs.rpartition(".")
    return dataclasses.replace(rule, theirs=f"{module}.base_layer.{leaf}")


def _longer(matrix: View, rows: View, vocab: int) -> View:
    """The first V rows of a matrix, then those of the control tokens in its number format: [V + 4, D]."""
    last = rows.cast(matrix.dtype)

    def box(index: Box) -> np.ndarray:
        start, stop = index[0].start, index[0].stop
        parts = [(matrix, start, min(stop, vocab)), (last, max(start - vocab, 0), stop - vocab)]
        read = [part.box((slice(begin, end), *index[1:])) for part, begin, end in parts if begin < end]
        return np.concatenate(read)

    return View((vocab + 4, *matrix.shape[1:]), matrix.dtype, box)


def last_rows(matrix: View) -> View:
    """Those of the control tokens, in the order of `vismem.CONTROL`: [4, D]."""
    above = matrix.shape[0] - 4

    def box(index: Box) -> np.ndarray:
        return matrix.box((slice(above + index[0].start, above + index[0].stop), *index[1:]))

    return View((4, *matrix.shape[1:]), matrix.dtype, box)


def named_once(path: Path, tensors: Mapping[str, View]) -> dict[str, View]:
    """A file's tensors, those with two names under `base_model.*`.

    Raises:
      CheckpointError: formers that are no adapters; a tensor that lacks one of its names while others have both, or
        whose names hold different numbers.
    """
    if tiny := next((name for name in tensors if name.startswith(tuple(f"{a}." for a in ADAPTERS.values()))), None):
        raise CheckpointError(
            f"{path}: its formers are transformers of their own ({tiny}), the tiny_transformer that the released code"
            " takes where PEFT is not installed; here formers are adapters of the backbone: train it again with PEFT"
        )
    second = {BASE + name.removeprefix(ALIAS): view for name, view in tensors.items() if name.startswith(ALIAS)}
    first = {name: view for name, view in tensors.items() if not name.startswith(ALIAS)}
    based = {name for name in first if name.startswith(BASE)}
    both = sorted(based & set(second))
    alone = sorted(based ^ set(second)) if based and second else []
    differing = [name for name in both if not equal(first[name], second[name])]
    named = {"tensors that have one name of two": alone, "tensors whose two names hold different numbers": differing}
    report(path, named, f"Expected {BASE}* and {ALIAS}* to be the same model.")
    return second | first


def style_of(path: Path, tensors: Mapping[str, View], backbone: BackboneConfig) -> Layout:
    """In which style a file names the backbone's modules; CheckpointError in none."""
    known = BACKBONE_TABLES[backbone.model_type].LAYOUTS
    factors = [name for name in tensors if ".lora_" in name]
    for style in (style for style in STYLES.values() if style in known):
        if any(name.startswith(f"{BASE}{style.text}.layers.") for name in factors):
            return style
    wanted = f"{BASE}{known[-1].text}.layers.0.self_attn.q_proj.lora_A.{ADAPTERS['short']}.weight"
    raise CheckpointError(f"{path}: holds no VisMem for a {backbone.model_type}: no tensor is named like {wanted}")


def sizes(path: Path, tensors: Mapping[str, View]) -> dict[str, Any]:
    """Settings that names and shapes show; CheckpointError when a tensor that one is read from is missing."""
    targets: dict[str, dict[str, int]] = {kind: {} for kind in TYPES}
    for name, tensor in tensors.items():
        if (match := _FACTOR.search(name)) and match[2] in targets:
            targets[match[2]][match[1]] = tensor.shape[0]
    shapes = {name: tensor.shape for name, tensor in tensors.items() if len(tensor.shape) > 1}
    needed = [
        "m_init_short",
        "m_init_long",
        "query_builder.q_init",
        "query_builder.pos_emb",
        f"{_LAYER}0.linear1.weight",
    ]
    absent = [name for name in needed if name not in shapes]
    absent += [f"*.lora_A.{ADAPTERS[kind]}.weight" for kind in TYPES if not targets[kind]]
    report(path, {"missing tensors": absent}, "Is it a whole VisMem?")
    short, long, queries, positions, grown = (shapes[name] for name in needed)
    layers = {name.removeprefix(_LAYER).partition(".")[0] for name in tensors if name.startswith(_LAYER)}
    return {
        "short": short[-2],
        "long": long[-2],
        "queries": queries[0],
        "builder_length": positions[-2],
        "builder_layers": len(layers),
        "builder_ff": grown[0] // grown[1],
        "rank": max(max(found.values()) for found in targets.values()),
        **{f"{kind}_targets": tuple(name for name in KERNELS if name in found) for kind, found in targets.items()},
    }


def equal(one: View, two: View) -> bool:
    """Are two tensors the same, in the narrower of their number formats?"""
    return one.shape == two.shape and np.array_equal(_narrow(one, two).read(), _narrow(two, one).read())


def differing_rows(one: View, two: View, rows: int, step: int = 4096) -> int:
    """How many of the first rows of two matrices differ."""
    return sum(_differing(_narrow(one, two), _narrow(two, one), rows, step))


def _differing(one: View, two: View, rows: int, step: int) -> Iterator[int]:
    for start in range(0, rows, step):
        part = (slice(start, min(start + step, rows)), slice(None))
        yield int((one.read(part) != two.read(part)).any(axis=1).sum())


def _narrow(one: View, two: View) -> View:
    """The first in the number format of the second, where that is narrower."""
    return one.cast(two.dtype) if jnp.dtype(two.dtype).itemsize < jnp.dtype(one.dtype).itemsize else one
