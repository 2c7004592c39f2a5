"""`jaxmem bench loading`: host memory while a checkpoint of 8B shape is read onto a mesh by several hosts.

A random checkpoint is written into the temporary folder (17.5 GB), and processes that stand for hosts read it onto
eight CPU devices between them. Devices' memory is the host's own here, so a host needs its pieces and little more.
"""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.published import PUBLISHED
from jaxmem.bench.models import hf_config
from jaxmem.bench.run import Comparison, median
from jaxmem.errors import ConfigError

DEVICES, ROOM = 8, 2e9
_SHARD = 5_000_000_000


def run(config: BackboneConfig | None = None, hosts: int = 2, runs: int = 1) -> list[Comparison]:
    """Writes the checkpoint, reads it `runs` times, and compares the peak of a host with model / hosts + 2 GB.

    Args:
      config: the backbone; Qwen3-VL-8B by default.
      hosts: processes.
      runs: repetitions.

    Raises:
      ConfigError: the system does not say how much memory a process has (only Linux does).
    """
    if not Path("/proc/self/status").exists():
        raise ConfigError("bench loading reads /proc/self/status, which only Linux has")
    config = config or PUBLISHED["Qwen3-VL-8B-Instruct"]
    with tempfile.TemporaryDirectory(prefix="jaxmem-loading-") as folder:
        size = write(Path(folder), config)
        peaks = [max(_read_by(folder, hosts)) for _ in range(runs)]
    limit = (size / hosts + ROOM) / 1e9
    label = f"{size / 1e9:.1f} GB onto {DEVICES} devices of {hosts} hosts, peak of a host"
    goal = "peak <= model / hosts + 2 GB"
    return [
        Comparison(label, "GB", median(peaks), limit, median(peaks) / limit, goal, {"ours": peaks, "peer": [limit]})
    ]


def write(folder: Path, config: BackboneConfig, shard: int = _SHARD) -> int:
    """A checkpoint of random bfloat16 weights in Hugging Face's layout; returns its weights' bytes."""
    import jax.numpy as jnp

    from jaxmem.backbones import registry
    from jaxmem.checkpoints.huggingface import BACKBONE_TABLES
    from jaxmem.checkpoints.table import View, expected
    from jaxmem.checkpoints.weights import write_json, write_weights

    pool = np.random.default_rng(0).normal(size=1 << 20).astype(jnp.bfloat16)
    names = BACKBONE_TABLES[config.model_type].table(config)
    shapes = expected(names, registry.backbone(config.model_type).shapes(config))
    tensors = [(name, View(shape, pool.dtype, lambda _, s=shape: np.resize(pool, s))) for name, shape in shapes.items()]
    write_weights(folder, tensors, shard)
    write_json(folder / "config.json", hf_config(config))
    return sum(math.prod(shape) for shape in shapes.values()) * pool.dtype.itemsize


def _read_by(folder: str, hosts: int) -> list[float]:
    """Peaks of all hosts in GB, without what the system keeps of files."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    base = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // hosts)}
    base |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts)}
    command = [sys.executable, "-m", "jaxmem.bench.loading", folder]
    running = [
        subprocess.Popen(command, env={**base, "JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(hosts)
    ]
    found = [process.communicate()[0] for process in running]
    if failed := [process.returncode for process in running if process.returncode]:
        raise ConfigError(f"bench loading: a process ended with exit code {failed[0]}; is there memory for the model?")
    return [float(out.split()[-1]) for out in found]


def peak(done: threading.Event) -> float:
    """Largest anonymous memory of this process until `done`, in GB: file pages can be taken back at any time."""
    highest = 0.0
    while not done.wait(0.02):
        held = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        highest = max(highest, int(held[1]) / 1e6) if held else highest
    return highest


def main(folder: str) -> None:
    """What one host does: reads its pieces and prints its peak."""
    from jaxmem.backbones import registry
    from jaxmem.checkpoints import huggingface
    from jaxmem.distributed import hosts, mesh

    hosts.start(hosts.HostsConfig(timeout_s=600))
    with hosts.together():
        config = registry.config_from_hf(huggingface.read_config(folder))
        tensor = math.gcd(2, config.text.kv_heads)
        places = mesh.make_mesh(fsdp=-1, tensor=tensor)
        mesh.check_heads(config.text, places)
        done, peaks = threading.Event(), []
        watcher = threading.Thread(target=lambda: peaks.append(peak(done)))
        watcher.start()
        base = huggingface.load_backbone(
            folder, config, sharding=mesh.shardings(places, registry.backbone(config.model_type).shapes(config))
        )
        time.sleep(0.1)
        done.set()
        watcher.join()
        del base
    print(f"peak {peaks[0]:.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
