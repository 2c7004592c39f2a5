"""The section `grpo.vismem`: which part of VisMem a run trains, and how (arXiv 2511.11007, sections 3.3 and 3.4)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxmem.errors import ConfigError
from jaxmem.sampling.invoking import InvokeConfig

STAGES = ("warm_up", "memory", "invocation")
CONTROLS = ("off", "zero", "noise", "shuffle")
"""Evaluations beside that with memories: none at all, and memories without information."""


@dataclasses.dataclass(frozen=True)
class VisMemStage:
    """One stage of VisMem's training.

    Attributes:
      stage: "warm_up": a memory of random type in front of the reference answer, or with `invoke.anywhere`
        at a random place in it, and cross-entropy; "memory" (Stage I):
        GRPO with memories at random places; "invocation" (Stage II): GRPO with memories where the policy calls.
      bare: warm-up: share of the rows whose answer has no memory in front.
      invoke: how memories are called for; its mode follows from the stage.
      anywhere_from: Stage I: share of the run's steps after which memories may come behind any token, not only behind
        delimiters.
      probability_anywhere: Stage I: of a memory behind a token in that second part; 0 takes what gives as many memories
        as the first part, by the share of delimiters among the tokens of the dataset's reference answers.
      baseline: completions without memory, S_base: "shared", one of each prompt; "paired", one for each completion with
        the same random key; "none". A shared one cancels within the group and is for the metrics alone.
      penalty: Stage II: alpha, the weight of p_type and p_neg.
      gate_penalties: Stage II: completions without a memory have no penalty.
      controls: what an evaluation measures beside: of `CONTROLS`.
    """

    stage: Literal["warm_up", "memory", "invocation"] = "memory"
    bare: float = 0.0
    invoke: InvokeConfig = InvokeConfig()
    anywhere_from: float = 0.5
    probability_anywhere: float = 0.0
    baseline: Literal["none", "shared", "paired"] = "shared"
    penalty: float = 0.3
    gate_penalties: bool = False
    controls: tuple[str, ...] = CONTROLS

    def __post_init__(self) -> None:
        faults = {
            f"stage {self.stage!r} is none of {', '.join(STAGES)}": self.stage not in STAGES,
            f"baseline {self.baseline!r} is none of none, shared, paired": (
                self.baseline not in ("none", "shared", "paired")
            ),
            f"controls {self.controls} may hold {', '.join(CONTROLS)} alone": not set(self.controls) <= set(CONTROLS),
            f"bare is a share, got {self.bare}": not 0 <= self.bare <= 1,
            f"anywhere_from is a share, got {self.anywhere_from}": not 0 <= self.anywhere_from <= 1,
            f"probability_anywhere must lie in [0, 1], got {self.probability_anywhere}": (
                not 0 <= self.probability_anywhere <= 1
            ),
            f"penalty must not be negative, got {self.penalty}": self.penalty < 0,
        }
        if wrong := [message for message, fault in faults.items() if fault]:
            raise ConfigError("grpo.vismem: " + "; ".join(wrong))
