"""Two models as one: which encoder may stand beside which model that answers (`Model.with_encoder`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmem.adapters import lora
from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints.identity import backbone_identity, differences
from jaxmem.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from jaxmem.api import Model
    from jaxmem.spec import Spec


def check(model: Model, encoder: Model) -> None:
    """Raises one ConfigError with everything that keeps an encoder from standing beside a model."""
    others = sorted(set(encoder.memory) - {"comem"})
    faults = {
        "the model has an encoder already; begin with one that was just loaded": "encoder" in model.base,
        "the model has a CoMEM that it reads items for itself with; call with_encoder before attach or restore": (
            model.spec.comem is not None and "encoder" not in model.base
        ),
        "the encoder has an encoder of its own; give the one that reads": "encoder" in encoder.base,
        "the encoder has LoRA factors beside its kernels; merge them first (merge_lora)": lora.has_lora(encoder.base),
        f"the encoder has the memories {', '.join(others)}, which would be lost; give it without them": others,
        "encoder and model lie on different meshes; load both with one": encoder.mesh != model.mesh,
    }
    if wrong := [message for message, fault in faults.items() if fault]:
        raise ConfigError("; ".join(wrong))


def check_run(spec: Spec, trained: Mapping[str, Any]) -> None:
    """Raises ConfigError for a run with an encoder beside it that nothing uses, or whose own weights train."""
    if spec.comem is None:
        raise ConfigError('config.encoder reads for a CoMEM, and the model has none: set memory.name to "comem"')
    if "encoder" in trained.get("base", {}):
        raise ConfigError(
            'trainable: the encoder\'s backbone stays as it is (its LoRA factors are "memory/comem/encoder"); add'
            ' "!base/encoder" to the patterns'
        )


def encoder_for(model: Model, stored: Mapping[str, Any] | None, folder: str | Path) -> BackboneConfig | None:
    """The encoder of a CoMEM in a folder.

    Args:
      model: what it is to be restored on.
      stored: the encoder as the folder's settings describe it; None where the model that answers reads for itself.
      folder: for errors.

    Returns:
      The model's encoder; None without one.

    Raises:
      CheckpointError: the memory was made with another encoder than the model has.
    """
    beside = None if model.processor.encoder is None else model.processor.encoder.config
    if stored is None and beside is None:
        return None
    if stored is None:
        kind = model.spec.backbone.model_type
        raise CheckpointError(f"{folder}: in this CoMEM {kind} reads items itself; load it without an encoder")
    about = {"model_type": stored["model_type"]} | {name: stored["text"][name] for name in ("width", "layers")}
    if beside is None:
        words = ", ".join(f"{name} {value}" for name, value in about.items())
        raise CheckpointError(
            f"{folder}: another model reads items for this CoMEM ({words}); name its folder as `encoder` where you"
            " load, or call with_encoder first"
        )
    if other := differences(about, backbone_identity(beside)):
        raise CheckpointError(f"{folder}: made with another encoder: {'; '.join(other)}")
    return beside
