"""VisMem in the layouts of its paper's own code: acceptance checks 45 to 47, against modules of torch and PEFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmem
from jaxmem.backbones import published, registry
from jaxmem.checkpoints.table import View
from jaxmem.data.control import control_ids
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.export import original_vismem, vismem_layout
from jaxmem.memory import vismem
from jaxmem.memory.former import Seen
from jaxmem.model import Spec
from tests.helpers import write_qwen2_tokenizer
from tests.memory import vismem_world as v
from tests.memory.vismem_folder import KNOWN, MEDIA

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")

from tests import tiny  # noqa: E402

WIDTH, QUERIES, SHORT, LONG, RANK, POSITIONS = 64, 8, 8, 16, 16, 2048
FRONT, ALIAS = "base_model.", "peft_model.base_model.model."
FLAT = (("model.language_model.", "model."), ("model.visual.", "visual."))
"""How transformers before 4.52 called what later releases call otherwise."""


class Original(torch.nn.Module):
    """What the released code saves: its modules, of torch and PEFT, with random numbers in float32."""

    def __init__(self, backbone: Any, targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> None:
        super().__init__()
        self.base_model = backbone
        backbone.resize_token_embeddings(KNOWN + 4)
        settings = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=list(targets), task_type="CAUSAL_LM")
        self.peft_model = peft.get_peft_model(backbone, settings, adapter_name="short_former")
        self.peft_model.add_adapter("long_former", settings)
        self.query_builder = torch.nn.Module()
        self.query_builder.q_init = torch.nn.Parameter(torch.zeros(QUERIES, WIDTH))
        self.query_builder.pos_emb = torch.nn.Parameter(torch.zeros(1, POSITIONS, WIDTH))
        layer = torch.nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.query_builder.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.query_builder.ln = torch.nn.LayerNorm(WIDTH)
        self.m_init_short = torch.nn.Parameter(torch.zeros(1, SHORT, WIDTH))
        self.m_init_long = torch.nn.Parameter(torch.zeros(1, LONG, WIDTH))
        generator = torch.Generator().manual_seed(3)
        own = (parameter for name, parameter in self.named_parameters() if "base_model" not in name or "lora_" in name)
        with torch.no_grad():
            for parameter in own:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def backbone(folder: Path, tied: bool = False) -> Any:
    """A tiny Qwen2.5-VL of two decoder layers and a tower of two, 57 tensors, and its folder."""
    ids = write_qwen2_tokenizer(folder, vocab_size=KNOWN)
    media = {key: ids[token] for key, token in MEDIA.items()}
    shape = {"layers": 2, "vision_depth": 2, "vision_fullatt_block_indexes": [1]}
    return tiny.write_qwen2_5_vl(folder, seed=5, tied=tied, **shape, **media)


def state_dict(original: Any, style: str) -> dict[str, Any]:
    """Its state dict, as the release of transformers names it."""
    found = {name: tensor.detach() for name, tensor in original.state_dict().items()}
    for front in (FRONT, ALIAS) if style == "flat" else ():
        for new, old in FLAT:
            renamed = {name: old + name.removeprefix(front + new) for name in found if name.startswith(front + new)}
            found = {front + renamed[name] if name in renamed else name: tensor for name, tensor in found.items()}
    return found


@dataclasses.dataclass(frozen=True)
class World:
    """The released code's model, ours of the same folder, and what one says about the other."""

    original: Any
    ours: jaxmem.Model
    folder: Path

    def save(self, style: str, changed: Mapping[str, Any] | None = None, dropped: tuple[str, ...] = ()) -> Path:
        """`main.pt` with some tensors changed or left out."""
        state = state_dict(self.original, style) | dict(changed or {})
        path = self.folder / "main.pt"
        torch.save({"vismem_state": {n: t for n, t in state.items() if n not in dropped}, "config": {"a": [1]}}, path)
        return path

    def read(self, path: Path, **options: Any) -> Any:
        """What we make of a file."""
        spec = self.ours.spec
        return original_vismem.read(path, spec.backbone, self.ours.base, allow_pickle=True, **options)

    def model(self, config: Any, params: Any) -> jaxmem.Model:
        """Ours with the memory."""
        return dataclasses.replace(self.ours, spec=Spec(self.ours.spec.backbone, (config,)), memory={"vismem": params})


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("untied"), False)


def make_world(folder: Path, tied: bool) -> World:
    theirs = backbone(folder / "base", tied)
    return World(Original(theirs), jaxmem.load(folder / "base"), folder)


@pytest.mark.parametrize("style", ["nested", "flat"])
def test_check_45_torch_to_jax_to_torch_is_the_identity(world: World, style: str, tmp_path: Path) -> None:
    """Every tensor of `main.pt` under both of its names, and of the file with the memory alone."""
    wanted = state_dict(world.original, style)
    config, params = world.read(world.save(style))
    assert (config.vocab, config.tied, config.preset) == (KNOWN, world.ours.spec.backbone.text.tied, "official")
    assert (config.queries, *config.sizes, config.rank, config.alpha) == (QUERIES, SHORT, LONG, RANK, 32)
    assert config.short_targets == config.long_targets == ("q", "k", "v", "o")
    model = world.model(config, params)
    original_vismem.write(model, tmp_path, prefix_style=style)
    found = torch.load(tmp_path / "main.pt", weights_only=True)["vismem_state"]
    assert found.keys() == wanted.keys()
    once = sum(tensor.nbytes for name, tensor in found.items() if not name.startswith(ALIAS))
    assert (tmp_path / "main.pt").stat().st_size < 1.5 * once  # no tensor brings along the file it was mapped from
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    for name in (name for name in found if name.startswith(ALIAS)):
        first = FRONT + name.removeprefix(ALIAS)
        assert found[name].data_ptr() == found[first].data_ptr()
    for source in (tmp_path, tmp_path / "main.pt"):  # the first reads the memory's own file
        again, back = world.read(source)
        assert again == config
        jax.tree.map(np.testing.assert_array_equal, back, params)
    ids = control_ids(transformers.AutoTokenizer.from_pretrained(tmp_path))
    assert list(ids.values()) == [KNOWN, KNOWN + 1, KNOWN + 2, KNOWN + 3]
    slim = safetensors.load_file(tmp_path / "vismem.safetensors")
    kept = {name: tensor for name, tensor in wanted.items() if not name.startswith(ALIAS) and name in slim}
    assert slim.keys() - kept.keys() == ({"mem_embed"} if config.tied else {"mem_embed", "mem_unembed"})
    assert all(torch.equal(slim[name], tensor) for name, tensor in kept.items())
    embed = next(tensor for name, tensor in wanted.items() if name.endswith("embed_tokens.weight"))
    assert torch.equal(slim["mem_embed"], embed[-4:]) and (
        config.tied or torch.equal(slim["mem_unembed"], wanted["base_model.lm_head.weight"][-4:])
    )


def test_check_45_settings_of_our_own_survive(untied: World, tmp_path: Path) -> None:
    """What no tensor shows stands beside them; adapters may differ, and lie beside the MLP."""
    own = {"short_targets": ("v",), "long_targets": ("k", "gate", "down"), "alpha": 5.0, "text_cap": 12}
    config = vismem.create(
        untied.ours.spec.backbone, vocab=KNOWN, **own, short=2, builder_layers=1, builder_ff=2, rank=3
    )
    model = untied.model(config, v.memory_of(config)["vismem"])
    original_vismem.write(model, tmp_path)
    for source in (tmp_path, tmp_path / "main.pt"):
        again, back = untied.read(source)
        assert again == config
        jax.tree.map(np.testing.assert_array_equal, back, model.memory["vismem"])
    (tmp_path / "vismem.json").unlink()
    assert untied.read(tmp_path / "main.pt")[0].preset == "official"
    with pytest.raises(CheckpointError, match=r"how many tokens there are; pass vocab=len\(tokenizer\)"):
        untied.read(tmp_path)
    assert untied.read(tmp_path, vocab=KNOWN, alpha=7.0)[0].alpha == 7.0


def test_check_45_what_does_not_fit_is_refused(untied: World, tmp_path: Path) -> None:
    state = state_dict(untied.original, "nested")
    alias, base = ALIAS, FRONT
    norm = "model.language_model.norm.weight"
    both = lambda tensor: {base + norm: tensor, alias + norm: tensor}  # noqa: E731
    lora = "model.language_model.layers.1.self_attn.q_proj.lora_B.long_former.weight"
    cases: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
        (r"unexpected tensors \(1\): short_memory\.gate", {"short_memory.gate": torch.zeros(2)}, ()),
        (r"unexpected tensors \(1\): query_builder\.extra", {"query_builder.extra": torch.zeros(2)}, ()),
        (r"missing tensors \(1\): query_builder\.ln\.bias", {}, ("query_builder.ln.bias",)),
        (r"missing tensors \(1\): base_model\..*q_proj\.lora_B\.long_former", {}, (base + lora, alias + lora)),
        (r"missing tensors \(1\): m_init_long", {}, ("m_init_long",)),
        (r"one name of two \(1\): base_model\.model\.language_model\.norm", {}, (alias + norm,)),
        (r"hold different numbers \(1\): base_model\..*norm", {alias + norm: state[alias + norm] + 1}, ()),
        (r"of another backbone \(1\): base_model\..*norm", both(state[base + norm] + 1), ()),
        (r"wrongly shaped tensors \(1\): base_model\..*norm.weight \(3,\)", both(torch.ones(3)), ()),
        (r"transformers of their own \(short_former\.m_init\)", {"short_former.m_init": torch.zeros(8, 64)}, ()),
    ]
    for message, changed, dropped in cases:
        with pytest.raises(CheckpointError, match=message):
            untied.read(untied.save("nested", changed, dropped))
    path = untied.save("nested")
    with pytest.raises(CheckpointError, match="pass --allow_pickle"):
        original_vismem.read(path, untied.ours.spec.backbone, untied.ours.base)
    (tmp_path / "main.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="neither vismem.safetensors nor main.pt"):
        untied.read(tmp_path / "..")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "main.pt")
    with pytest.raises(CheckpointError, match="holds no VisMem for a qwen2_5_vl: no tensor is named like base_model"):
        untied.read(tmp_path)


def test_check_45_rows_that_were_trained_along_are_counted(untied: World) -> None:
    embed = "model.language_model.embed_tokens.weight"
    rows = state_dict(untied.original, "nested")[f"base_model.{embed}"].clone()
    rows[3:10] *= 0.99
    path = untied.save("nested", {f"base_model.{embed}": rows, f"peft_model.base_model.model.{embed}": rows})
    with pytest.warns(UserWarning, match=f"7 of {KNOWN} rows of base_model.{embed} are not the backbone's"):
        _, params = untied.read(path)
    np.testing.assert_array_equal(vismem.table(params["rows"]["embed"]), rows[-4:])


def test_check_45_a_tied_head_that_was_untied_is_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path, True)
    head = state_dict(world.original, "nested")["base_model.lm_head.weight"] + 1
    names = ("base_model.lm_head.weight", "peft_model.base_model.model.lm_head.weight")
    with pytest.raises(CheckpointError, match="ties base_model.lm_head.weight to .*embed_tokens.weight, but the two"):
        world.read(world.save("nested", dict.fromkeys(names, head)))
    config, _ = world.read(world.save("nested", {}, names))  # need not be stored twice
    assert config.tied


def test_check_46_peft_loads_the_adapters_and_makes_the_memories(untied: World, tmp_path: Path) -> None:
    """Of the attention in one adapter and the MLP, too, in the other, which the vision tower has as well."""
    settings = {"short": 2, "long": 4, "queries": 3, "rank": 3, "alpha": 5.0, "builder_length": 64, "text_cap": 8}
    targets = {"short_targets": ("q", "v"), "long_targets": ("k", "o", "gate", "up", "down")}
    config = vismem.create(untied.ours.spec.backbone, vocab=KNOWN, **settings, **targets)
    model = untied.model(config, v.memory_of(config)["vismem"])
    original_vismem.write(model, tmp_path)
    rng = np.random.default_rng(4)
    visual, text = (rng.standard_normal((2, count, WIDTH)).astype(np.float32) for count in (6, 5))
    seen = lambda rows: Seen(rows, np.ones(rows.shape[:2], bool))  # noqa: E731
    kinds = np.array([0, 1], np.int32)
    made = v.form(config, model.spec.backbone, model.base, model.memory["vismem"], seen(visual), seen(text), kinds)
    queries = queries_in_torch(tmp_path, np.concatenate([visual, text], 1), config)
    for kind, name in enumerate(vismem.TYPES):
        plain = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(untied.folder / "base").eval()
        folder = tmp_path / f"{name}_former"
        with torch.no_grad():
            adapted = peft.PeftModel.from_pretrained(plain, folder).eval()
        stored = safetensors.load_file(folder / "adapter_model.safetensors")
        held = peft.get_peft_model_state_dict(adapted)
        assert held.keys() == stored.keys() and all(torch.equal(held[key], stored[key]) for key in stored)
        assert not any("visual" in key for key in stored)
        slots = torch.tensor(np.asarray(model.memory["vismem"][f"slots_{name}"]))
        x = torch.cat([torch.tensor(visual[kind]), torch.tensor(text[kind]), queries[kind], slots])[None]
        with torch.no_grad():
            language = adapted.base_model.model.model.language_model
            out = language(inputs_embeds=x, position_ids=torch.arange(x.shape[1])[None], use_cache=False)
        found = out.last_hidden_state[0, -len(slots) :].numpy()
        np.testing.assert_allclose(made[kind, : len(slots)], found, atol=1e-4, rtol=0)


def queries_in_torch(folder: Path, hidden: np.ndarray, config: Any) -> Any:
    """The queries [B, K, D] of torch's own encoder, with the weights of `vismem.safetensors`."""
    layer = torch.nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
    own = torch.nn.Module()
    own.encoder, own.ln = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.nn.LayerNorm(WIDTH)
    own.q_init = torch.nn.Parameter(torch.zeros(config.queries, WIDTH))
    own.pos_emb = torch.nn.Parameter(torch.zeros(1, config.builder_length, WIDTH))
    stored, front = safetensors.load_file(folder / "vismem.safetensors"), "query_builder."
    own.load_state_dict({n.removeprefix(front): t for n, t in stored.items() if n.startswith(front)}, strict=True)
    count = hidden.shape[1]
    with torch.no_grad():
        x = torch.cat([torch.tensor(hidden), own.q_init.expand(len(hidden), -1, -1)], 1)
        x = x + own.pos_emb[:, : x.shape[1]]
        blocked = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
        blocked[:count, count:] = True
        return own.ln(own.encoder.eval()(x, mask=blocked))[:, count:]


def test_check_47_names_of_a_toy_and_of_the_7b_model(untied: World) -> None:
    assert len(state_dict(untied.original, "nested")) == 208
    assert len(untied.original.base_model.state_dict()) == 57 + 2 * 4 * 2 * 2
    large = published.PUBLISHED["Qwen2.5-VL-7B-Instruct"]
    for style, layers in {"nested": "model.language_model.layers", "flat": "model.layers"}.items():
        names = names_of(large, style)
        assert len(names) == 2 * (729 + 4 * 2 * 2 * 28) + 28 + 2 == 2384
        at = f"base_model.{layers}.27.self_attn"
        shapes = {
            "m_init_long": (1, 16, 3584),
            "query_builder.pos_emb": (1, 2048, 3584),
            "query_builder.encoder.layers.1.self_attn.in_proj_weight": (3 * 3584, 3584),
            f"{at}.k_proj.lora_A.short_former.weight": (16, 3584),
            f"{at}.k_proj.lora_B.long_former.weight": (512, 16),
            f"{at}.k_proj.base_layer.bias": (512,),
            f"peft_model.base_model.model.{layers}.0.self_attn.o_proj.base_layer.weight": (3584, 3584),
            "base_model.lm_head.weight": (151_669, 3584),
        }
        assert {name: names[name].shape for name in shapes} == shapes


def names_of(backbone: Any, style: str) -> dict[str, View]:
    """Names and shapes of `main.pt`, without any numbers."""
    config = vismem.create(backbone, preset="official", vocab=151_665)
    params = jax.eval_shape(lambda: vismem.init(jax.random.key(0), config))
    base = registry.backbone(backbone.model_type).shapes(backbone)
    layout = vismem_layout.STYLES[style]
    return vismem_layout.twice(vismem_layout.once(config, backbone, base, params, layout))


def test_what_the_layout_has_no_place_for_is_refused(untied: World, tmp_path: Path) -> None:
    config = vismem.create(untied.ours.spec.backbone, vocab=KNOWN, rank=3)
    model = untied.model(config, v.memory_of(config)["vismem"])
    normed = dataclasses.replace(model, spec=Spec(model.spec.backbone, (dataclasses.replace(config, out_norm=True),)))
    for message, some, options in (
        ("there is a layout for one VisMem, the model has no memory", untied.ours, {}),
        ("prefix_style 'wide' is none of nested, flat", model, {"prefix_style": "wide"}),
        ("has LoRA factors of its own", model.attach_lora(rank=2), {}),
        ("no out_norm; use --to=hf", normed, {}),
    ):
        with pytest.raises(ConfigError, match=message):
            original_vismem.write(some, tmp_path, **options)
    assert not list(tmp_path.iterdir())
