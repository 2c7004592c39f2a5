"""CoMEM on facts that exist in knowledge items alone: handwritten digits, three seeds, one command.

    jaxmem train --config=configs/digits_comem.py

The cells of a digit board are knowledge items: an image of a digit, and the letter of the cell as its text. A question
names cells and shows nothing. The tiny backbone that jaxmem brings along looks for a cell by its place in an image, not
by what it says, so the first stage teaches it together with a memory to look vectors up. Then it is frozen, that memory
is thrown away, and the second stage trains a fresh one, as CoMEM does: LoRA factors of the encoder and the Q-Former
alone. Both stages draw 1 to 10 items per question, of which the question names up to four; half of the questions name
none and are answered with all. The seeds share the backbone of the first stage and differ in everything behind it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    facts = {"split": "train", "seed": 11, "items": (1, 2, 3, 5, 10), "asked": (1, 2, 4), "size": 200_000, "group": 2}
    facts["recite"] = 0.5
    # one shape, so that one program serves all numbers of items
    buckets = {"tokens": (96,), "patches": (4,), "items": (10,), "item_tokens": (16,), "item_patches": (4,)}
    data = {"source": "facts", "items": "memory", "buckets": buckets, "threads": 1, "prefetch": 4}
    config = ConfigDict(
        {
            "output": "runs/digits_comem",
            "seed": 0,
            "seeds": (0, 1, 2),
            "backbone": "",  # the tiny backbone that jaxmem brings along
            "dtype": "float32",
            "memory": {
                "name": "comem",
                "latents": 2,
                "depth": 4,
                "heads": 4,
                "head_dim": 32,
                "ff_mult": 4,
                "shared": True,
                "rank": 16,
                "alpha": 32.0,
                "dropout": 0.0,
                "suffix": "",
                "parts": ("layers", "visual/blocks", "visual/merger", "visual/deepstack"),
            },
            "memory_folder": None,
            "trainable": "memory",
            "data": {**data, "facts": facts},
            "evaluation": {**data, "facts": {**facts, "asked": (1,), "recite": 0.0, "split": "test", "size": 256}},
            "optimizer": {
                "learning_rate": 3e-3,
                "schedule": "cosine",
                "warmup_ratio": 0.05,
                "final_fraction": 0.05,
                "beta1": 0.9,
                "beta2": 0.99,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
            },
            "loop": {
                "steps": 1000,
                "batch_size": 32,
                "accumulate": 1,
                "p_block": 0.0,
                "eval_every": 200,
                "checkpoint_every": 500,
                "checkpoint_seconds": 60.0,
                "keep": 2,
                "keep_best": 1,
                "log_every": 20,
                "resume": "auto",
                "progress": True,
                "tensorboard": True,
            },
            "mesh": {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1},
            "hosts": {"start": "auto", "timeout_s": 900.0, "heartbeat_s": 100},
            "remat": False,
            "experiment": None,
        }
    )
    config.stages = ConfigDict(
        {
            "1_backbone": {
                "output": config.get_ref("output") + "/backbone",  # one for all seeds
                "seed": 0,
                "trainable": ("base", "memory"),
                "optimizer": {"learning_rate": 1e-3},
                "loop": {"steps": 800},
            },
            "2_memory": {
                "memory_folder": None,  # a fresh one
                "experiment": {
                    "name": "digit_facts",
                    "items": (1, 3, 5, 10),
                    "questions": 256,
                    "batch_size": 64,
                    "seed": 5,
                    "max_new_tokens": 8,
                },
            },
        }
    )
    return config
