"""PVM's second stage on the digit boards: GRPO from the quickstart's memory, on the shipped tiny backbone.

    jaxmem train --config=configs/digits_pvm_grpo.py            # PVM and language model train, three seeds
    jaxmem train --config=configs/digits_pvm_grpo.py:memory     # the PVM alone trains

Eight prompts a step, eight completions of each, and one reward: is the final answer right? With 192 words between image
and question the boards lie beyond what the supervised stage trained on: the model reads most cells, and one mistake in
four reads is enough for a wrong sum.
"""

from ml_collections import ConfigDict

from jaxmem.assets import TINY_PVM
from jaxmem.config import choose

TRAINABLE = {"all": ("**", "!base/visual"), "memory": ("memory",)}


def get_config(what: str = "all") -> ConfigDict:
    boards = {"split": "train", "seed": 7, "k": (192,), "n": (4,), "size": 100_000, "group": 1}
    buckets = {"tokens": (240,), "patches": (64,)}
    return ConfigDict(
        {
            "output": f"runs/digits_pvm_grpo_{what}",
            "seed": 0,
            "seeds": (0, 1, 2),
            "backbone": "",  # the tiny backbone that jaxmem brings along
            "dtype": "float32",
            "memory": None,
            "memory_folder": str(TINY_PVM),  # as the quickstart leaves it
            "trainable": choose(TRAINABLE, what, "argument"),
            "data": {"source": "boards", "boards": boards, "buckets": buckets, "threads": 1, "prefetch": 4},
            "evaluation": {
                "source": "boards",
                "boards": {**boards, "split": "test", "size": 256},
                "buckets": buckets,
                "threads": 1,
                "prefetch": 4,
            },
            "grpo": {
                "rewards": {"functions": ({"name": "board", "weight": 1.0, "read": 0.0},)},
                "group": 8,
                "max_new_tokens": 28,  # four reads and the sum are 22 tokens
                "temperature": 1.0,
                "loss": {"kind": "dapo", "clip_low": 0.2, "clip_high": 0.2, "kl_weight": 0.0},
                "advantage": {"scale": "group", "aggregate": "sum_then_normalize"},
                "iterations": 1,
                "minibatches": 1,
                "mask_truncated": True,
                "resample": 0,
                "samples": 2,
                "samples_every": 10,
            },
            "optimizer": {
                "learning_rate": 2e-4,
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "beta1": 0.9,
                "beta2": 0.99,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
            },
            "loop": {
                "steps": 60,
                "batch_size": 8,
                "accumulate": 1,
                "eval_every": 0,
                "checkpoint_every": 30,
                "checkpoint_seconds": 60.0,
                "keep": 2,
                "keep_best": 1,
                "resume": "auto",
                "progress": True,
                "tensorboard": True,
            },
            "mesh": {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1},
            "hosts": {"start": "auto", "timeout_s": 900.0, "heartbeat_s": 100},
            "remat": False,
        }
    )
