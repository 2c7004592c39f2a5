"""Makes the embedded default from nothing: `python -m jaxmem.assets.build` (about a quarter of an hour on 2 cores).

Writes the folder's small files, trains the backbone in four phases (see `tiny_phases`), rounds the weights to
bfloat16, reads the folder back, measures it on test digits and writes the table into the folder's README.md.
A phase that is done is kept in --work and not repeated. Results vary a little from run to run, because the order of
floating-point sums does.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from jaxmem.api import load
from jaxmem.assets import TINY
from jaxmem.assets.board_batches import BoardBatcher
from jaxmem.assets.tiny_folder import readme, write_folder
from jaxmem.assets.tiny_phases import PHASES, Phase
from jaxmem.assets.tiny_training import Trainer, initialise
from jaxmem.backbones.registry import config_from_hf
from jaxmem.checkpoints.huggingface import load_backbone, read_config, save_backbone
from jaxmem.data.boards import board_tokens
from jaxmem.evaluation.boards import BoardTest, Reading, evaluate
from jaxmem.model import Spec

TEST = BoardTest(k=(0, 32, 128, 256, 512), blind_k=(0,), boards=256, batch_size=32)


def build(out: Path, work: Path, seed: int = 0, phases: tuple[Phase, ...] = PHASES, test: BoardTest = TEST) -> None:
    """The whole command.

    Args:
      out: the folder to write; what it holds is replaced.
      work: keeps the float32 weights of every finished phase, so that a broken run goes on from there.
      seed: of the weights and of the training boards.
      phases: what is trained, in order.
      test: what is measured at the end.
    """
    write_folder(out)
    spec = Spec(config_from_hf(read_config(out)))
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    trainer = Trainer(spec, BoardBatcher(tokenizer, spec.backbone), board_tokens(tokenizer), seed, _say)
    began = time.perf_counter()
    base = train(trainer, phases, work)
    publish(out, base, time.perf_counter() - began, test)


def train(trainer: Trainer, phases: tuple[Phase, ...], work: Path) -> Any:
    """The float32 weights after all phases; each is saved in `work`, and those found there are not repeated."""
    config = trainer.spec.backbone
    base = initialise(trainer.spec, trainer.seed)
    for place, phase in enumerate(phases):
        folder = work / f"{place}-{phase.name}"
        if (folder / "model.safetensors").exists():
            _say(f"{phase.name}: found in {folder}")
            base = load_backbone(folder, config, dtype=jnp.float32)
        else:
            base = trainer.run(base, phase)
            save_backbone(folder, base, config)
    return base


def publish(out: Path, base: Any, seconds: float, test: BoardTest = TEST) -> None:
    """Saves the weights in bfloat16 beside the small files, reads the folder back, measures it, writes README.md.

    Args:
      out: a folder that `write_folder` wrote.
      base: trained float32 weights.
      seconds: that training took, for the README.
      test: what is measured.
    """
    hf = read_config(out)
    save_backbone(out, base, config_from_hf(hf), hf_config=hf, dtype=jnp.bfloat16, overwrite=True)
    results = evaluate(load(out, dtype="float32"), test)
    for result in results:
        _say(f"k={result.k:4d}{' blind' if result.blind else ''}  read {result.read:.3f}  exact {result.exact:.3f}")
    (out / "README.md").write_text(readme(table(results), _count(base), seconds), encoding="utf-8")


def table(results: tuple[Reading, ...]) -> str:
    """The results as a Markdown table."""
    lines = ["| words between image and question | read | exact |", "|---|---|---|"]
    for result in results:
        name = f"{result.k}, text cannot see the image" if result.blind else str(result.k)
        lines.append(f"| {name} | {result.read:.3f} | {result.exact:.3f} |")
    return "\n".join(lines)


def _count(base: Any) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(base))


def _say(line: str) -> None:
    print(line, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jaxmem.assets.build", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=TINY, help="the folder to write (default: the embedded one)")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-backbone"), help="weights of finished phases")
    parser.add_argument("--seed", type=int, default=0, help="of weights and training boards")
    given = parser.parse_args(arguments)
    build(given.out, given.work, given.seed)


if __name__ == "__main__":
    main()
