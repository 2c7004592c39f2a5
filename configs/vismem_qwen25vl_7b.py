"""VisMem (arXiv 2511.11007) on Qwen2.5-VL-7B: a warm-up, Stage I and Stage II, every value a field.

    jaxmem train --config=configs/vismem_qwen25vl_7b.py --config.backbone=PATH --config.data.path=PATH/train.jsonl \
        --config.evaluation.path=PATH/held_out.jsonl

Without an argument all three runs follow one another, each from the memory that the one before it left; a stage that is
done is not done again. The argument picks one: `:1_warm_up`, `:2_memory` or `:3_invocation`; then `memory_folder` says
where the memory comes from. A line of the data is {"messages": [...], "answer": ...} or {"prompt", "image", "answer"};
the warm-up learns the last assistant turn, or the answer.

Values are those of the paper's Table 4. What it leaves open: temperature 1, answers of 1,024 slots, memories behind
",", "." and line breaks with probability one half, at most five of them, and a warm-up of one epoch.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxmem.config import choose

FORMERS = ("memory/vismem", "!memory/vismem/rows")
ROWS = ("memory/vismem/rows/embed", "memory/vismem/rows/unembed/invoke")
RUNS = "runs/vismem_qwen25vl_7b"
STAGES: dict[str, dict[str, Any]] = {
    # the published code's first stage, repaired: cross-entropy behind a memory of random type
    "1_warm_up": {
        "trainable": FORMERS,
        "grpo": {"vismem": {"stage": "warm_up"}, "loss": {"kl_weight": 0.0}},
        "optimizer": {"learning_rate": 5e-5, "warmup_ratio": 0.2, "multipliers": ()},
        "loop": {"epochs": 1},
    },
    "2_memory": {
        "trainable": FORMERS,
        "grpo": {"vismem": {"stage": "memory"}, "loss": {"kl_weight": 0.015}},
        "optimizer": {"learning_rate": 5e-5, "warmup_ratio": 0.2, "multipliers": ()},
        "loop": {"epochs": 2},
    },
    "3_invocation": {
        "trainable": ROWS,
        "grpo": {"vismem": {"stage": "invocation"}, "loss": {"kl_weight": 0.03}},
        # the paper's lower rate of the end tokens
        "optimizer": {"learning_rate": 1e-5, "warmup_ratio": 0.1, "multipliers": (("**/rows/embed/end", 0.1),)},
        "loop": {"epochs": 2},
    },
}


def get_config(stage: str = "") -> ConfigDict:
    buckets = {"tokens": (256, 512, 1024, 2048, 4096), "patches": (1024, 2048, 4096, 8192)}
    data = {"source": "jsonl", "buckets": buckets, "max_rejected_fraction": 0.0, "threads": 8, "prefetch": 4}
    config = ConfigDict(
        {
            "output": RUNS,
            "seed": 42,
            "seeds": (),  # several make one run each
            "backbone": "Qwen2.5-VL-7B-Instruct",  # a Hugging Face folder
            "dtype": "bfloat16",  # what trains is kept in float32
            "memory": {
                "name": "vismem",
                "preset": "paper",  # or "official": what the released code computes once it runs
                "queries": 8,
                "short": 8,
                "long": 16,
                "builder_layers": 2,
                "builder_heads": 8,
                "builder_ff": 4,
                "builder_length": 2048,
                "builder_residual": "prenorm",
                "rank": 16,
                "alpha": 32.0,
                "short_targets": ("q", "v"),
                "long_targets": ("q", "v"),
                "visual_source": "vision_merger",
                "visual_spans": "all",
                "text_cap": 1024,
                "overflow": "subsample",
                "backprop_hidden": False,
                "out_norm": False,
                "row_token": ".",
                "row_noise": 1e-3,
                "invoke_bias": 0.0,
            },
            "memory_folder": None,
            "trainable": FORMERS,
            "data": {**data, "path": "train.jsonl", "shuffle": True},
            "evaluation": {**data, "path": "held_out.jsonl", "shuffle": False},
            "grpo": {
                "rewards": {
                    "functions": ({"name": "exact", "column": "answer", "weight": 1.0},),
                    "timeout_s": 10.0,
                    "startup_s": 120.0,
                    "workers": 4,
                    "max_failed_steps": 3,
                },
                "group": 16,
                "max_new_tokens": 1024,  # slots: tokens and memories
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "loss": {
                    "kind": "grpo",
                    "clip_low": 0.2,
                    "clip_high": 0.2,
                    "dual_clip": None,
                    "kl_weight": 0.015,
                    "normaliser": None,
                },
                "advantage": {"scale": "group", "aggregate": "sum_then_normalize", "eps": 1e-4, "ddof": 0},
                "iterations": 1,
                "minibatches": 1,
                "mask_truncated": False,
                "old_logprobs": "trainer",  # the ratio is 1, also in bfloat16; costs one more forward pass
                "prompts_at_once": 0,
                "resample": 0,
                "eval_group": 1,
                "eval_temperature": 0.0,
                "samples": 2,
                "samples_every": 10,
                "vismem": {
                    "stage": "memory",
                    "invoke": {
                        "probability": 0.5,
                        "delimiters": (),  # ids; none: all tokens that end with "," "." or a line break
                        "max_invocations": 5,
                        "min_gap": 1,
                        "rows_at_once": 1,
                        "prefix_cache": True,
                    },
                    "anywhere_from": 0.5,  # the second epoch
                    "probability_anywhere": 0.0,  # 0: as many memories as in the first
                    "baseline": "shared",
                    "penalty": 0.3,
                    "gate_penalties": False,
                    "controls": ("off", "zero", "noise", "shuffle"),
                },
            },
            "optimizer": {
                "learning_rate": 5e-5,
                "schedule": "cosine",
                "warmup_ratio": 0.2,
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
                "multipliers": (),
                "moment_dtype": "float32",
                "accumulate_dtype": "float32",
            },
            "loop": {
                "steps": 0,  # 0: by epochs
                "epochs": 2,
                "batch_size": 8,  # prompts, of `group` completions each
                "accumulate": 0,  # 0: as many microbatches as leave one prompt for each of mesh data x fsdp
                "p_block": 0.0,
                "log_every": 1,
                "eval_every": 50,
                "checkpoint_every": 50,
                "checkpoint_seconds": 60.0,
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
    if not stage:
        config.stages = STAGES
        return config
    for name, values in choose(STAGES, stage, "stage").items():
        _replace(config, name, values)
    earlier = [name for name in STAGES if name < stage]
    config.output, config.memory_folder = f"{RUNS}/{stage}", f"{RUNS}/{earlier[-1]}/memory" if earlier else None
    return config


def _replace(section: ConfigDict, name: str, value: Any) -> None:
    """section.name = value; a dict replaces the keys that it has."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _replace(section[name], key, inner)
    else:
        section[name] = value
