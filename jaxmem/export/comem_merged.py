"""CoMEM with its encoder's factors folded in: whole models in one folder, written, read, and taken apart again.

A merged encoder is the backbone with W + (alpha / rank) * a b in place of each adapted W. `recovered` subtracts the
backbone and finds a and b; since the sum was rounded, so are they, within what the stored numbers can tell. `read`
keeps the encoder as it is, to the bit, as a model of its own beside the one that answers (`Model.with_encoder`).

Axis letters: I inputs and O outputs of a kernel, R rank.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmem.api import Model
from jaxmem.backbones import registry
from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints import comem_names, huggingface
from jaxmem.checkpoints.huggingface import BACKBONE_TABLES, SHARD_SIZE, load_tree
from jaxmem.checkpoints.table import Table, View, expected, flatten, unflatten, view, write_tree
from jaxmem.checkpoints.weights import SINGLE, report, write_json, write_weights
from jaxmem.errors import CheckpointError
from jaxmem.export import comem_layout as layout
from jaxmem.export import hf
from jaxmem.export.comem_layout import INFERENCE, OWN
from jaxmem.memory import comem
from jaxmem.memory.comem import CoMEMConfig

_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Merged:
    """A merged folder as it is.

    Attributes:
      config, params: of a CoMEM without factors.
      encoder: weights of the backbone that reads items.
      answers: weights of the model that answers; None where the folder has none.
    """

    config: CoMEMConfig
    params: Any
    encoder: Any
    answers: Any


def write_merged(model: Model, folder: Path, *, dtype: Any = None, max_shard_size: int = SHARD_SIZE) -> None:
    """Writes whole models under the names that backbones are published with.

    The model that answers stands there as a copy of its own (`model_inf.*`), because the paper's code needs it.

    Args:
      model: with a CoMEM.
      folder: exists and is empty.
      dtype: of all tensors; None keeps the stored ones.
      max_shard_size: bytes per file.

    Raises:
      ConfigError: no CoMEM, or one with a map behind its Q-Former, which the layout has no name for.
    """
    config, backbone = layout.reader_of(model)
    params, answers = model.memory[config.name], {name: part for name, part in model.base.items() if name != "encoder"}
    tensors = [*_written(backbone, _folded(comem.weights(config, model.base, params)))]
    tensors += [(f"{INFERENCE}{name}", tensor) for name, tensor in _written(model.spec.backbone, hf.merged(answers))]
    tensors += write_tree(comem_names.q_former(config.q_former, OWN), {"q_former": params["q_former"]})
    write_weights(folder, hf.cast(tensors, dtype), max_shard_size)
    write_json(folder / "config.json", huggingface.read_config(model.encoder_folder or model.folder))
    kind = model.base["embed"].dtype if dtype is None else dtype
    write_json(folder / layout.ABOUT, layout.about(config, backbone, kind))
    hf.write_beside(model, folder)


def _written(backbone: BackboneConfig, weights: Any) -> Iterator[tuple[str, View]]:
    """A backbone's tensors under their published names."""
    return write_tree(BACKBONE_TABLES[backbone.model_type].table(backbone), weights)


def _folded(node: Any) -> Any:
    """The encoder's weights with their factors added, layer by layer, when they are read."""
    if not isinstance(node, dict):
        return node
    if "lora_a" not in node:
        return {name: _folded(child) for name, child in node.items()}
    kernel, a, b = (view(node[name]) for name in ("kernel", "lora_a", "lora_b"))
    scale, rank = np.asarray(node["lora_scale"]).flat[0], slice(0, a.shape[-1])

    def box(index: tuple[slice, ...]) -> np.ndarray:
        *layers, rows, columns = index
        factors = (a.box((*layers, rows, rank)), b.box((*layers, rank, columns)))
        update = scale * np.matmul(*(factor.astype(np.float32) for factor in factors))
        return (kernel.box(index).astype(np.float32) + update).astype(kernel.dtype)

    plain = {name: leaf for name, leaf in node.items() if not name.startswith("lora_")}
    return plain | {"kernel": View(kernel.shape, kernel.dtype, box)}


def read_merged(
    source: str | Path,
    backbone: BackboneConfig,
    answering: BackboneConfig | None = None,
    *,
    allow_pickle: bool = False,
    **settings: Any,
) -> Merged:
    """A merged folder to the bit: nothing is subtracted.

    Args:
      source: the folder.
      backbone: of the encoder.
      answering: of the model that answers (`model_inf.*`), where it is another one.
      allow_pickle: open pickled files (tensors alone are read).
      **settings: of CoMEMConfig, for what the folder does not say (depth, heads).

    Raises:
      CheckpointError: no whole encoder or no Q-Former, or tensors that do not fit.
    """
    folder = Path(source)
    tensors = layout.merged(folder, allow_pickle)
    if not tensors:
        raise CheckpointError(f"{folder}: holds no whole models ({SINGLE}); read takes an adapter folder")
    own, answering = layout.own(folder, [tensors], allow_pickle), answering or backbone
    given = layout.sizes(folder, own) | layout.noted(folder, backbone)
    config = layout.create(folder, backbone, given | {"query": answering.vision is None} | settings | {"rank": 0})
    encoder, inner = _apart(tensors)
    return Merged(
        config,
        layout.q_former(folder, own, config),
        _loaded(folder, encoder, backbone),
        _loaded(folder, inner, answering) if inner else None,
    )


def _apart(tensors: Mapping[str, View]) -> tuple[dict[str, View], dict[str, View]]:
    """The tensors of the encoder, and of the model that answers without its prefix."""
    inner = {name.removeprefix(INFERENCE): tensor for name, tensor in tensors.items() if name.startswith(INFERENCE)}
    return {n: t for n, t in tensors.items() if not n.startswith((INFERENCE, OWN))}, inner


def _loaded(folder: Path, tensors: Mapping[str, View], backbone: BackboneConfig) -> Any:
    """A backbone's weights as they are stored."""
    table, kept = _fitting(tensors, backbone)
    return load_tree(folder, kept, table, registry.backbone(backbone.model_type).shapes(backbone))


def _fitting(tensors: Mapping[str, View], backbone: BackboneConfig) -> tuple[Table, dict[str, View]]:
    """The backbone's table in the layout that names the tensors, and those that are not there a second time."""
    names, shapes = BACKBONE_TABLES[backbone.model_type], registry.backbone(backbone.model_type).shapes(backbone)
    hits = lambda one: sum(name in tensors for name in expected(names.table(backbone, one), shapes))  # noqa: E731
    best = max(names.LAYOUTS, key=hits)
    twice = names.repeated(backbone, best)
    return names.table(backbone, best), {name: tensor for name, tensor in tensors.items() if name not in twice}


def recovered(
    folder: Path, tensors: Mapping[str, View], config: CoMEMConfig, backbone: BackboneConfig, base: Any
) -> dict[str, Any]:
    """{"encoder": float32 factors} that make a merged encoder of its backbone.

    Warns where the model that answers is no longer the backbone either.

    Args:
      folder: for errors.
      tensors: of the merged folder.
      config: with rank, alpha and kernels of the factors.
      backbone, base: of the encoder before training.

    Raises:
      CheckpointError: the encoder is not this backbone with updates of this rank, within the rounding of what is
        stored; or its tensors do not fit.
    """
    encoder, inner = _apart(tensors)
    table, encoder = _fitting(encoder, backbone)
    shapes = registry.backbone(backbone.model_type).shapes(backbone)
    huggingface._compare(folder, encoder, expected(table, shapes))
    weights, adapted = flatten(base), {f"{path}/kernel": path for path, _ in config.kernels}
    found: dict[str, Any] = {}
    changed, higher = [], []
    for rule in table:
        theirs, ours = rule.read(encoder), view(weights[rule.ours])
        if rule.ours not in adapted:
            changed += [] if _difference(theirs, ours)[1] <= 1 else [rule.theirs]
            continue
        found[adapted[rule.ours]], missed = _factors(theirs, ours, config)
        higher += [] if missed <= 1 else [f"{rule.theirs} (leaves {missed:.1f} times its rounding)"]
    groups = {
        "tensors without factors that are not the backbone's": changed,
        f"tensors whose update is not of rank {config.rank}": higher,
    }
    report(folder, groups, "Was it trained on this backbone, at this rank? read_merged takes the encoder as it is.")
    _warn_of_changed(folder, inner, backbone, weights)
    return unflatten(
        {f"encoder/{path}/{name}": leaf for path, leaves in found.items() for name, leaf in leaves.items()}
    )


def _factors(theirs: View, ours: View, config: CoMEMConfig) -> tuple[dict[str, Any], float]:
    """A kernel's lora_a and lora_b, and what they leave of the update, in units of what rounding may leave."""
    scale, pairs, missed = config.alpha / config.rank, [], 0.0
    for merged, plain in zip(_matrices(theirs), _matrices(ours), strict=True):
        update = merged - plain
        a, b = low_rank(update, config.rank)
        size = np.linalg.norm
        rounding = _eps(theirs, ours) * (size(merged) / 2 + 2 * size(update)) + _least(theirs) * update.size**0.5
        missed = max(missed, float(size(update - a @ b) / rounding))
        pairs.append((a, b / scale))
    stacked = [np.stack(parts) if len(theirs.shape) == 3 else parts[0] for parts in zip(*pairs, strict=True)]
    return {
        name: jnp.asarray(part, jnp.float32) for name, part in zip(("lora_a", "lora_b"), stacked, strict=True)
    }, missed


def low_rank(matrix: np.ndarray, rank: int, rounds: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """The a [I, R] and b [R, O] whose product is nearest to a matrix [I, O] (Halko et al., arXiv 0909.4061, alg. 4.4).

    Subspace iteration needs a few products with thin matrices where an SVD of a large kernel takes minutes.

    Args:
      matrix: float64.
      rank: R; what the matrix lacks of it is filled with zeros.
      rounds: of the iteration; each squares the ratio of what is kept to what is not.
    """
    rows, columns = matrix.shape
    basis = np.random.default_rng(0).standard_normal((columns, min(rank + 8, rows, columns)))
    for _ in range(rounds):
        left = np.linalg.qr(matrix @ basis)[0]
        basis = np.linalg.qr(matrix.T @ left)[0]
    u, s, v = np.linalg.svd(matrix @ basis, full_matrices=False)
    kept = min(rank, len(s))
    a, b = u[:, :kept] * np.sqrt(s[:kept]), np.sqrt(s[:kept])[:, None] * (v[:kept] @ basis.T)
    return np.pad(a, ((0, 0), (0, rank - kept))), np.pad(b, ((0, rank - kept), (0, 0)))


def _matrices(kernel: View) -> Iterator[np.ndarray]:
    """The layers of a kernel [L, I, O], or the only one of [I, O], in float64, one at a time."""
    for part in _parts(kernel) if len(kernel.shape) == 3 else [None]:
        matrix = kernel.read(part).astype(np.float64)
        yield matrix if part is None else matrix[0]


def _parts(tensor: View) -> Iterator[tuple[slice, ...]]:
    """Boxes that make up a tensor: its layers, or some rows at a time."""
    step = _ROWS if len(tensor.shape) < 3 else 1
    for start in range(0, tensor.shape[0], step):
        yield (slice(start, start + step), *(slice(None),) * (len(tensor.shape) - 1))


def _difference(theirs: View, ours: View) -> tuple[float, float]:
    """Of two tensors, the largest difference, and the same in units of what rounding may leave of each number."""
    most, in_units = 0.0, 0.0
    for part in _parts(theirs):
        one, two = (tensor.read(part).astype(np.float32) for tensor in (theirs, ours))
        distance = np.abs(one - two)
        most = max(most, float(distance.max()))
        in_units = max(in_units, float((distance / (_eps(theirs, ours) * np.abs(two) + _least(theirs))).max()))
    return most, in_units


def _eps(*tensors: View) -> float:
    """The spacing of the coarsest tensor's numbers at 1."""
    return max(float(jnp.finfo(tensor.dtype).eps) for tensor in tensors)


def _least(tensor: View) -> float:
    """The spacing of a tensor's numbers at 0: half-precision floats have a coarse one."""
    return float(jnp.finfo(tensor.dtype).smallest_normal) * float(jnp.finfo(tensor.dtype).eps)


def _warn_of_changed(folder: Path, inner: Mapping[str, View], backbone: BackboneConfig, weights: Any) -> None:
    """Warns where a merged folder's model that answers is another one than the backbone."""
    if not inner:
        return
    table, inner = _fitting(inner, backbone)
    if set(inner) != set(expected(table, registry.backbone(backbone.model_type).shapes(backbone))):
        return warn_of_left_out(folder, f"{len(inner)} tensors of another model", None)
    kernels = [rule for rule in table if rule.ours.endswith("kernel")]
    found = [_difference(rule.read(inner), view(weights[rule.ours])) for rule in kernels]
    if max(units for _, units in found) > 1:
        warn_of_left_out(folder, "changes of its weights", max(most for most, _ in found))


def warn_of_left_out(folder: Path, what: str, most: float | None) -> None:
    """Warns of something in the model that answers that is not taken, which changes weights by at most `most`."""
    much = "" if most is None else f"; they change its weights by max |dW| = {most:.3g}"
    warnings.warn(
        f"{folder}: {what} in the model that answers ({INFERENCE}*), which CoMEM leaves frozen, are left out{much}."
        " It answers as the backbone does that you load; read_merged takes a merged one as it is",
        stacklevel=4,
    )
