"""CoMEM's training data by self-synthesis (arXiv 2505.17670, section 3.3): what a model gets right behind three items.

    jaxmem synthesise --config=configs/comem_synthesis.py

The paper takes training questions of InfoSeek, Encyclopedic-VQA and OK-VQA, keeps 13.8 k right answers of
Qwen2.5-VL-7B, and translates 200 of them into nine languages. It says neither the mixture, nor seeds, nor how it
sampled, nor which CLIP it used: the values here are choices, and the manifest of the result records them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "output": "runs/comem_synthesis",
            "seed": 42,
            "total": 0,  # otherwise so many questions, dealt by weight
            "sources": {
                "infoseek": {
                    "questions": ("data/infoseek/infoseek_train.jsonl",),
                    "annotations": (),
                    "images": "data/infoseek/images",
                    "subset": None,
                    "count": 20_000,
                    "weight": 2.0,
                },
                "okvqa": {
                    "questions": ("data/okvqa/OpenEnded_mscoco_train2014_questions.json",),
                    "annotations": ("data/okvqa/mscoco_train2014_annotations.json",),
                    "images": "data/coco/train2014",
                    "subset": None,
                    "count": 9_000,
                    "weight": 1.0,
                },
            },
            "retrieval": {
                "index": "data/wit/index",
                "items": "data/wit/items.jsonl",
                "embedder": "clip-vit-base-patch32",
                "k": 3,
            },
            "rollout": {
                "model": "Qwen2.5-VL-7B-Instruct",
                "dtype": "bfloat16",
                "samples": 1,
                "max_new_tokens": 1000,
                "temperature": 0.0,
                "top_p": 1.0,
                "repetition_penalty": 1.0,
                "batch_size": 8,
            },
            "judge": {"metric": "strict", "threshold": 1.0},
            "looks": {"images": "squash", "side": 512, "text_limit": 5000},
            "translation": {
                "function": "",  # "package.module:function" of yours
                "languages": ("bg", "zh", "arz", "fil", "fr", "ja", "pt", "ru", "es"),
                "count": 200,
                "batch": 8,
            },
        }
    )
