"""`jaxmem bench checkpoint`: a checkpoint of 4 GB in shards, read and exported, in seconds and in host memory.

Both libraries read the same random folder in processes of their own, in turns; files are in the system's cache after a
first round that is thrown away, and every process has been given its memory before its time starts: a virtual machine
can take longer to hand out fresh memory than either library to fill it. `from_pretrained` on a CPU leaves weights in
the mapped files and reads what is used when it is used; so it is timed once as it is, and once with its weights copied
into memory, where ours are. On a CPU the weights themselves lie in host memory: peaks are what is needed beside them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig
from jaxmem.bench import loading
from jaxmem.bench.run import Comparison, median
from jaxmem.errors import ConfigError

SHARD = 1_000_000_000
IMPORT_ROOM, EXPORT_ROOM = 2e9, 1e9
"""Bytes beside the largest shard, and beside the largest tensor."""
OURS, EXPORT = "ours", "export"
PEERS = {"mapped": "from_pretrained, which maps files", "held": "from_pretrained with its weights in memory"}


def shape() -> BackboneConfig:
    """A Qwen3-VL of 4.1 GB in bfloat16."""
    text = TextConfig(
        layers=28, width=2048, mlp_width=6144, heads=16, kv_heads=8, head_dim=128, vocab=151_936,
        rope_section=(24, 20, 20),
    )  # fmt: skip
    vision = VisionConfig(12, 1024, 4096, 16, 2048, (3, 6, 9), table_side=48)
    return BackboneConfig("qwen3_vl", text, vision, 151_655, 151_656, 151_652, 151_653)


def run(config: BackboneConfig | None = None, shard: int = SHARD, runs: int = 3) -> list[Comparison]:
    """Writes the checkpoint, then reads it with both libraries and exports it.

    Args:
      config: the backbone.
      shard: bytes per file.
      runs: repetitions.

    Raises:
      ConfigError: the system does not say how much memory a process has (only Linux does), or a process fails.
    """
    if not Path("/proc/self/status").exists():
        raise ConfigError("bench checkpoint reads /proc/self/status, which only Linux has")
    with tempfile.TemporaryDirectory(prefix="jaxmem-checkpoint-") as folder:
        size = loading.write(Path(folder), config or shape(), shard)
        files = [file.stat().st_size for file in Path(folder).glob("*.safetensors")]
        found = [{side: _measured(side, folder) for side in (OURS, *PEERS)} for _ in range(runs + 1)][1:]
        exported = _measured(EXPORT, folder)
    label = f"import of {size / 1e9:.1f} GB in {len(files)} files"
    read = [one[OURS]["beside"] for one in found]
    return [
        *(_against(f"{label} against {what}", found, side) for side, what in PEERS.items()),
        _beside("import", read, max(files) + IMPORT_ROOM, "largest shard + 2 GB"),
        _beside("export", [exported["beside"]], exported["largest"] + EXPORT_ROOM, "largest tensor + 1 GB"),
    ]


def _against(label: str, found: list[dict[str, dict[str, float]]], side: str) -> Comparison:
    """Seconds of our import against those of a peer."""
    runs = {"ours": [one[OURS]["seconds"] for one in found], "peer": [one[side]["seconds"] for one in found]}
    ours, peer = median(runs["ours"]), median(runs["peer"])
    return Comparison(label, "s", ours, peer, ours / peer, "not slower", runs)


def _beside(what: str, peaks: list[float], limit: float, goal: str) -> Comparison:
    """Host memory beside the weights, in GB, against a limit."""
    peaks = [peak / 1e9 for peak in peaks]
    name = f"{what}: peak of host memory beside the weights"
    runs = {"ours": peaks, "peer": [limit / 1e9]}
    return Comparison(name, "GB", median(peaks), limit / 1e9, median(peaks) * 1e9 / limit, f"<= {goal}", runs)


def _measured(side: str, folder: str) -> dict[str, float]:
    """What a process of its own says."""
    command = [sys.executable, "-m", "jaxmem.bench.checkpoints", side, folder]
    quiet = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"bench checkpoint: {side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@dataclasses.dataclass
class Watch:
    """Peak of this process's anonymous memory while a function runs, in bytes, and seconds."""

    work: Callable[[], Any]
    seconds: float = 0.0
    peak: float = 0.0

    def __call__(self) -> Any:
        """What the function returns."""
        done, peaks = threading.Event(), []
        watcher = threading.Thread(target=lambda: peaks.append(loading.peak(done)))
        watcher.start()
        start = time.perf_counter()
        result = self.work()
        self.seconds = time.perf_counter() - start
        time.sleep(0.05)
        done.set()
        watcher.join()
        self.peak = peaks[0] * 1e9
        return result


def _given_memory(folder: str) -> None:
    """Lets the system hand out as much memory as the weights need, and gives it back to this process's next request."""
    count = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    np.empty(count * 5 // 4, np.uint8).fill(1)


def _theirs(folder: str, held: bool) -> dict[str, float]:
    """transformers reads the folder; `held`: and copies its weights from the mapped files into memory."""
    import torch
    import transformers

    def read() -> Any:
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
        for parameter in model.parameters() if held else ():
            parameter.data = parameter.data.clone()
        return model

    _given_memory(folder)
    watch = Watch(read)
    watch()
    return {"seconds": watch.seconds}


def _ours(folder: str, export: bool) -> dict[str, float]:
    """jaxmem reads the folder, and on demand writes it again."""
    import jax

    from jaxmem.backbones import registry
    from jaxmem.checkpoints import huggingface
    from jaxmem.checkpoints.table import expected

    config = registry.config_from_hf(huggingface.read_config(folder))
    jax.block_until_ready(jax.device_put(0.0))  # starts the backend
    _given_memory(folder)
    watch = Watch(lambda: huggingface.load_backbone(folder, config))
    base = watch()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    if not export:
        return {"seconds": watch.seconds, "beside": watch.peak - weights}
    with tempfile.TemporaryDirectory(prefix="jaxmem-checkpoint-") as out:
        writing = Watch(lambda: huggingface.save_backbone(out, base, config, max_shard_size=SHARD))
        writing()
    names = huggingface.BACKBONE_TABLES[config.model_type].table(config)
    shapes = expected(names, registry.backbone(config.model_type).shapes(config)).values()
    largest = max(map(math.prod, shapes)) * base["embed"].dtype.itemsize
    return {"seconds": writing.seconds, "beside": writing.peak - weights, "largest": largest}


def main(side: str, folder: str) -> None:
    """What one process does: prints its figures as JSON."""
    found = _theirs(folder, held=side == "held") if side in PEERS else _ours(folder, export=side == EXPORT)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
