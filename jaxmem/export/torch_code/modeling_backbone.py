"""A backbone without a memory, whose projector or tiling transformers' own class does not have."""

from .backbone_jaxmem import Backbone
from .configuration_jaxmem import JaxMemConfig


class JaxMemForConditionalGeneration(Backbone):
    """The backbone."""

    config_class = JaxMemConfig
