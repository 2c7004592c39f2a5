"""Pickled weights of others: refused unless allowed, and then read as tensors alone; none of their code is run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmem.checkpoints.table import Box, View
from jaxmem.checkpoints.weights import DTYPES, INDEX, open_file, open_weights, report
from jaxmem.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def open_pickle(path: str | Path, allow: bool, *, nested: bool = False) -> dict[str, View]:
    """Name to View of every tensor in a file that `torch.save` wrote.

    torch reads it with `weights_only`: objects that are neither tensors nor plain containers are refused, not built. A
    file of torch's present format is mapped into memory, so that only what is asked for is read.

    Args:
      path: of the file.
      allow: did the user say that pickles may be opened?
      nested: walk through dicts within the dict and join their keys with "."; settings and counters beside the tensors
        are left out then. Otherwise the file must be one flat dict of tensors.

    Raises:
      CheckpointError: not allowed; no torch; no file, a damaged one, or one that holds other objects; entries that are
        no tensors, or tensors of another number format than float32, float16 and bfloat16.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if not allow:
        raise CheckpointError(
            f"{path}: is pickled, and pickles can run code when they are opened; convert it to safetensors, or if you"
            " trust it pass --allow_pickle (tensors alone are read then)"
        )
    torch = _torch(path)
    content = _load(torch, path)
    entries = dict(_walk(content)) if nested else {str(name): value for name, value in content.items()}
    tensors = {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}
    others = [f"{name} ({type(entries[name]).__name__})" for name in entries if name not in tensors]
    report(path, {"entries that are no tensors": [] if nested else others}, "Expected one flat dict of tensors.")
    kinds = {getattr(torch, jnp.dtype(dtype).name): dtype for dtype in DTYPES.values()}
    odd = [f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in kinds or t.layout != torch.strided]
    report(path, {"tensors of an unsupported type": odd}, f"Supported: dense {', '.join(DTYPES)}; dequantise first.")
    return {name: _view(torch, tensor, kinds[tensor.dtype]) for name, tensor in tensors.items()}


def _torch(path: Path) -> Any:
    """The module, which alone knows the format."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(f"{path}: reading a pickle takes torch; pip install 'jaxmem[torch]'") from error
    return torch


def _load(torch: Any, path: Path) -> Mapping[Any, Any]:
    """The dict in a file, tensors not yet read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: damaged, or holds more than tensors and was not opened ({error})") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated, corrupt or not a file of torch.save ({error})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    return content


def _walk(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and values of a nested dict."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _view(torch: Any, tensor: Any, dtype: Any) -> View:
    """A torch tensor as a View; torch hands no bfloat16 to numpy, but its bits."""

    def box(index: Box) -> np.ndarray:
        part = tensor.detach()[index].contiguous()
        return part.view(torch.int16).numpy().view(dtype) if dtype == DTYPES["BF16"] else part.numpy()

    return View(tuple(tensor.shape), dtype, box)


def open_state(source: Path, allow: bool) -> dict[str, View]:
    """Name to View of every tensor in a file, or in a folder: its safetensors, or else its `pytorch_model*.bin`.

    Args:
      source: file or folder.
      allow: as in `open_pickle`.

    Raises:
      CheckpointError: see `open_pickle`, `open_file` and `open_weights`.
    """
    if not source.is_dir():
        return open_pickle(source, allow) if source.suffix in PICKLES else open_file(source)
    alone, pickled = sorted(source.glob("*.safetensors")), sorted(source.glob("pytorch_model*.bin"))
    if len(alone) == 1 and not (source / INDEX).is_file():
        return open_file(alone[0])
    if alone or not pickled:
        return open_weights(source)
    return {name: tensor for file in pickled for name, tensor in open_pickle(file, allow).items()}
