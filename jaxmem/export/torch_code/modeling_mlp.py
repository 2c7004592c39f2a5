"""A branch of PVM's size in the same decoder layers that does not look at the images: the control of PVM.

The branch reduces the residual stream after attention, normalises it, and passes it through a latent SwiGLU; the
result is expanded, normalised without weights and scaled by a learned gate. It is silent at the images' own tokens.

`model.use_memory = False` gives exactly the backbone. Written by jaxmem; needs torch and transformers only.
Axis letters: B rows, T tokens, D model width.
"""

from types import SimpleNamespace

from torch import nn, zeros

from .backbone_jaxmem import Backbone
from .configuration_jaxmem import JaxMemConfig
from .ports_jaxmem import Branch, RMSNorm, SwiGLU, rms_normalise, visual_tokens


class MLPBranch(Branch):
    """gate * norm(expand(swiglu(norm(reduce(x)))))."""

    def __init__(self, settings, layer):
        super().__init__(layer)
        self.settings, self.active, self.silent = settings, False, None
        self.text_reducer = nn.Linear(settings.width, settings.latent, bias=False)
        self.input_norm = RMSNorm(settings.latent, settings.norm_eps)
        self.mlp = SwiGLU(settings.latent, settings.mlp_width)
        self.output_expander = nn.Linear(settings.latent, settings.width, bias=False)
        self.gate_alpha = nn.Parameter(zeros(1))

    def act(self, x, normed):
        """[B, T, D], zero where the token is `silent`; None while the model's memory is off."""
        if not self.active:
            return None
        settings = self.settings
        latent = self.input_norm(self.text_reducer(x if settings.query == "residual" else normed))
        out = self.output_expander(self.mlp(latent)).float()
        out = rms_normalise(out, settings.norm_eps) if settings.output_norm else out
        out = (self.gate_alpha.float() * out).to(x.dtype)
        return out if self.silent is None else out.masked_fill(self.silent[..., None].to(x.device), 0)


class JaxMemForConditionalGeneration(Backbone):
    """The backbone with a branch in some of its decoder layers; `use_memory` switches them all."""

    config_class = JaxMemConfig
    use_memory = True

    def __init__(self, config):
        super().__init__(config)
        settings = SimpleNamespace(**config.jaxmem["memory"])
        for index in settings.layers:
            layer = self.model.language_model.layers[index]
            layer.mlp_branch = MLPBranch(settings, layer)
        self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.post_init()

    def _begin(self, model, args, inputs):
        """Tells the branches which tokens of this call are images."""
        silent = visual_tokens(self.config, args, inputs) if self.use_memory else None
        for index in self.config.jaxmem["memory"]["layers"]:
            branch = model.language_model.layers[index].mlp_branch
            branch.active, branch.silent = self.use_memory, silent if branch.settings.silence else None
