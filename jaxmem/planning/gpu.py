"""GPU meshes without a compiler: the figures of a training step by arithmetic from shapes and shardings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from jaxmem.distributed.mesh import PIECES, ROWS
from jaxmem.planning.chips import Topology
from jaxmem.planning.hlo import Counts
from jaxmem.planning.hlo_collectives import Collective, ring_share
from jaxmem.planning.memory import Bytes, tree_bytes
from jaxmem.planning.report import ARITHMETIC, ProgramPlan
from jaxmem.planning.roofline import roofline


@dataclasses.dataclass(frozen=True)
class Step:
    """What arithmetic needs to know of a training step.

    Attributes:
      tokens: of one step over all devices.
      model_flops: useful FLOPs of one step over all devices.
      layers: of the decoder.
      width: of the residual stream.
      kv_width: key heads x head size.
      remat: executed FLOPs per useful one; 4/3 where every layer's forward pass is computed twice.
      passes: how often a step goes through the weights: forward, forward again (remat), backward.
      micro_batches: parts of a step that run one after the other; each goes through the weights.
      activation_bytes: of one activation, 2 for bfloat16.
      workspace: bytes per device of the largest thing that lives for a moment, such as a chunk of logits.
    """

    tokens: float
    model_flops: float
    layers: int
    width: int
    kv_width: int
    remat: float = 4 / 3
    passes: int = 3
    micro_batches: int = 1
    activation_bytes: int = 2
    workspace: float = 0.0


def arithmetic(
    name: str,
    kinds: Mapping[str, Any],
    step: Step,
    topology: Topology,
    mesh: Mapping[str, int],
    trained: str = "trained weights",
    frozen: str = "weights",
) -> ProgramPlan:
    """The plan of a training step on a mesh (`jaxmem.distributed.mesh.AXES`), by arithmetic.

    Assumptions:
      - FLOPs are model FLOPs x remat, spread evenly over the devices.
      - Tokens are spread evenly over `data`, `fsdp` and `sequence`. A block's input is kept for every layer, cut over
        `tensor` too; all else inside a block is computed again, and one layer's weights are gathered at a time.
      - Weights cut over `fsdp` and `sequence` are gathered once per pass and micro-batch.
      - The gradient of the trained tree is as large as the tree. It is reduce-scattered over the axes that cut the
        weight, once per micro-batch, and then all-reduced over the other axes that share the tokens, once.
      - `tensor` all-reduces two activations of every layer per pass; `sequence` gathers every layer's keys and values
        once per pass. Both send as many bytes in the backward pass as in the forward pass.
      - Memory traffic is the gathered weights once per pass and micro-batch, optimizer state and trained weights read
        and written once and their gradient twice, and every layer's input written and read once per pass. Attention
        scores and the inside of fused kernels are taken to stay on the chip.

    Args:
      name: of the program.
      kinds: trees of `ShapeDtypeStruct` by kind, with shardings over `jax.sharding.AbstractMesh` or a real mesh.
      step: what is computed.
      topology: the GPUs.
      mesh: devices per axis; axes that are left out have one.
      trained: the kind that has gradients.
      frozen: the other kind that every pass goes through.
    """
    devices = math.prod(mesh.values())
    rows, sequence, tensor = _ways(mesh, *ROWS), _ways(mesh, "sequence"), _ways(mesh, "tensor")
    stream = step.tokens / (rows * sequence) * step.width * step.activation_bytes / step.micro_batches
    keys = step.tokens / rows * 2 * step.kv_width / tensor * step.activation_bytes / step.micro_batches
    passes, leaves = step.passes * step.micro_batches, jax.tree.leaves([kinds.get(frozen), kinds.get(trained)])
    gathered = float(sum(tree_bytes(leaf) * _cut(leaf, mesh) for leaf in leaves))
    sent = [_collective("all-gather", _cut(leaf, mesh), passes, tree_bytes(leaf) * _cut(leaf, mesh)) for leaf in leaves]
    sent += _gradients(kinds.get(trained), mesh, step.micro_batches)
    sent.append(_collective("all-reduce", tensor, 2 * step.layers * passes, stream))
    sent.append(_collective("all-gather", sequence, step.layers * passes, keys))
    sizes = {kind: float(tree_bytes(tree)) for kind, tree in kinds.items()}
    updated, state = sizes.get(trained, 0.0), sizes.get("optimizer", 0.0)
    moved = passes * (gathered + 2 * step.layers * stream) + 2 * (state + updated) + 2 * updated
    kept = step.layers * stream / tensor + gathered / step.layers + step.workspace
    counts = Counts(step.model_flops * step.remat / devices, moved, _merged(sent))
    return ProgramPlan(
        name,
        Bytes({**sizes, "gradients": updated}, temporaries=kept, limit=topology.memory),
        counts,
        roofline=roofline(counts, topology, devices=devices, model_flops=step.model_flops, tokens=step.tokens),
        label=ARITHMETIC,
    )


def _ways(mesh: Mapping[str, int], *axes: str) -> int:
    """Devices along some axes together."""
    return math.prod(mesh.get(axis, 1) for axis in axes)


def _cut(leaf: Any, mesh: Mapping[str, int]) -> int:
    """Into how many pieces that are gathered again an array is cut."""
    spec = getattr(getattr(leaf, "sharding", None), "spec", ())
    named = [axis for part in spec if part for axis in (part if isinstance(part, tuple) else (part,))]
    return _ways(mesh, *(axis for axis in named if axis in PIECES))


def _gradients(tree: Any, mesh: Mapping[str, int], micro_batches: int) -> list[Collective]:
    """Sums of the gradient over the devices that saw other tokens."""
    sent, sharers = [], _ways(mesh, "data", *PIECES)
    for leaf in jax.tree.leaves(tree):
        cut, piece = _cut(leaf, mesh), tree_bytes(leaf)
        sent.append(_collective("reduce-scatter", cut, micro_batches, piece * cut))
        sent.append(_collective("all-reduce", sharers // cut, 1, piece))
    return sent


def _collective(kind: str, group: int, count: float, payload: float) -> Collective:
    """`count` collectives of `payload` bytes each."""
    return Collective(kind, group, count, count * payload, count * payload * ring_share(kind, group))


def _merged(sent: list[Collective]) -> dict[tuple[str, int], Collective]:
    """By kind and group, without what sends nothing."""
    merged: dict[tuple[str, int], Collective] = {}
    for each in sent:
        if each.group > 1 and each.payload > 0:
            key = (each.kind, each.group)
            merged[key] = merged[key].plus(each) if key in merged else each
    return merged
