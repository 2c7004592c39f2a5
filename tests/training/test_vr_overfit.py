"""Check 27: 64 rows are learnt by heart, with Vision Remember and without; its gates move away from zero."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxmem.backbones import llava
from jaxmem.data.batching import Buckets, collate
from jaxmem.memory import vision_remember
from jaxmem.model import Spec
from jaxmem.training import descent, placing, sft, trees
from jaxmem.training.optimizer import OptimizerConfig
from tests.distributed.test_vr_meshes import BACKBONE, row

ROWS, STEPS = 64, 150
SMALL = {"layers": (0, 2), "inner": 32, "heads": 4}


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("preset", ["none", "vr_v1", pytest.param("vr_v2", marks=pytest.mark.slow)])
def test_check_27_rows_are_learnt_by_heart(preset: str) -> None:
    config = None if preset == "none" else vision_remember.create(BACKBONE, preset=preset, **SMALL)
    spec = Spec(BACKBONE, () if config is None else (config,))
    rng = np.random.default_rng(5)
    batch = collate([row(rng, (30, 30), 14) for _ in range(ROWS)], Buckets((32,), (48,)), 1)
    memory = {} if config is None else {config.name: vision_remember.init(jax.random.key(1), config)}
    trainable, frozen = trees.split({"base": llava.init(jax.random.key(0), BACKBONE), "memory": memory}, "**")
    about = OptimizerConfig(learning_rate=4e-3, warmup_ratio=0.1, multipliers=())
    step = sft.make_train_step(sft.model_forward(spec, trainable), about, STEPS, trainable)
    state, losses = descent.init_state(about, trainable, 0), []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, placing.place(batch, 1, None))
        losses.append(float(metrics["loss"]))
    assert losses[0] > 3 and losses[-1] < 0.05
    if config is not None:
        blocks = state.trainable["memory"][config.name]["blocks"]
        gates = [leaf for path, leaf in trees.leaves(blocks) if path.endswith("gate")]
        assert len(gates) == (2 if config.bidirectional else 1)
        assert all(float(np.abs(gate).min()) > 1e-4 for gate in gates)
