"""`jaxmem train` with LoRA: factors alone train, and what is left is an adapter."""

import jax
import numpy as np

from jaxmem import api
from jaxmem.adapters import lora
from jaxmem.training import run, trees

CONFIG = {
    "memory": None,
    "lora": {"rank": 2, "alpha": 4, "targets": ["q", "down"]},
    "trainable": list(lora.TRAINABLE),
    "dtype": "float32",
    "data": {"source": "boards", "boards": {"size": 64, "n": [2]}, "buckets": {"tokens": [64], "patches": [64]}},
    "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0.0},
    "loop": {"steps": 3, "batch_size": 4, "checkpoint_every": 2, "progress": False},
}


def test_a_run_trains_factors_and_leaves_an_adapter(tmp_path):
    result = run.train(CONFIG | {"output": str(tmp_path)})
    before, after = api.load(dtype="float32"), result.model
    jax.tree.map(np.testing.assert_array_equal, before.base, lora.strip(after.base))
    assert all(np.any(leaf) for path, leaf in trees.leaves(after.base) if path.endswith("lora_b"))
    assert (tmp_path / run.ADAPTER).is_dir() and not (tmp_path / run.BACKBONE).exists()
    again = before.restore_lora(tmp_path / run.ADAPTER)
    for (path, ours), (_, kept) in zip(trees.leaves(after.base), trees.leaves(again.base), strict=True):
        np.testing.assert_array_equal(ours, kept, err_msg=path)
    resumed = run.train(CONFIG | {"output": str(tmp_path)})
    jax.tree.map(np.testing.assert_array_equal, resumed.model.base, after.base)


def test_weights_that_train_beside_the_factors_are_saved_too(tmp_path):
    patterns = [*lora.TRAINABLE, "base/norm"]
    result = run.train(CONFIG | {"output": str(tmp_path), "trainable": patterns})
    plain = api.load(tmp_path / run.BACKBONE, "float32")
    jax.tree.map(np.testing.assert_array_equal, plain.base, lora.strip(result.model.base))
    assert np.any(plain.base["norm"]["scale"] != api.load(dtype="float32").base["norm"]["scale"])
    again = plain.restore_lora(tmp_path / run.ADAPTER)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(again.base), lora.merge(result.model.base))
