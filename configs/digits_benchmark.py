"""The digit benchmark: what PVM repairs, what it does not, and what other ways to train do on the same boards.

    jaxmem study --config=configs/digits_benchmark.py            # tens of minutes on two cores
    jaxmem study --config=configs/digits_benchmark.py:long       # three seeds and 1,056 boards for every arm

Every arm starts from the shipped tiny backbone and trains on boards with no word or 128 words between image and
question (`lora_long`: up to 512). Tests reach 1,024 words. A seed drives initial weights, training boards and test
boards. What was chosen to keep the time: PVM trains for the quickstart's 400 steps, the other supervised arms for 250,
which takes LoRA and full fine-tuning about as long; arms that answer side questions run with one seed (`once`) and are
tested on 96 boards, the main arms on 3 x 352 boards per length up to 512 words; 1,024 words are read by memory off and
PVM alone, on 3 x 120 boards; LoRA's ranks and rates are tried for 40 steps and compared on training digits with boards
of their own; GRPO makes 25 steps.

The same command goes on after an interruption. Single values can be changed, for a look: `--config.boards=8
--config.steps=3 --config.order="('off','pvm')"`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxmem.config import choose, load

HERE = Path(__file__).parent
FEWER = {"p_block": 0.0, "steps": 250}
PLAIN = {"memory": None, "optimizer": {"multipliers": ()}, "loop": FEWER}
MAIN = ("off", "pvm", "mlp", "lora")
ORDER = (*MAIN, "grpo_all", "grpo_language", "pvm_plain", "grpo_memory", "full", "lora_long")
ONCE = ("pvm_plain", "grpo_memory", "full", "lora_long")
SIZES = {
    "short": {"once": (0,), "some": 96, "most": 120, "farthest": ("off", "pvm")},
    "long": {"once": (), "some": 352, "most": 352, "farthest": ()},
}


def get_config(size: str = "short") -> ConfigDict:
    chosen = choose(SIZES, size, "argument")
    arms = {**memories(), **adapters(), **second_stages()}
    if chosen["once"]:
        arms = {name: {**arm, "seeds": chosen["once"]} if name in ONCE else arm for name, arm in arms.items()}
    others = tuple(name for name in arms if name not in MAIN)
    near, far = ({"k": (0, 128, 256), "blind_k": (0,)}, {"k": (512,)})
    return ConfigDict(
        {
            "output": f"runs/digits_benchmark{'' if size == 'short' else '_long'}",
            "seeds": (0, 1, 2),
            "workers": 2,
            "boards": 352,
            "steps": 400,
            "base": base(),
            "order": ORDER,
            "arms": arms,
            "tests": {
                "near": exam(352, 32, MAIN, **near),
                "far": exam(352, 32, MAIN, **far),
                "near_others": exam(chosen["some"], 32, others, **near),
                "far_others": exam(chosen["some"], 32, others, **far),
                "farthest": exam(chosen["most"], 8, chosen["farthest"], k=(1024,)),
                # few keys at far positions; many keys at near positions
                "controls": exam(64, 32, ("off", "pvm", "lora"), k=(), stretched=(512,), packed=((512, 64),)),
                "long_text": exam(96, 32, ("off", "pvm", "lora", "grpo_all"), 1, k=(0,), cells=16),
            },
            "selection": {
                "test": {"k": (128,), "boards": 128, "batch_size": 32, "split": "train", "seed": 1000},
                "by": "read",
                "steps": 40,
            },
            "margin": 0.02,
            "reference": 512,
            "trained_k": 128,
        }
    )


def exam(boards: int, batch_size: int, arms: tuple, seeds: int = 0, cells: int = 4, **test) -> dict:
    return {"test": {"boards": boards, "batch_size": batch_size, "cells": cells, **test}, "arms": arms, "seeds": seeds}


def base() -> dict:
    """The quickstart's run: 400 steps, batch 32, k in (0, 0, 128), eight cells."""
    config = load(str(HERE / "digits_quickstart.py")).to_dict()
    for name in ("output", "seed", "experiment"):
        config.pop(name)
    config["data"]["threads"] = 1
    config["loop"]["checkpoint_every"] = 100
    return config


def memories() -> dict:
    """The backbone with nothing, PVM with and without visual-key blocking, and an equal-size MLP."""
    mlp = {"name": "mlp", "layers": (0, 2), "latent": 32, "query": "residual", "output_norm": True}
    mlp |= {"gate": 0.0, "initialiser": "fan_in"}
    return {
        "off": {"title": "memory off", "trains": False, "attention": True},
        "pvm": {"title": "PVM"},
        "pvm_plain": {"title": "PVM without visual-key blocking", "train": {"loop": {"p_block": 0.0}}},
        "mlp": {"title": "MLP of equal size", "train": {"memory": mlp, "loop": FEWER}},
    }


def adapters() -> dict:
    """LoRA in several sizes and at several rates, LoRA on long boards, and everything but the tower."""
    factors = {**PLAIN, "trainable": ("base/**/lora_a", "base/**/lora_b")}
    variants = {
        f"rank{rank}_rate{rate:g}".replace(".", "_"): {"lora": {"rank": rank}, "optimizer": {"learning_rate": rate}}
        for rank in (4, 8, 16)
        for rate in (1e-3, 3e-3)
    }
    lengths = {"boards": {"k": (0, 128, 256, 512)}, "buckets": {"tokens": (80, 208, 336, 592)}}
    rate = {"optimizer": {"multipliers": (), "learning_rate": 1e-3}}
    full = {**PLAIN, **rate, "trainable": ("base/**", "!base/visual")}
    return {
        "lora": {"title": "LoRA", "train": factors, "variants": variants, "attention": True},
        "lora_long": {
            "title": "LoRA trained up to k=512, 60 steps",
            "like": "lora",
            "train": {"data": lengths, "loop": {"steps": 60}},
            "seeds": (0,),
            "attention": True,
        },
        "full": {"title": "full fine-tuning but for the tower", "train": full, "attention": True},
    }


def second_stages() -> dict:
    """GRPO as in `digits_pvm_grpo.py`, but shorter: on PVM, on PVM and language model, and without PVM."""
    stage = load(str(HERE / "digits_pvm_grpo.py")).to_dict()
    for name in ("output", "seed", "seeds", "memory_folder", "evaluation", "trainable", "memory"):
        stage.pop(name)
    stage["optimizer"]["multipliers"] = ()
    stage["loop"] |= {"p_block": 0.0, "steps": 25, "checkpoint_every": 25}
    stage["memory"] = None
    return {
        "grpo_memory": {
            "title": "PVM, then GRPO on PVM",
            "train": {**stage, "trainable": ("memory",)},
            "start_from": "pvm",
        },
        "grpo_all": {
            "title": "PVM, then GRPO on PVM and language model",
            "train": {**stage, "trainable": ("**", "!base/visual")},
            "start_from": "pvm",
        },
        "grpo_language": {
            "title": "GRPO on the language model, no PVM",
            "train": {**stage, "trainable": ("base/**", "!base/visual")},
            "attention": True,  # as for all arms without a memory, which then share one compiled test
        },
    }
