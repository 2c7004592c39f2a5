"""Stage I of Persistent Visual Memory (arXiv 2605.00814) on Qwen3-VL, every value a field.

    jaxmem train --config=configs/pvm_qwen3vl.py:8b --config.backbone=PATH --config.data.path=PATH/train.jsonl

The argument is the size: 2b, 4b or 8b. The mesh suits 16 devices and their multiples up to 256: sixteen hold the
weights between them, four of these share the tokens of a row, so that the longest rows fit 16 GiB, and `data` takes the
rest. On one device: `--config.mesh.fsdp=1 --config.mesh.sequence=1`. The paper trains on 8 GPUs with one row each and 8
microbatches: `--config.mesh.fsdp=8 --config.mesh.sequence=1`.
"""

from ml_collections import ConfigDict

from jaxmem.config import choose

LAYERS = {
    "2b": (6, 12, 18),  # not in the paper: the same stride in 28 layers
    "4b": (5, 11, 17),
    "8b": (8, 16, 24),
}


def get_config(size: str) -> ConfigDict:
    layers = choose(LAYERS, size, "size")
    return ConfigDict(
        {
            "output": f"runs/pvm_qwen3vl_{size}",
            "seed": 42,
            "backbone": f"Qwen3-VL-{size.upper()}-Instruct",  # a Hugging Face folder
            "dtype": "bfloat16",
            "memory": {
                "name": "pvm",
                "layers": layers,
                "latent": 512,
                "mlp_multiple": 1,
                "visibility": "causal",  # "all" is the original; equal when images stand before the text
                "silence": True,
                "query": "residual",
                "output_norm": True,
                "dropout": 0.0,
                "gate": 0.0,
                "initialiser": "normal",
            },
            "memory_folder": None,
            "trainable": "memory",
            "data": {
                "source": "jsonl",
                "path": "train.jsonl",  # one {"messages": [...]} per line
                "shuffle": True,
                "buckets": {
                    "tokens": tuple(256 * 2**i for i in range(8)),
                    "patches": tuple(256 * 2**i for i in range(9)),
                },
                "max_rejected_fraction": 0.0,
                "threads": 8,
                "prefetch": 16,
            },
            "evaluation": None,
            "optimizer": {
                "learning_rate": 1e-4,
                "schedule": "cosine",
                "warmup_ratio": 0.1,
                "final_fraction": 0.0,
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "multipliers": (),
                "moment_dtype": "float32",
                "accumulate_dtype": "float32",
            },
            "loop": {
                "steps": 0,  # 0: by epochs
                "epochs": 1,
                "batch_size": 64,
                "accumulate": 0,  # 0: as many microbatches as leave one row for each of mesh data x fsdp
                "p_block": 0.0,
                "log_every": 1,
                "eval_every": 0,
                "checkpoint_every": 500,
                "checkpoint_seconds": 60.0,  # of the clock, whatever the step
                "keep": 3,
                "keep_best": 1,
                "best_metric": "",
                "max_nonfinite": 5,
                "resume": "auto",
                "progress": True,
                "tensorboard": True,
            },
            "mesh": {"data": -1, "fsdp": 4, "sequence": 4, "tensor": 1},
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
