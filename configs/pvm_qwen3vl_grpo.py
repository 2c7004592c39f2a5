"""Stage II of Persistent Visual Memory (arXiv 2605.00814) on Qwen3-VL: GRPO, every value a field.

    jaxmem train --config=configs/pvm_qwen3vl_grpo.py:8b --config.backbone=PATH --config.data.path=PATH/train.jsonl \
        --config.evaluation.path=PATH/held_out.jsonl

The argument is the size, 2b, 4b or 8b, and what trains: `8b` the language model and the PVM, as in the paper;
`8b-memory` the PVM alone; `8b-lora` the PVM and LoRA factors in the decoder. The vision tower never trains. The run
starts from the first stage's memory, `configs/pvm_qwen3vl.py`. A line of the data is {"messages": [...], "answer":
...}; the words that ask for <think> and <answer> belong to its messages. The paper holds 100 lines out.

The mesh suits 16, 32, 64 and 128 devices: eight share the completions of a group and two the heads, so that the largest
choice fits 16 GiB, and `data` takes the rest. The paper trains on 8 GPUs: set `config.mesh` to fsdp=8, sequence=1 and
tensor=1. On one device all four sizes are 1, and the eight groups of a step are eight microbatches.
Prompts are at most 4,096 tokens and 8,192 patches long (`data.buckets`); a longer one is an error that says so.
"""

from ml_collections import ConfigDict

from jaxmem.config import choose

SIZES = {size: f"Qwen3-VL-{size.upper()}-Instruct" for size in ("2b", "4b", "8b")}
LORA = {"rank": 16, "alpha": 32.0, "targets": ("q", "k", "v", "o", "gate", "up", "down"), "layers": None}
WHAT = {
    # a checkpoint holds all that trains with its optimizer: 10 bytes a parameter, 82 GB at 8B
    "all": {"trainable": ("**", "!base/visual"), "lora": None, "learning_rate": 1e-6, "checkpoint_seconds": 1800.0},
    "memory": {"trainable": ("memory",), "lora": None, "learning_rate": 1e-6, "checkpoint_seconds": 60.0},
    # not in the paper: factors start at zero and learn faster than whole weights
    "lora": {
        "trainable": ("memory", "base/**/lora_a", "base/**/lora_b"),
        "lora": LORA,
        "learning_rate": 1e-5,
        "checkpoint_seconds": 60.0,
    },
}


def get_config(what: str) -> ConfigDict:
    size, _, mode = what.partition("-")
    backbone, chosen = choose(SIZES, size, "size"), choose(WHAT, mode or "all", "choice of what trains")
    buckets = {"tokens": tuple(256 * 2**i for i in range(5)), "patches": tuple(256 * 2**i for i in range(6))}
    data = {"source": "jsonl", "buckets": buckets, "max_rejected_fraction": 0.0, "threads": 8, "prefetch": 4}
    return ConfigDict(
        {
            "output": f"runs/pvm_qwen3vl_grpo_{what}",
            "seed": 42,
            "seeds": (),  # several make one run each
            "backbone": backbone,  # a Hugging Face folder
            "dtype": "bfloat16",  # what trains is kept in float32
            "memory": None,
            "memory_folder": f"runs/pvm_qwen3vl_{size}/memory",
            "lora": chosen["lora"],
            "trainable": chosen["trainable"],
            "data": {**data, "path": "train.jsonl", "shuffle": True},
            "evaluation": {**data, "path": "held_out.jsonl", "shuffle": False},
            "grpo": {
                "rewards": {
                    # 0.9 for the answer and 0.1 for the form; "math" needs the extra `math`
                    "functions": ({"name": "pvm", "column": "answer", "grader": "math", "weight": 1.0},),
                    "timeout_s": 10.0,
                    "startup_s": 120.0,
                    "workers": 4,
                    "max_failed_steps": 3,
                },
                "group": 8,
                "max_new_tokens": 16384,
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "loss": {
                    "kind": "dapo",  # what the published script comes to; the paper prints "grpo"
                    "clip_low": 0.2,
                    "clip_high": 0.2,
                    "dual_clip": None,
                    "kl_weight": 0.0,
                    "normaliser": None,
                },
                "advantage": {"scale": "group", "aggregate": "sum_then_normalize", "eps": 1e-4, "ddof": 1},
                "iterations": 1,
                "minibatches": 1,
                "mask_truncated": True,
                "old_logprobs": "trainer",  # the ratio is 1, also in bfloat16; costs one more forward pass
                "prompts_at_once": 2,
                "resample": 0,
                "eval_group": 1,
                "eval_temperature": 0.0,
                "samples": 2,
                "samples_every": 10,
            },
            "optimizer": {
                "learning_rate": chosen["learning_rate"],
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "multipliers": (),
                "moment_dtype": "bfloat16",
                "accumulate_dtype": "float32",
            },
            "loop": {
                "steps": 0,  # 0: by epochs
                "epochs": 1,
                "batch_size": 8,  # prompts, of `group` completions each
                "accumulate": 0,  # 0: as many microbatches as leave one prompt for each of mesh data x fsdp
                "p_block": 0.0,
                "log_every": 1,
                "eval_every": 10,
                "checkpoint_every": 50,
                "checkpoint_seconds": chosen["checkpoint_seconds"],
                "keep": 2,
                "keep_best": 1,
                "best_metric": "",
                "max_nonfinite": 5,
                "resume": "auto",
                "progress": True,
                "tensorboard": True,
            },
            "mesh": {"data": -1, "fsdp": 1, "sequence": 8, "tensor": 2},
            "hosts": {"start": "auto", "timeout_s": 900.0, "heartbeat_s": 100},
            "remat": "full",
            "donate": True,
            "compile_cache": None,  # a folder that all hosts share, such as "runs/compiled"
            "xla_flags": "default",
            "xla_extra_flags": (),
            "loss_chunk": 2048,
            "min_pixels": None,
            "max_pixels": None,
        }
    )
