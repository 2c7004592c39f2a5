"""The model card of an export: what it is, how to use it, and what the proof found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jaxmem
from jaxmem.api import Model
from jaxmem.errors import CheckpointError
from jaxmem.export import hf
from jaxmem.export.prove import Proof

CARD = "README.md"
_SECTION = re.compile(r"^## Proof\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
NAMES = {
    "pvm": "Persistent Visual Memory (arXiv 2605.00814)",
    "mlp": "the MLP branch that PVM is compared with",
    "vismem": "VisMem (arXiv 2511.11007)",
    "comem": "CoMEM (arXiv 2505.17670)",
    "vision_remember": "Vision Remember (arXiv 2506.03928)",
}
_USE = """```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained(FOLDER)
content = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(text=[text], images=[Image.open("picture.png")], return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```"""


def write(folder: Path, model: Model, relation: str, proof: Proof | None, use: str = _USE) -> None:
    """Writes README.md.

    Args:
      folder: of the export.
      model: what was exported.
      relation: to the base model, as the Hub calls it: "finetune", "adapter" or "merge".
      proof: what torch found; None for an export without proof.
      use: how to use it, as Markdown.
    """
    memories = " and ".join(NAMES.get(memory.name, memory.name) for memory in model.spec.memories) or "no memory"
    backbone = model.spec.backbone.model_type
    head = {
        "library_name": "peft" if relation == "adapter" else "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": hf.origin(model),
        "base_model_relation": relation,
        "tags": ["jaxmem", *(memory.name for memory in model.spec.memories), backbone],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [f"# {backbone} with {memories}", "", f"Written by jaxmem {jaxmem.__version__}.", ""]
    lines += ["## Use", "", use.replace("FOLDER", '"path/to/this/folder"'), "", _section(proof)]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def check(folder: Path) -> None:
    """Raises CheckpointError where the folder has no card with a proof to replace."""
    file = folder / CARD
    if not file.is_file() or not _SECTION.search(file.read_text(encoding="utf-8")):
        raise CheckpointError(f"{file}: no model card with a section '## Proof', as jaxmem export writes it")


def replace_proof(folder: Path, proof: Proof) -> None:
    """Writes what was found by reading the folder into its card, which `check` accepts; everything else in it stays."""
    text = (folder / CARD).read_text(encoding="utf-8")
    section = _section(proof, "what jaxmem reads from it")
    text = _SECTION.sub(lambda found: section + ("\n" if found.end() < len(text) else ""), text, count=1)
    (folder / CARD).write_text(text, encoding="utf-8")


def _section(proof: Proof | None, against: str = "the model that it was made of") -> str:
    return "\n".join(["## Proof", "", *_proof(proof, against), ""])


def _proof(proof: Proof | None, against: str) -> list[str]:
    if proof is None:
        return ["**None.** This folder was written without loading it in torch."]
    equal, of = proof.tokens
    if not proof.prompts:
        return ["What was written was read again: every tensor is what it was, to the bit."]
    lines = [
        f"The folder was loaded in torch (float32, CPU) and compared with {against}:"
        f" {', '.join(f'{len(names)} {kind}' for kind, names in proof.keys.items())} tensors; logits differ by at most"
        f" {proof.difference:.1e}; {equal} of {of} greedily generated tokens agree.",
        "",
        "| prompt / memory | largest difference of logits | largest logit | equal tokens |",
        "|---|---|---|---|",
    ]
    for name, found in proof.prompts.items():
        agree = f"{found['equal']:.0f} of {found['of']:.0f}"
        lines.append(f"| {name} | {found['difference']:.1e} | {found['scale']:.1f} | {agree} |")
    return lines
