"""Vision Remember (arXiv 2506.03928) on a 2B LLaVA-NeXT, both stages, and the same without it; every value a field.

    jaxmem assemble --text=Qwen2-1.5B-Instruct --vision=clip-vit-large-patch14-336 --projector=avgpool --ratio=2 \
        --output=LLaVA-VR-2B
    jaxmem train --config=configs/llava_vr_2b.py --config.backbone=LLaVA-VR-2B \
        --config.data.path=captions.jsonl --config.stages.2_tune.data.path=instructions.jsonl \
        --config.stages.4_tune_alone.data.path=instructions.jsonl

Stage 1 aligns: the projector and the memory train on captions (LLaVA's 558K), the tower and the decoder are frozen.
Stage 2 tunes everything on instructions (LLaVA-NeXT's 779K), the tower at a fifth of the rate. Stages 3 and 4 are the
same without the memory: the paired baseline, with the same seed and the same rows in the same order. `:vr_v2` maps the
levels and adds attention among tokens and the question. The paper's recipe is not published; these are LLaVA-NeXT's
values, with a tenth of the projector's rate for the memory's matrices and all of it for its gates.
"""

from ml_collections import ConfigDict

from jaxmem.config import choose

PRESETS = {"vr_v1": "vr_v1", "vr_v2": "vr_v2"}


def get_config(preset: str = "vr_v1") -> ConfigDict:
    data = {
        "source": "jsonl",
        "path": "captions.jsonl",
        "shuffle": True,
        # a tile has 576 patches, and a picture up to five tiles; behind the projector a tile has 144 tokens
        "buckets": {"tokens": (512, 1024, 2048, 4096), "patches": (576, 1728, 2304, 2880)},
        "max_rejected_fraction": 0.0,
        "threads": 8,
        "prefetch": 4,
    }
    config = ConfigDict(
        {
            "output": f"runs/llava_vr_2b_{choose(PRESETS, preset, 'preset')}",
            "seed": 42,
            "seeds": (),  # several make one run each
            "backbone": "LLaVA-VR-2B",  # the folder that `jaxmem assemble` wrote
            "dtype": "bfloat16",  # what trains is kept in float32
            "memory": {
                "name": "vision_remember",
                "preset": preset,
                "layers": (3, 7, 11),
                "levels": (13, 18, 23),
                "inner": 1024,
                "heads": 16,
                "level_norm": "each",
                "local": True,
                "impl": "direct",  # or "absorbed": the same function with fewer operations; measure which is faster
                "positions": "bias",
                "saliency": "none",
                "text_token": "question_mean",
                "order": "self_then_cross",
                "ffn": False,
                "gate": 0.0,
                "gate_shape": "scalar",
            },
            "memory_folder": None,
            "trainable": ("base/projector", "base/newline", "memory"),
            "data": data,
            "evaluation": None,
            "optimizer": {
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "warmup_ratio": 0.03,
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "multipliers": (("memory", 0.1), ("**/gate", 1.0)),
                "moment_dtype": "float32",
                "accumulate_dtype": "float32",
            },
            "loop": {
                "steps": 0,  # 0: by epochs
                "epochs": 1,
                "batch_size": 256,
                "accumulate": 0,  # 0: as many microbatches as leave one row for each of mesh data x fsdp
                "p_block": 0.0,
                "log_every": 1,
                "eval_every": 0,
                "checkpoint_every": 200,
                "checkpoint_seconds": 300.0,
                "keep": 2,
                "keep_best": 0,
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
        }
    )
    tune = {
        "data": {"path": "instructions.jsonl"},
        "optimizer": {"learning_rate": 1e-5, "multipliers": (("base/visual", 0.2),)},
        "loop": {"batch_size": 128},
    }
    alone = {"memory": None, "memory_folder": None}
    config.stages = ConfigDict(
        {
            "1_align": {},
            "2_tune": {**tune, "trainable": ("**",)},
            "3_align_alone": {
                **alone,
                "trainable": ("base/projector", "base/newline"),
                "optimizer": {"multipliers": ()},
                "backbone": config.get_ref("backbone"),  # the same start as the first stage's
            },
            "4_tune_alone": {**tune, **alone, "trainable": ("**",)},
        }
    )
    return config
