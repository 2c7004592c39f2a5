"""The quickstart: PVM on the shipped tiny backbone and boards of real handwritten digits, with a report.

    jaxmem train --config=configs/digits_quickstart.py

The memory trains on boards with no word or 128 words between image and question and is tested at 0, 128 and 256. What
differs from the paper suits a small backbone that already sees well at short range: three of four rows train with the
image hidden from the backbone's text (`loop.p_block`), a board asks for eight cells, maps start at 1/sqrt(fan-in), and
gates learn five times faster. Layer 0 is among the memory's layers because there the asked cell's letter is clearest.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "output": "runs/digits_quickstart",
            "seed": 0,
            "backbone": "",  # the tiny backbone that jaxmem brings along
            "dtype": "float32",
            "memory": {
                "name": "pvm",
                "layers": (0, 2),
                "latent": 32,
                "head_dim": 32,
                "mlp_multiple": 1,
                "visibility": "causal",
                "silence": True,
                "query": "residual",
                "output_norm": True,
                "dropout": 0.0,
                "gate": 0.0,
                "initialiser": "fan_in",
            },
            "memory_folder": None,
            "trainable": "memory",
            "data": {
                "source": "boards",
                "boards": {"split": "train", "seed": 0, "k": (0, 0, 128), "n": (8,), "size": 100_000, "group": 1},
                "buckets": {"tokens": (80, 208), "patches": (64,)},
                "threads": 2,
                "prefetch": 8,
            },
            "evaluation": None,
            "optimizer": {
                "learning_rate": 1e-2,
                "schedule": "cosine",
                "warmup_ratio": 0.05,
                "final_fraction": 0.1,
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "multipliers": (("**/gate_alpha", 5.0),),
            },
            "loop": {
                "steps": 400,
                "batch_size": 32,
                "accumulate": 1,
                "p_block": 0.75,
                "log_every": 1,
                "eval_every": 0,
                "checkpoint_every": 200,
                "checkpoint_seconds": 60.0,
                "keep": 2,
                "keep_best": 1,
                "max_nonfinite": 5,
                "resume": "auto",
                "progress": True,
                "tensorboard": True,
            },
            "mesh": {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1},
            "hosts": {"start": "auto", "timeout_s": 900.0, "heartbeat_s": 100},
            "remat": False,
            "loss_chunk": 2048,
            "experiment": {
                "name": "digit_boards",
                "test": {
                    "k": (0, 128, 256),
                    "blind_k": (0,),
                    "boards": 128,
                    "cells": 4,
                    "batch_size": 64,
                    "seed": 0,
                    "split": "test",
                },
                "shown": 6,
                "proof": 8,
            },
        }
    )
