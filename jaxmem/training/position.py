"""Where in its data a run is: saved with each checkpoint, compared when the run goes on.

The number of steps done is the whole position. Every batch is a pure function of (dataset, seed, step): there is no
buffer, no random state and no file offset that a stored iterator could add, and a pipeline opened at a step gives the
same batches whatever the number of hosts, threads or prefetched batches was before. What can change behind a step
number is the order itself (another dataset, batch size or seed, or another release of the package that shuffles); so
the position holds, beside the step, which records come next.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxmem.checkpoints.identity import differences
from jaxmem.data.pipeline import Pipeline, Rejections
from jaxmem.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class _Weights:
    """As much of a batch as a pipeline looks at."""

    loss_mask: np.ndarray


def position(data: Pipeline, step: int, shown: int = 8) -> dict[str, Any]:
    """What the run reads after `step` steps, as JSON.

    Args:
      data: the training batches.
      step: steps done.
      shown: how many of the next records are listed.

    Returns:
      {"step", "epoch", "batch" (of the epoch), "records", "batch_size", "shuffle", "seed", "next" (indices)}.
    """
    records, per_epoch = len(data.source), data.steps_per_epoch
    numbers = Pipeline(
        range(records),
        encode=int,
        assemble=lambda examples: _Weights(np.ones((len(examples), 2))),  # pyrefly: ignore[bad-argument-type]
        batch_size=data.batch_size,
        shuffle=data.shuffle,
        seed=data.seed,
        rejections=Rejections(records),
        threads=0,
    )
    following = next(numbers.steps(step, step + 1)).examples
    return {
        "step": step,
        "epoch": step // per_epoch,
        "batch": step % per_epoch,
        "records": records,
        "batch_size": data.batch_size,
        "shuffle": data.shuffle,
        "seed": data.seed,
        "next": [int(index) for index in following[:shown]],
    }


def verify(stored: dict[str, Any] | None, data: Pipeline, step: int) -> None:
    """Raises CheckpointError when a run would not read on where it stopped; None is a checkpoint without a position."""
    if stored is not None and (other := differences(stored, position(data, step), "position")):
        raise CheckpointError(
            f"the data of step {step} and later are not what this run read before: {'; '.join(other)}."
            " Restore the dataset, its settings and the packages (run.json lists them), or choose another directory"
        )
