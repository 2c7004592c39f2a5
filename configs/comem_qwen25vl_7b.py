"""CoMEM (arXiv 2505.17670) on Qwen2.5-VL-7B, every value a field; `:qwen2` is its second recipe, on Qwen2-VL-7B.

    jaxmem train --config=configs/comem_qwen25vl_7b.py --config.backbone=PATH --config.data.path=PATH/train.jsonl \
        --config.evaluation.path=PATH/held_out.jsonl

A line of the data is a question with its answer and the knowledge items that were retrieved for it, best first:
{"messages": [...], "items": [{"text": ..., "image": path}, ...]}; `jaxmem synthesise` makes such files. The encoder's
LoRA factors and the Q-Former train, on the answers alone; the backbone, of which there is one copy, is frozen.

Values are those of the paper's table of hyperparameters and its released script: three items per question, global batch
16, AdamW at 5e-5, cosine, 3 % warm-up, weight decay 0.1, clipping at 3, one epoch.
"""

from ml_collections import ConfigDict

from jaxmem.config import choose

BACKBONES = {"qwen25": "Qwen2.5-VL-7B-Instruct", "qwen2": "Qwen2-VL-7B-Instruct"}


def get_config(backbone: str = "qwen25") -> ConfigDict:
    buckets = {
        "tokens": (512, 1024, 2048),
        "patches": (1024, 1536, 3072),  # a question with one image of 512 x 512 pixels has 1,296
        "items": (1, 2, 3),
        "item_tokens": (512, 768, 1280),
        "item_patches": (1536,),
    }
    data = {
        "source": "jsonl",
        "items": "memory",  # or "prompt": the same items as text and images (RAG)
        "newline": True,
        "buckets": buckets,
        "max_rejected_fraction": 0.0,
        "threads": 8,
        "prefetch": 4,
    }
    return ConfigDict(
        {
            "output": f"runs/comem_{choose(BACKBONES, backbone, 'backbone')}",
            "seed": 42,
            "seeds": (),  # several make one run each
            "backbone": BACKBONES[backbone],  # a Hugging Face folder
            "encoder": "",  # another VLM's folder, where the backbone is a decoder alone (the paper's transfer)
            "dtype": "bfloat16",  # what trains is kept in float32
            "memory": {
                "name": "comem",
                "latents": 8,
                "depth": 8,
                "heads": 16,
                "head_dim": 224,
                "ff_mult": 4,
                "shared": True,
                "rank": 16,
                "alpha": 32.0,
                "dropout": 0.05,
                "parts": ("layers", "visual/blocks", "visual/merger"),
                "encoder_layers": 0,
                "suffix": " Similar image and text knowledge for reference",
                "text_limit": 5000,
                "squash": 512,
                "item_min_pixels": 0,
                "item_max_pixels": 0,  # 50176 gives the 64 tokens per item that the paper's code meant
                "order": "rank",
                "query": True,  # with an encoder of its own: it reads the prompt too
                "query_tower": "frozen",
                "bf16_positions": False,
            },
            "memory_folder": None,
            "trainable": "memory",
            "data": {**data, "path": "train.jsonl", "shuffle": True},
            "evaluation": {**data, "path": "held_out.jsonl", "shuffle": False},
            "optimizer": {
                "learning_rate": 5e-5,
                "schedule": "cosine",
                "warmup_ratio": 0.03,
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "clip_norm": 3.0,
                "multipliers": (),
                "moment_dtype": "float32",
                "accumulate_dtype": "float32",
            },
            "loop": {
                "steps": 0,  # 0: by epochs
                "epochs": 1,
                "batch_size": 16,
                "accumulate": 0,  # 0: as many microbatches as leave one row for each of mesh data x fsdp
                "p_block": 0.0,
                "log_every": 1,
                "eval_every": 100,
                "checkpoint_every": 100,
                "checkpoint_seconds": 60.0,
                "keep": 2,
                "keep_best": 1,
                "best_metric": "",
                "max_nonfinite": 5,
                "resume": "auto",
                "progress": True,
                "tensorboard": True,
            },
            "mesh": {"data": -1, "fsdp": 16, "sequence": 1, "tensor": 1},
            "hosts": {"start": "auto", "timeout_s": 900.0, "heartbeat_s": 100},
            "remat": "full",
            "donate": True,
            "compile_cache": None,  # a folder that all hosts share, such as "runs/compiled"
            "xla_flags": "default",
            "xla_extra_flags": (),
            "loss_chunk": 2048,
            "min_pixels": None,
            "max_pixels": 1003520,  # 1,280 visual tokens
        }
    )
