"""Runs in a process of its own, with torch and without jax: loads an exported folder and compares it with answers.

    python -m jaxmem.export.reload FOLDER REFERENCE

prints one JSON object: keys that did not fit, the largest difference of logits, and tokens that agree.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

STATES = ("on", "off")


def main(folder: str, reference: str) -> None:
    """Prints the report."""
    given = json.loads((Path(reference) / "prompts.json").read_text(encoding="utf-8"))
    answers = np.load(Path(reference) / "answers.npz")
    model, report = load(folder)
    report["prompts"] = {}
    for name, prompt in given["prompts"].items():
        ids = answers[f"{name}/ids"]
        inputs = _inputs(folder, ids, [Path(reference) / file for file in prompt["images"]], given["image_token"])
        for state in STATES if hasattr(model, "use_memory") else ("off",):
            if hasattr(model, "use_memory"):
                model.use_memory = state == "on"
            wanted = {key: answers[f"{name}/{state}/{key}"] for key in ("logits", "tokens")}
            report["prompts"][f"{name}/{state}"] = _compare(model, inputs, wanted, given["banned"])
    print(json.dumps(report))


def load(folder: str) -> tuple[Any, dict[str, Any]]:
    """The model in float32, and the names of tensors that did not fit."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    alone = config["architectures"][0].endswith("ForCausalLM")
    kind = transformers.AutoModelForCausalLM if alone else transformers.AutoModelForImageTextToText
    own = {"trust_remote_code": True} if "auto_map" in config else {}
    model, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **own)
    return model.eval(), {
        key: sorted(map(str, found[f"{key}_keys"])) for key in ("missing", "unexpected", "mismatched")
    }


def _inputs(folder: str, ids: np.ndarray, files: list[Path], image_token: int) -> dict[str, torch.Tensor]:
    """What the model takes: the tokens as given, and the pixels of the folder's own image processor."""
    tokens = torch.tensor(ids, dtype=torch.long)[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    qwen = "vision_start_token_id" in config
    if qwen:
        inputs["mm_token_type_ids"] = (tokens == image_token).to(torch.int32)
    if files:
        images = [Image.open(file) for file in files]
        reader = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        inputs |= dict(reader(images=images if qwen else [images], return_tensors="pt"))
    return inputs


def _compare(model: Any, inputs: dict[str, Any], wanted: dict[str, np.ndarray], banned: list[int]) -> dict[str, Any]:
    """Differences of one prompt."""
    with torch.no_grad():
        logits = model(**inputs).logits[0].float().numpy()
    vocab = wanted["logits"].shape[-1]
    length = len(wanted["tokens"])
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "eos_token_id": None}
    out = model.generate(**inputs, **options, suppress_tokens=banned, pad_token_id=0)
    tokens = out[0, inputs["input_ids"].shape[1] :].numpy()
    difference = np.abs(logits[:, :vocab] - wanted["logits"])
    return {
        "difference": float(difference.max()),
        "scale": float(np.abs(wanted["logits"]).max()),
        "equal": int((tokens == wanted["tokens"]).sum()),
        "of": length,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
