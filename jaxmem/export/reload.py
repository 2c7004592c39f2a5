"""Runs in a process of its own, with torch and without jax: loads an exported folder and compares it with answers.

    python -m jaxmem.export.reload FOLDER REFERENCE [ADAPTER]

prints one JSON object: keys that did not fit, the largest difference of logits, and tokens that agree.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image


def main(folder: str, reference: str, adapter: str = "") -> None:
    """Prints the report; of a folder of PEFT too, if one is named, and without a reference of its keys alone."""
    model, report = load(folder)
    if adapter:
        model, report = with_adapter(model, adapter)
    report["prompts"] = {}
    if reference:
        _ask(model, folder, Path(reference), report)
    print(json.dumps(report))


def _ask(model: Any, folder: str, root: Path, report: dict[str, Any]) -> None:
    """Puts all prompts to the model, in all states."""
    given = json.loads((root / "prompts.json").read_text(encoding="utf-8"))
    answers = np.load(root / "answers.npz")
    for state, settings in given["states"].items():
        for name, prompt in given["prompts"].items():
            wanted = {key: answers[f"{name}/{state}/{key}"] for key in ("ids", "logits", "tokens", "limit")}
            inputs = _inputs(folder, wanted["ids"], [root / file for file in prompt["images"]], given["image_token"])
            options = dict(settings.get("generate", {}), suppress_tokens=given["banned"])
            _switch(model, settings)
            if given["items"] and settings["use_memory"]:
                known = [given["items"][number] for number in prompt["items"]]
                inputs |= model.memory_of(_readers(folder), [[_item(root, item) for item in known]])
            report["prompts"][f"{name}/{state}"] = _compare(model, inputs, wanted, options)


def _switch(model: Any, settings: dict[str, Any]) -> None:
    """Sets what a state wants of the model; a plain one has no memory to switch."""
    if hasattr(model, "use_memory"):
        model.use_memory = settings["use_memory"]
    if hasattr(getattr(model, "settings", None), "invoke_bias"):
        model.settings.invoke_bias = settings.get("invoke_bias", model.config.jaxmem["memory"]["invoke_bias"])


def _item(root: Path, item: dict[str, Any]) -> dict[str, Any]:
    """An item with its images open."""
    return {"images": [Image.open(root / file) for file in item["images"]], "text": item["text"]}


def _readers(folder: str) -> Any:
    """Tokenizer and image processor of the folder, as a processor has them."""
    return types.SimpleNamespace(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
        image_processor=transformers.AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )


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


def with_adapter(model: Any, folder: str) -> tuple[Any, dict[str, Any]]:
    """The model with a PEFT adapter, and names of the adapter's tensors that did not fit."""
    import peft
    from safetensors.torch import load_file

    wrapped = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(folder))
    found = peft.set_peft_model_state_dict(wrapped, load_file(Path(folder) / "adapter_model.safetensors"))
    missing = [key for key in found.missing_keys if "lora_" in key or "trainable_tokens" in key]
    report = {"missing": missing, "unexpected": list(found.unexpected_keys), "mismatched": []}
    return wrapped.eval().to(torch.float32), report


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


def _compare(model: Any, inputs: dict[str, Any], wanted: dict[str, np.ndarray], options: dict) -> dict[str, Any]:
    """Differences of one prompt."""
    with torch.no_grad():
        logits = model(**inputs).logits[0].float().numpy()[:, : wanted["logits"].shape[-1]]
    most = int(wanted["limit"])
    fixed = {"max_new_tokens": most, "min_new_tokens": most, "do_sample": False, "eos_token_id": None}
    out = model.generate(**inputs, **fixed, **options, pad_token_id=0)
    tokens = out[0, inputs["input_ids"].shape[1] :].numpy()
    length = len(wanted["tokens"])
    return {
        "difference": float(np.abs(logits - wanted["logits"]).max()),
        "scale": float(np.abs(wanted["logits"]).max()),
        "equal": int((tokens[:length] == wanted["tokens"][: len(tokens)]).sum()) if len(tokens) >= length else 0,
        "of": length,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
