"""Acceptance check 6 of PVM: a state dict in the official layout gives the same numbers in torch and here."""

import jax
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from jaxmem.checkpoints import pvm_names
from jaxmem.checkpoints.huggingface import load_tree
from jaxmem.checkpoints.table import expected, write_tree
from jaxmem.checkpoints.weights import open_file
from jaxmem.memory import pvm
from tests.memory import world as w

H, EPS = w.ALL.head_dim, w.ALL.norm_eps
BLOCK = "model.language_model.layers.{}.pvm_block."


def official_state_dict() -> dict[str, torch.Tensor]:
    """Random tensors under the names and in the (out, in) layout of the PVM paper."""
    d, r, heads, key, mlp = w.ALL.width, w.ALL.latent, w.ALL.heads * H, w.ALL.kv_heads * H, w.ALL.mlp_width
    linear = {"text_reducer": (r, d), "vision_reducer": (r, d), "output_expander": (d, r)}
    linear |= {"cross_attn.q_proj": (heads, r), "cross_attn.o_proj": (r, heads)}
    linear |= {"cross_attn.k_proj": (key, r), "cross_attn.v_proj": (key, r)}
    linear |= {"mlp.gate_proj": (mlp, r), "mlp.up_proj": (mlp, r), "mlp.down_proj": (r, mlp)}
    norms = {"input_norm": r, "post_attn_norm": r, "cross_attn.q_norm": H, "cross_attn.k_norm": H}
    generator, state = torch.Generator().manual_seed(0), {}
    for layer, gate in zip(w.ALL.layers, w.GATES, strict=True):
        prefix = BLOCK.format(layer)
        for name, shape in linear.items():
            state[f"{prefix}{name}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        for name, width in norms.items():
            state[f"{prefix}{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
        state[prefix + "gate_alpha"] = torch.tensor([gate])
    return state


def norm(x, weight=None):
    """RMSNorm: float32 inside, cast, then times the weight."""
    y = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return y if weight is None else y * weight


def torch_branch(state, layer, x, visual, padmask, is_visual):
    """Steps 1 to 15 of the PVM paper, batched, with an additive mask over padded visual rows."""
    p = {name.removeprefix(BLOCK.format(layer)): t for name, t in state.items() if name.startswith(BLOCK.format(layer))}
    linear = lambda name, value: F.linear(value, p[f"{name}.weight"])  # noqa: E731
    heads = lambda value: value.reshape(*value.shape[:2], -1, H)  # noqa: E731
    asked, latent = norm(linear("text_reducer", x), p["input_norm.weight"]), linear("vision_reducer", visual)
    q = norm(heads(linear("cross_attn.q_proj", asked)), p["cross_attn.q_norm.weight"]).transpose(1, 2)
    k = norm(heads(linear("cross_attn.k_proj", latent)), p["cross_attn.k_norm.weight"]).transpose(1, 2)
    v = heads(linear("cross_attn.v_proj", latent)).transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / H**0.5 + padmask[:, None, None]
    found = torch.softmax(scores.float(), -1).to(v.dtype) @ v
    o = linear("cross_attn.o_proj", found.transpose(1, 2).reshape(*x.shape[:2], -1))
    t = norm(o, p["post_attn_norm.weight"])
    z = o + linear("mlp.down_proj", F.silu(linear("mlp.gate_proj", t)) * linear("mlp.up_proj", t))
    return p["gate_alpha"] * norm(linear("output_expander", z)) * (~is_visual)[..., None]


def test_check_06_official_state_dict_reproduces_outputs(branch, tmp_path):
    state = official_state_dict()
    assert len(state) == 45
    save_file(state, tmp_path / "official.safetensors")
    shapes = jax.eval_shape(lambda: pvm.init(jax.random.key(0), w.ALL))
    params = load_tree(tmp_path, open_file(tmp_path / "official.safetensors"), pvm_names.table(w.ALL), shapes)
    ours = np.asarray(branch.inject(w.ALL, params))

    batch, fix = branch.batch, lambda a: torch.from_numpy(np.array(a))
    count = np.asarray(batch.is_visual).sum(1)[:, None]
    padded = fix(np.arange(9)[None] >= count)
    visual = torch.where(padded[..., None], 0.0, fix(branch.visual))  # the original pads with zero vectors
    padmask = torch.where(padded, torch.finfo(torch.float32).min, 0.0)
    with torch.no_grad():
        theirs = [
            torch_branch(state, layer, fix(branch.x), visual, padmask, fix(batch.is_visual)) for layer in w.ALL.layers
        ]
    valid = np.asarray(batch.segments) > 0  # padding is text to the original, and nothing here
    for slot, want in enumerate(theirs):
        np.testing.assert_allclose(ours[slot][valid], want.numpy()[valid], atol=1e-5)
        assert not want.numpy()[2].any()  # a row of text: uniform attention over zero vectors
    assert np.abs(ours).max() > 0.5

    tensors = {name: view.read() for name, view in write_tree(pvm_names.table(w.ALL), params)}
    assert set(tensors) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensors[name], tensor.numpy(), err_msg=name)


def test_check_06_names_and_shapes_are_the_official_ones():
    shapes = jax.eval_shape(lambda: pvm.init(jax.random.key(0), w.ALL))
    official = {name: tuple(tensor.shape) for name, tensor in official_state_dict().items()}
    assert expected(pvm_names.table(w.ALL), shapes) == official
