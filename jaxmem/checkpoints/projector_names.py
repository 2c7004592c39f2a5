"""Projectors: the mapping tables between the tensor names of their authors, or of a Hugging Face folder, and our tree.

A folder in the Hugging Face layout has `multi_modal_projector.linear_{1,2}` of an MLP and `layer_norm, linear_{1,2}`
of InternVL's; transformers knows no other projector, so those have their authors' names below the same prefix.

| projector | names by its authors | prefix there |
| --- | --- | --- |
| mlp (LLaVA) | {0,2} | model.mm_projector. |
| avgpool (DeCo) | mlp_projector.{0,2} | model.mm_projector. |
| ldpv2 (MobileVLM V2) | mlp.mlp.{0,2}, peg.peg.0 | model.mm_projector. |
| tokenpacker | q_proj_1, {k,v}_proj_1.{0,2}, ln_{q,k,v}_1, clip_attn, mlp.{0,2} | model.mm_projector. |
| pixel_shuffle (InternVL) | mlp1.{0,1,3} | none |
| c_abstractor (Honeybee) | abstractor.{pos_emb, net.{0,2}.b{1,2,3}, readout.{0,2}} | none |
| perceiver (LLaVA-NeXT) | vision_resampler.perceiver, mm_projector.{0,2} | model. |
| honeybee | abstractor.{query_tokens, visual_input_fc, encoder.layers, visual_output_fc} | none |
| q_former (BLIP-2) | query_tokens, qformer, language_projection | none |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from jaxmem.backbones import projectors
from jaxmem.backbones.projectors import ProjectorConfig, c_abstractor
from jaxmem.checkpoints.qwen_names import Stack
from jaxmem.checkpoints.table import Reshape, Rule, Table, Transpose, expected
from jaxmem.errors import ConfigError

HF = "multi_modal_projector."
ORIGINAL: Mapping[str, str] = {
    **dict.fromkeys(("mlp", "avgpool", "ldpv2", "tokenpacker"), "model.mm_projector."),
    **{"pixel_shuffle": "", "c_abstractor": "", "perceiver": "model.", "honeybee": "", "q_former": ""},
}
"""The prefix in the authors' checkpoints, by projector or kind of resampler."""
STYLES = ("hf", "original")


def table(config: ProjectorConfig, ours: str = "projector/", theirs: str = HF, style: str = "hf") -> Table:
    """The rules of a projector.

    Args:
      config: which, and its sizes.
      ours: in front of our paths.
      theirs: in front of their names, such as `HF` or `ORIGINAL[...]`.
      style: "hf", or "original" for the names of the projector's authors.

    Raises:
      ConfigError: another style.
    """
    if style not in STYLES:
        raise ConfigError(f"style {style!r} of projector names is not known; there are {', '.join(STYLES)}")
    named = _HF if style == "hf" and config.name in _HF else _RULES
    rules = named[config.kind or config.name](config)
    return tuple(dataclasses.replace(rule, ours=ours + rule.ours, theirs=theirs + rule.theirs) for rule in rules)


def expected_keys(config: ProjectorConfig, theirs: str = HF, style: str = "hf") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the projector has in a folder; arguments and errors as for `table`."""
    return expected(table(config, "", theirs, style), projectors.shapes(config))


def _linear(ours: str, theirs: str, bias: bool = True, stack: Stack = ()) -> list[Rule]:
    """A linear map."""
    rules = [Rule(f"{ours}/kernel", f"{theirs}.weight", (Transpose(),), stack)]
    return [*rules, Rule(f"{ours}/bias", f"{theirs}.bias", (), stack)] if bias else rules


def _norm(ours: str, theirs: str, stack: Stack = ()) -> list[Rule]:
    """A LayerNorm."""
    return [Rule(f"{ours}/scale", f"{theirs}.weight", (), stack), Rule(f"{ours}/bias", f"{theirs}.bias", (), stack)]


def _two(ours: str, theirs: str, bias: bool = True, names: tuple[str, str] = ("0", "2")) -> list[Rule]:
    """A two-layer MLP."""
    return [
        rule for fc, name in zip(("fc1", "fc2"), names, strict=True) for rule in _linear(ours + fc, theirs + name, bias)
    ]


def _conv1(ours: str, theirs: str, rows: int, columns: int, bias: bool = False) -> list[Rule]:
    """A 1x1 convolution [columns, rows, 1, 1], which is a linear map."""
    flatten = Reshape((columns, rows, 1, 1), (columns, rows))
    rules = [Rule(f"{ours}/kernel", f"{theirs}.weight", (flatten, Transpose()))]
    return [*rules, Rule(f"{ours}/bias", f"{theirs}.bias")] if bias else rules


def _depthwise(ours: str, theirs: str, width: int) -> Rule:
    """A depthwise 3x3 convolution [width, 1, 3, 3]."""
    steps = (Reshape((width, 1, 3, 3), (width, 9)), Transpose(), Reshape((9, width), (3, 3, 1, width)))
    return Rule(f"{ours}/kernel", f"{theirs}.weight", steps)


def _row(ours: str, theirs: str, count: int, width: int) -> Rule:
    """Learned vectors with a leading axis of 1 in their file."""
    return Rule(ours, theirs, (Reshape((1, count, width), (count, width)),))


def _mlp(config: ProjectorConfig) -> list[Rule]:
    """LLaVA's `mm_projector`."""
    return _two("mlp/", "", config.bias)


def _hf_mlp(config: ProjectorConfig) -> list[Rule]:
    """The same by the names of transformers."""
    return _two("mlp/", "linear_", config.bias, ("1", "2"))


def _avgpool(config: ProjectorConfig) -> list[Rule]:
    """DeCo's."""
    return _two("mlp/", "mlp_projector.", config.bias)


def _ldpv2(config: ProjectorConfig) -> list[Rule]:
    """MobileVLM V2's."""
    peg = [_depthwise("peg", "peg.peg.0", config.out_width), Rule("peg/bias", "peg.peg.0.bias")]
    return [*_two("mlp/", "mlp.mlp.", config.bias), *peg]


def _tokenpacker(config: ProjectorConfig) -> list[Rule]:
    """TokenPacker's; the maps of its attention lie in one tensor."""
    return [
        *_linear("q", "q_proj_1", bias=False),
        *(rule for x in "kv" for rule in _two(f"{x}/", f"{x}_proj_1.")),
        *(rule for x in "qkv" for rule in _norm(f"norm_{x}", f"ln_{x}_1")),
        Rule("attention/qkv/kernel", "clip_attn.in_proj_weight", (Transpose(),)),
        Rule("attention/qkv/bias", "clip_attn.in_proj_bias"),
        *_linear("attention/o", "clip_attn.out_proj"),
        *_two("mlp/", "mlp.", config.bias),
    ]


def _pixel_shuffle(config: ProjectorConfig) -> list[Rule]:
    """InternVL's."""
    return [*_norm("norm", "mlp1.0"), *_two("mlp/", "mlp1.", config.bias, ("1", "3"))]


def _hf_pixel_shuffle(config: ProjectorConfig) -> list[Rule]:
    """The same by the names of transformers."""
    return [*_norm("norm", "layer_norm"), *_hf_mlp(config)]


def _c_abstractor(config: ProjectorConfig) -> list[Rule]:
    """Honeybee's C-Abstractor; the first block has a shortcut of its own where the tower's width differs."""
    stages, numbers = (("before", 0), ("after", 2)), range(1, config.depth + 1)
    rules = [_row("pos_emb", "abstractor.pos_emb", config.side**2, config.in_width)]
    for stage, place in stages:
        for number in numbers:
            enters = config.in_width if (place, number) == (0, 1) else config.width
            rules += _block(f"{stage}/b{number}/", f"abstractor.net.{place}.b{number}.", enters, config.width)
    return [*rules, *_two("readout/", "abstractor.readout.", config.bias)]


def _block(ours: str, theirs: str, enters: int, width: int) -> list[Rule]:
    """A RegNet bottleneck of C-Abstractor."""
    rules = [_depthwise(f"{ours}conv2", f"{theirs}conv2.conv", width)]
    maps = {"conv1": ("conv1", enters), "conv3": ("conv3", width)}
    maps |= {} if enters == width else {"shortcut": ("downsample", enters)}
    for mine, (its, rows) in maps.items():
        rules += _conv1(ours + mine, f"{theirs}{its}.conv", rows, width)
    for mine, its in {**{mine: its for mine, (its, _) in maps.items()}, "conv2": "conv2"}.items():
        rules += _norm(f"{ours}{mine}_norm", f"{theirs}{its}.bn")
    squeezed = round(c_abstractor.SQUEEZE * enters)
    rules += _conv1(f"{ours}se/fc1", f"{theirs}se.fc1", width, squeezed, bias=True)
    return rules + _conv1(f"{ours}se/fc2", f"{theirs}se.fc2", squeezed, width, bias=True)


def _perceiver(config: ProjectorConfig) -> list[Rule]:
    """LLaVA-NeXT's resampler and the MLP behind it."""
    stack, its = (("i", tuple(range(config.depth))),), "vision_resampler.perceiver."
    maps = {"q": "0.to_q", "kv": "0.to_kv", "o": "0.to_out", "fc1": "1.1", "fc2": "1.3"}
    norms = {"norm_media": "0.norm_media", "norm_latents": "0.norm_latents", "norm_ffn": "1.0"}
    block = f"{its}layers.{{i}}."
    return [
        Rule("latents", f"{its}latents"),
        *(rule for x, y in maps.items() for rule in _linear(f"blocks/{x}", block + y, False, stack)),
        *(rule for x, y in norms.items() for rule in _norm(f"blocks/{x}", block + y, stack)),
        *_norm("norm", f"{its}norm"),
        *_two("mlp/", "mm_projector.", config.bias),
    ]


def _honeybee(config: ProjectorConfig) -> list[Rule]:
    """Honeybee's resampler."""
    stack, block = (("i", tuple(range(config.depth))),), "abstractor.encoder.layers.{i}.crossattention."
    maps = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.out_proj"}
    maps |= {"gate": "output.mlp.w1", "down": "output.mlp.w2", "up": "output.mlp.w3"}
    norms = {"queries": "norm1", "features": "normk", "ffn": "output.norm2", "hidden": "output.mlp.ffn_ln"}
    return [
        _row("queries", "abstractor.query_tokens", config.queries, config.width),
        *_linear("proj_in", "abstractor.visual_input_fc"),
        *(rule for x, y in maps.items() for rule in _linear(f"blocks/{x}", block + y, True, stack)),
        *(rule for x, y in norms.items() for rule in _norm(f"blocks/norm_{x}", block + y, stack)),
        *_linear("proj_out", "abstractor.visual_output_fc"),
    ]


def _q_former(config: ProjectorConfig) -> list[Rule]:
    """BLIP-2's Q-Former; its even layers look at the patches."""
    rules = [_row("queries", "query_tokens", config.queries, config.width), *_norm("norm", "qformer.layernorm")]
    for start, place in enumerate(("first", "second")):
        stack = (("i", tuple(range(start, config.depth, 2))),)
        ours, theirs = f"pairs/{place}/", "qformer.encoder.layer.{i}."
        looks = {"self": "attention", "cross": "crossattention"} if place == "first" else {"self": "attention"}
        for mine, its in looks.items():
            maps = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense"}
            for x, y in maps.items():
                rules += _linear(f"{ours}{mine}/{x}", f"{theirs}{its}.{y}", True, stack)
            rules += _norm(f"{ours}{mine}_norm", f"{theirs}{its}.output.LayerNorm", stack)
        rules += _linear(f"{ours}fc1", f"{theirs}intermediate_query.dense", True, stack)
        rules += _linear(f"{ours}fc2", f"{theirs}output_query.dense", True, stack)
        rules += _norm(f"{ours}ffn_norm", f"{theirs}output_query.LayerNorm", stack)
    return [*rules, *_linear("proj_out", "language_projection")]


_RULES: Mapping[str, Callable[[ProjectorConfig], list[Rule]]] = {
    "mlp": _mlp,
    "avgpool": _avgpool,
    "ldpv2": _ldpv2,
    "tokenpacker": _tokenpacker,
    "pixel_shuffle": _pixel_shuffle,
    "c_abstractor": _c_abstractor,
    "perceiver": _perceiver,
    "honeybee": _honeybee,
    "q_former": _q_former,
}
_HF: Mapping[str, Callable[[ProjectorConfig], list[Rule]]] = {"mlp": _hf_mlp, "pixel_shuffle": _hf_pixel_shuffle}
