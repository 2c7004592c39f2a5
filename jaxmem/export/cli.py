"""`jaxmem export`: a model with its memory as a folder for PyTorch, with the proof that it says the same there.

`jaxmem prove` is the proof alone, of any folder that both can load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxmem import api
from jaxmem.api import Model
from jaxmem.assets import TINY
from jaxmem.checkpoints.huggingface import SHARD_SIZE
from jaxmem.checkpoints.weights import read_json
from jaxmem.distributed import hosts
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.export import adapters, card, hf, original, plain, prove
from jaxmem.export.prove import Proof


@dataclasses.dataclass(frozen=True)
class Target:
    """A format.

    Attributes:
      write: `write(model, folder, dtype=, max_shard_size=)`.
      prove: `prove(model, folder)`, of the model as the folder holds it.
      relation: to the base model, as model cards call it.
      merges: does it add LoRA factors into the weights?
    """

    write: Callable[..., None]
    prove: Callable[[Model, Path], Proof]
    relation: str
    merges: bool = True


TARGETS: Mapping[str, Target] = {
    "hf": Target(hf.write, prove.prove, "finetune"),
    "peft": Target(adapters.write, adapters.prove, "adapter", merges=False),
    "merged": Target(plain.write, prove.prove, "merge"),
    "original": Target(original.write, original.prove, "finetune"),
}
DTYPES = ("float32", "bfloat16", "float16")


def export(
    model: Model,
    folder: str | Path,
    to: str = "hf",
    *,
    dtype: str | None = None,
    max_shard_size: int = SHARD_SIZE,
    proven: bool = True,
) -> Proof | None:
    """Writes a folder for PyTorch, all or nothing.

    Args:
      model: a backbone with what was trained.
      folder: must not exist yet, or be empty.
      to: a key of `TARGETS`.
      dtype: of all tensors; None keeps the stored ones.
      max_shard_size: bytes per file.
      proven: load the folder in torch and compare; where that fails, nothing is left behind.

    Returns:
      What torch found; None without proof.

    Raises:
      CheckpointError: the folder holds something, or the proof fails.
      ConfigError: an unknown format or dtype, a model without such a form, or no torch for the proof.
    """
    folder = Path(folder)
    if to not in TARGETS:
        raise ConfigError(f"export --to={to}: there are {', '.join(TARGETS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"export --dtype={dtype}: there are {', '.join(DTYPES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; choose another folder")
    if proven and hosts.count() > 1:
        raise ConfigError(
            'export: several hosts write a folder without its proof: set proven=False; one of "hf" or "merged" is'
            " proven on one host afterwards, by jaxmem prove --model=FOLDER --trust_remote_code --card"
        )
    if proven:
        prove.check_torch()
    target, found = TARGETS[to], None
    with finished(folder) as stage:
        target.write(model, stage, dtype=None if dtype is None else jnp.dtype(dtype), max_shard_size=max_shard_size)
        if proven:
            found = target.prove(as_written(model.merge_lora() if target.merges else model, dtype), stage)
            _agreed(found, f"{folder}: not written")
        card.write(stage, model, target.relation, found)
    return found


def prove_folder(folder: str | Path, *, trust_remote_code: bool = False, write_card: bool = False) -> Proof:
    """Loads a folder here and in torch, and compares what the two say.

    Args:
      folder: that `export` wrote as "hf" or "merged", on several hosts or elsewhere; or a backbone from the Hub.
      trust_remote_code: run the Python files that the folder brings, as torch must to load an "hf" one.
      write_card: write what was found into the folder's model card.

    Returns:
      What torch found.

    Raises:
      CheckpointError: the two disagree, one of them cannot load the folder, or there is no card to write into.
      ConfigError: torch is not installed, the model is of an unsupported kind, or its code is not trusted.
    """
    prove.check_torch()
    folder = Path(folder)
    if "auto_map" in read_json(folder / "config.json") and not trust_remote_code:
        files = ", ".join(sorted(file.name for file in folder.glob("*.py")))
        raise ConfigError(f"prove: torch would run the code in {folder} ({files}): read it, then --trust_remote_code")
    if write_card:
        card.check(folder)
    found = _agreed(prove.prove(api.load(folder), folder), str(folder))
    if write_card:
        card.replace_proof(folder, found)
    return found


def _agreed(found: Proof, where: str) -> Proof:
    """The proof; CheckpointError, with every fault, where it fails."""
    if found.faults:
        raise CheckpointError("\n  ".join([f"{where}: torch does not say what jaxmem says", *found.faults]))
    return found


def as_written(model: Model, dtype: str | None) -> Model:
    """The model with the numbers that the folder holds."""
    if dtype is None:
        return model
    narrow = lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf  # noqa: E731
    return dataclasses.replace(model, base=jax.tree.map(narrow, model.base), memory=jax.tree.map(narrow, model.memory))


@contextlib.contextmanager
def finished(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when the block ends well, and vanishes when it does not.

    Of several hosts that run the same block, the first alone writes; what the others stage vanishes.
    """
    if not hosts.first():
        with tempfile.TemporaryDirectory() as nowhere:
            yield Path(nowhere)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}-exporting-", dir=folder.parent))
    try:
        yield stage
        stage.chmod(0o755)
        os.replace(stage, folder)  # onto nothing, or an empty folder
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def main(
    *,
    to: str,
    model: str | None,
    memory: str | None,
    lora: str | None,
    output: str | None,
    dtype: str | None,
    max_shard_mb: int,
    unproven: bool,
) -> int:
    """`jaxmem export`: prints what was written and what torch found."""
    if not output:
        raise ConfigError("export needs --output=FOLDER")
    loaded = api.load(model or TINY, memory=memory)
    loaded = loaded if lora is None else loaded.restore_lora(lora)
    found = export(loaded, output, to, dtype=dtype, max_shard_size=max_shard_mb * 1_000_000, proven=not unproven)
    size = sum(file.stat().st_size for file in Path(output).rglob("*") if file.is_file())
    print(f"{output}: {size / 1e6:,.1f} MB")
    if found is None:
        later = f"; jaxmem prove --model={output}" if TARGETS[to].prove is prove.prove else ""
        print(f"not proven: it was not loaded in torch{later}")
    else:
        _say(found)
    return 0


def prove_main(*, model: str | None, trust_remote_code: bool, card: bool) -> int:
    """`jaxmem prove`: prints what torch found."""
    _say(prove_folder(model or TINY, trust_remote_code=trust_remote_code, write_card=card))
    return 0


def _say(found: Proof) -> None:
    equal, of = found.tokens
    print(f"read again: {', '.join(f'{len(names)} {kind}' for kind, names in found.keys.items())} tensors")
    if found.prompts:
        print(f"torch: logits differ by at most {found.difference:.1e}, {equal} of {of} greedy tokens agree")
