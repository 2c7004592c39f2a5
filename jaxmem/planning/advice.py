"""What would have to change when a program does not fit."""

from __future__ import annotations

import math

from jaxmem.distributed.mesh import PIECES
from jaxmem.planning.chips import GIB, Topology, shapes
from jaxmem.planning.memory import Bytes
from jaxmem.planning.report import Plan, ProgramPlan

_STATE = ("weights", "trained weights", "optimizer", "gradients")
_SHARES = {
    "weights": "raise mesh.fsdp, mesh.sequence or mesh.tensor, which cut them",
    "trained weights": "raise mesh.fsdp or mesh.sequence, which cut them, or train fewer",
    "optimizer": "raise mesh.fsdp, set optimizer.moment_dtype='bfloat16', or train fewer weights",
    "cache": "lower grpo.prompts_at_once, raise mesh.tensor, or shorten prompts and answers",
    "inputs": "lower loop.batch_size or data.buckets (all micro-batches of a step lie in memory), or raise mesh.data",
}
_TRAINING = "raise loop.accumulate, mesh.sequence or mesh.data, or choose a remat policy that keeps less"
_SAMPLING = "lower grpo.prompts_at_once, or raise mesh.sequence, mesh.tensor or mesh.data"


def advice(plan: Plan) -> list[str]:
    """Sentences for every program that does not fit: by how much, of what, and which settings would help.

    The last says on how many chips weights and optimizer alone would fit; there is none when everything fits.
    """
    lines = [_excess(program) for program in plan.programs if not program.bytes.fits]
    if not lines:
        return []
    worst = max((program.bytes for program in plan.programs), key=state)
    return [*lines, _smallest(plan.topology, worst, math.prod(plan.mesh.get(axis, 1) for axis in (*PIECES, "tensor")))]


def state(found: Bytes) -> float:
    """Bytes that stay on a device between steps: weights, memories and optimizer, and gradients where known."""
    return sum(found.kinds.get(kind, 0.0) for kind in _STATE)


def _excess(program: ProgramPlan) -> str:
    """How much too large a program is, what takes a fifth or more of it, and what makes that smaller."""
    found = program.bytes
    large = [(kind, size) for kind, size in found.rows().items() if size >= found.total / 5]
    parts = [
        f"{kind} take {size / GIB:.2f} GiB: {_SHARES.get(kind, _SAMPLING if 'cache' in found.kinds else _TRAINING)}"
        for kind, size in large
    ]
    return (
        f"{program.name} needs {found.total / GIB:.2f} GiB per device, {(found.total - found.limit) / GIB:.2f} GiB more"
        f" than there are. {'. '.join(parts)}"
    )


def _smallest(topology: Topology, found: Bytes, cut: int) -> str:
    """The least number of chips that hold weights and optimizer, and the smallest topology that has as many."""
    whole = state(found) * cut
    chips = max(1, math.ceil(whole / topology.chip.memory))
    line = f"weights and optimizer alone are {whole / GIB:.1f} GiB: at least {chips} {topology.chip.name} chips"
    if topology.chip.kind == "gpu":
        return f"{line}, with room for activations on more"
    fitting = [shape for shape in shapes(topology.chip) if math.prod(shape) >= chips]
    if not fitting:
        return f"{line}, more than its largest slice; choose a chip with more memory"
    smallest = "x".join(map(str, sorted(fitting[0], reverse=1 in fitting[0])))
    return (
        f"{line}, so {topology.chip.name}:{smallest} or larger, with mesh.fsdp x mesh.sequence x mesh.tensor >= {chips}"
    )
