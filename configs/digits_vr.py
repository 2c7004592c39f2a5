"""Vision Remember on digit boards: few vision tokens, with and without a second look at the tower's features.

    jaxmem study --config=configs/digits_vr.py

A board of 8x8 patches becomes 64, 16, 9 or 4 tokens (ratio 1 to 4). At 2 every token is one digit; at 3 cells and
digits do not line up; at 4 every token averages four digits. Arms of a seed share tower, start and boards. DeepStack
adds several samples in front of one layer, since the decoder has four.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    look = {"name": "vision_remember", "layers": (0, 1), "levels": (3, 4, 5), "inner": 64, "heads": 4}
    look |= {"gate": 0.5, "initialiser": "fan_in"}  # a narrow model, and a short run: gates that start open
    boards = {"split": "train", "seed": 20, "k": (0,), "n": (4,), "size": 100_000, "group": 2}
    return ConfigDict(
        {
            "name": "compression",
            "output": "runs/digits_vr",
            "seeds": (0, 1, 2),
            "ratios": (2, 3, 4),
            "methods": {
                "none": {},
                "vr_v1": {**look, "preset": "vr_v1"},
                "vr_v2": {**look, "preset": "vr_v2"},
                "deepstack": {"name": "deepstack", "start": 1, "interval": 1, "together": 0},
                "sva": {"name": "sva", "layers": (0, 1), "inner": 64, "heads": 4, "gate": None},
            },
            "fastv": {"layer": 2},
            "tower": {
                "depth": 6,
                "width": 64,
                "mlp_width": 128,
                "heads": 2,
                "steps": 500,
                "batch_size": 16,
                "learning_rate": 3e-3,
            },
            "train": {
                "dtype": "float32",
                "trainable": ("**", "!base/visual"),
                "data": {
                    "source": "boards",
                    "boards": boards,
                    "buckets": {"tokens": (48, 64, 80, 96, 112, 128), "patches": (64,)},
                    "threads": 2,
                    "prefetch": 8,
                },
                "optimizer": {
                    "learning_rate": 2e-3,
                    "schedule": "cosine",
                    "warmup_ratio": 0.05,
                    "final_fraction": 0.05,
                    "beta1": 0.9,
                    "beta2": 0.99,
                    "weight_decay": 0.0,
                    "clip_norm": 1.0,
                    "multipliers": (),
                },
                "loop": {
                    "steps": 250,
                    "batch_size": 16,
                    "accumulate": 1,
                    "p_block": 0.0,
                    "log_every": 20,
                    "eval_every": 0,
                    "checkpoint_every": 250,
                    "checkpoint_seconds": 120.0,
                    "keep": 1,
                    "keep_best": 0,
                    "progress": False,
                    "tensorboard": False,
                },
                "remat": False,
            },
            "test": {"k": (0,), "blind_k": (), "boards": 256, "cells": 4, "batch_size": 64, "seed": 7, "split": "test"},
        }
    )
