"""The configuration of a backbone with a jaxmem memory: the backbone's own, and a section `jaxmem`.

`jaxmem` = {"format": 1, "backbone": model type, "memory": {"name": ..., settings}}.
"""

from .backbone_jaxmem import MODEL_TYPE, BackboneConfig


class JaxMemConfig(BackboneConfig):
    """A `BackboneConfig` under a model type of its own: without `trust_remote_code` it is refused, not misread."""

    model_type = MODEL_TYPE

    def __init__(self, jaxmem=None, **kwargs):
        super().__init__(**kwargs)
        self.jaxmem = jaxmem or {}
