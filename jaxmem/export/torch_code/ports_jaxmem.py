"""What a branch beside the FFN of a decoder layer is made of: y = x + (ffn(norm(x)) + branch).

x is the residual stream after attention. Branches hang on the backbone's modules by hooks, its own code runs as it is.
"""

import torch
from torch import nn

PIXELS = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
"""How images reach a model: as pixels, or already seen by the vision tower."""


class Branch(nn.Module):
    """A module whose output is added to what a decoder layer's FFN gives.

    Subclasses define `act(x, normed)`: the residual stream [B, T, D] and its normalised form, which the FFN reads, to
    [B, T, D], or None where nothing is to be added.
    """

    def __init__(self, layer):
        super().__init__()
        self.x = None
        layer.post_attention_layernorm.register_forward_pre_hook(self._catch)
        layer.mlp.register_forward_hook(self._add)

    def act(self, x, normed):
        """What is added to the FFN's output."""
        raise NotImplementedError

    def _catch(self, norm, args):
        self.x = args[0]

    def _add(self, ffn, args, out):
        x, self.x = self.x, None
        added = self.act(x, args[0])
        return out if added is None else out + added


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast to the dtype of x, times a learned weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return rms_normalise(x, self.eps).to(x.dtype) * self.weight


def rms_normalise(x, eps):
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def visual_tokens(config, args, inputs):
    """Which tokens of a call of the backbone show images or video frames: [B, T] bool; None in a call without any.

    Args:
      config: names the placeholders.
      args, inputs: of the call, which takes the tokens first. A placeholder without pixels, if sampled, is text.
    """
    given = [inputs.get(name) for name in PIXELS]
    given = [part for one in given for part in (one.values() if isinstance(one, dict) else [one])]
    if all(part is None for part in given):
        return None
    tokens = args[0] if args else inputs.get("input_ids")
    if tokens is None:
        raise ValueError("the memory finds images by their placeholder tokens: give input_ids, not inputs_embeds alone")
    media = (getattr(config, f"{kind}_token_id", None) for kind in ("image", "video"))
    return torch.isin(tokens, torch.tensor([token for token in media if token is not None], device=tokens.device))
