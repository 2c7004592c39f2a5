"""VisMem on the digit boards: its stages on the shipped tiny backbone, three seeds, one command.

    jaxmem train --config=configs/digits_vismem.py

Half of the boards are hidden from the backbone's text (`loop.p_block`): there it can only guess, and a memory is the
one way to the image. The warm-up teaches with reference answers. The tiny backbone finds the letter that it is asked
for by its distance, so anything that comes between breaks its text; LoRA factors learn to bear that beside the formers,
which learn to say what the image shows. A quarter of the answers have no memory and keep the image, so that the
backbone goes on reading. Then the factors are frozen: Stage I improves the formers by GRPO with memories at random
places, and Stage II trains the rows of the control tokens alone: when to call. The reward is the share of cells that
are read.
"""

from ml_collections import ConfigDict

FORMERS = ("memory/vismem", "!memory/vismem/rows")
ROWS = ("memory/vismem/rows/embed", "memory/vismem/rows/unembed/invoke")


def get_config() -> ConfigDict:
    boards = {"split": "train", "seed": 11, "k": (0,), "n": (4,), "size": 100_000, "group": 1}
    buckets = {"tokens": (48,), "patches": (64,)}
    data = {"source": "boards", "buckets": buckets, "threads": 1, "prefetch": 4}
    return ConfigDict(
        {
            "output": "runs/digits_vismem",
            "seed": 0,
            "seeds": (0, 1, 2),
            "backbone": "",  # the tiny backbone that jaxmem brings along
            "dtype": "float32",
            "memory": {
                "name": "vismem",
                "preset": "paper",
                "queries": 8,
                "short": 8,
                "long": 16,
                "builder_length": 56,
                "text_cap": 24,
                "rank": 16,
                "alpha": 32.0,
                "short_targets": ("q", "k", "v", "o", "gate", "up", "down"),
                "long_targets": ("q", "k", "v", "o", "gate", "up", "down"),
                "visual_source": "vision_merger",
                "row_token": "K",
                "invoke_bias": 8.0,
                "out_norm": False,
            },
            "memory_folder": None,
            "adapter_folder": None,
            "lora": None,
            "trainable": FORMERS,
            "data": {**data, "boards": boards},
            "evaluation": {**data, "boards": {**boards, "split": "test", "size": 64}},
            "grpo": {
                "rewards": {"functions": ({"name": "board", "weight": 1.0, "read": 1.0},)},
                "group": 8,
                "max_new_tokens": 48,
                "temperature": 1.0,
                "loss": {"kind": "dapo", "clip_low": 0.2, "clip_high": 0.2, "kl_weight": 0.0},
                "advantage": {"scale": "group", "aggregate": "sum_then_normalize", "ddof": 0},
                "iterations": 1,
                "minibatches": 1,
                "mask_truncated": True,
                "resample": 0,
                "eval_group": 1,
                "samples": 2,
                "samples_every": 10,
                "vismem": {
                    "stage": "memory",
                    "bare": 0.0,
                    "invoke": {"probability": 0.5, "max_invocations": 1, "min_gap": 1, "anywhere": False},
                    "anywhere_from": 0.5,
                    "probability_anywhere": 0.1,
                    "baseline": "none",
                    "penalty": 0.3,
                    "gate_penalties": False,
                    "controls": ("off", "zero", "noise", "shuffle"),
                },
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "warmup_ratio": 0.1,
                "final_fraction": 0.1,
                "beta1": 0.9,
                "beta2": 0.99,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "multipliers": (),
            },
            "loop": {
                "steps": 400,
                "batch_size": 32,
                "accumulate": 1,
                "p_block": 0.5,
                "eval_every": 0,
                "checkpoint_every": 100,
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
            "experiment": None,
            "stages": {
                "1_warm_up": {
                    "evaluation": None,
                    "lora": {"rank": 16, "alpha": 32.0},
                    "trainable": (*FORMERS, "base/**/lora_a", "base/**/lora_b"),
                    "data": {"boards": {"seed": 12}},
                    "grpo": {"vismem": {"stage": "warm_up", "bare": 0.25}},
                    "optimizer": {"learning_rate": 4e-3, "warmup_ratio": 0.05},
                    "loop": {"steps": 500, "batch_size": 32, "p_block": 0.75},
                },
                "2_memory": {
                    "grpo": {"vismem": {"controls": ("off", "shuffle")}},
                    "optimizer": {"learning_rate": 3e-4, "warmup_ratio": 0.2},
                    "loop": {"steps": 24, "batch_size": 8},
                },
                "3_invocation": {
                    "trainable": ROWS,
                    "experiment": {
                        "name": "digit_vismem",
                        "k": 0,
                        "boards": 64,
                        "batch_size": 64,
                        "cells": 4,
                        "seed": 5,
                        "max_new_tokens": 48,
                    },
                    "evaluation": None,
                    "grpo": {"vismem": {"stage": "invocation"}},
                    "optimizer": {
                        "learning_rate": 1e-2,
                        "multipliers": (("**/rows/embed/end", 0.1),),
                    },
                    "loop": {"steps": 60, "batch_size": 8},
                },
            },
        }
    )
