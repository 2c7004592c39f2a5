"""`jaxmem doctor`: versions, devices, memory, what is missing for what; or whether checkpoints are whole."""

from __future__ import annotations

import json as json_lib
import os
import platform
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jaxmem
from jaxmem import assets

PACKAGES: Mapping[str, str] = {
    "jax": "arrays, compilation, devices",
    "flax": "modules",
    "optax": "optimizers",
    "orbax-checkpoint": "checkpoints",
    "transformers": "tokenizers and image processors",
    "tokenizers": "tokenizers",
    "grain": "data pipelines",
    "ml-collections": "configurations",
    "absl-py": "command-line flags",
    "safetensors": "weights",
    "pillow": "images",
    "numpy": "host arrays",
    "jinja2": "chat templates",
    "rich": "progress bars",
    "tensorboardX": "TensorBoard metrics",
}
"""Base dependencies and what they are for."""

EXTRAS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "digits": (("scikit-learn",), "digit boards: the quickstart's handwriting"),
    "math": (("math-verify",), "judging mathematics in rewards"),
    "torch": (("torch",), "comparing with PyTorch (jaxmem bench decode)"),
    "bench": (("torch", "trl"), "the peers of jaxmem bench"),
    "cuda": (("jax-cuda12-plugin",), "NVIDIA GPUs, CUDA 12"),
    "cuda13": (("jax-cuda13-plugin",), "NVIDIA GPUs, CUDA 13"),
    "tpu": (("libtpu",), "TPUs"),
    "retrieval": (("faiss-cpu", "sentencepiece"), "an approximate index over a memory bank, SigLIP's tokenizer"),
    "lance": (("lancedb",), "an index that outgrows one machine"),
    "parquet": (("pyarrow",), "question files of benchmarks in parquet"),
    "data": (("tensorflow-datasets",), "TensorFlow Datasets"),
    "notebook": (("ipykernel", "matplotlib", "scikit-learn"), "the notebooks"),
    "test": (("pytest", "chex", "torch", "nbformat", "nbclient"), "the tests"),
    "lint": (("ruff", "pyrefly"), "the linter and the type checker"),
}
"""Extras of the package: the distributions that show that one is installed, and what it is for."""


def main(json: bool = False, checkpoint: str | None = None) -> int:
    """Print the report, as text or as one JSON object.

    Args:
      json: one JSON object and nothing else.
      checkpoint: a run's folder; then the report is about its checkpoints.

    Returns:
      1 when there are problems, else 0.

    Raises:
      CheckpointError: `checkpoint` is not the folder of a run.
    """
    found, text = (report(), render) if checkpoint is None else _checkpoints(checkpoint)
    print(json_lib.dumps(found, indent=2) if json else text(found))
    return 1 if found["problems"] else 0


def _checkpoints(folder: str) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], str]]:
    """The report about a run's checkpoints and what prints it; no accelerator is taken from a run that goes on."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jaxmem.checkpoints import examine

    return examine.examine(folder), examine.render


def report() -> dict[str, Any]:
    """Everything the doctor knows, as JSON types. Memory is in bytes; None means unknown or absent."""
    packages = versions()
    accelerator = jax_report()
    found = {
        "jaxmem": jaxmem.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "jax": accelerator,
        "host": host_report(),
        "extras": {name: _extra(name) for name in EXTRAS},
        "tiny_backbone": str(assets.TINY) if _tiny_is_whole() else None,
    }
    return found | {"problems": problems(found), "hints": hints(found)}


def versions() -> dict[str, str | None]:
    """Installed version of every base dependency, None where it is absent."""
    return {name: _version(name) for name in PACKAGES}


def jax_report() -> dict[str, Any]:
    """Backend, devices with their memory, and the compile cache; `error` says why jax did not start."""
    try:
        import jax

        devices = [_device(d) for d in jax.local_devices()]
        cache = jax.config.jax_compilation_cache_dir  # pyrefly: ignore[missing-attribute]
        return {"backend": jax.default_backend(), "devices": devices, "compile_cache": cache, "error": None}
    except Exception as error:  # whatever stops jax is what the user came to read
        reason = f"{type(error).__name__}: {error}"
        return {"backend": None, "devices": [], "compile_cache": None, "error": reason}


def host_report() -> dict[str, Any]:
    """Cores this process may use and the host's memory in bytes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        total = None
    available = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    return {"cores": cores, "memory": total, "available": int(available.group(1)) * 1024 if available else None}


def problems(found: Mapping[str, Any]) -> list[str]:
    """What keeps jaxmem from working, each with its remedy."""
    listed = []
    for name, version in found["packages"].items():
        if version is None:
            listed.append(f"{name} is not installed ({PACKAGES[name]}): pip install {name}")
    listed += _outside_ranges()
    jax_version, flax_version = found["packages"]["jax"], found["packages"]["flax"]
    if jax_version and flax_version and _key(jax_version) >= (0, 11, 1) and _key(flax_version) <= (0, 12, 8):
        listed.append(f"flax {flax_version} does not work with jax {jax_version}: pip install 'flax>=0.12.9'")
    if jax_version == "0.10.2":  # jax issue 39103
        listed.append("jax 0.10.2 computes some batched products wrongly on a CPU: pip install 'jax!=0.10.2,<0.13'")
    if found["jax"]["error"]:
        listed.append(f"jax does not start: {found['jax']['error']}")
    if found["tiny_backbone"] is None:
        listed.append(f"the shipped tiny backbone is not in {assets.TINY}: install jaxmem again")
    return listed


def hints(found: Mapping[str, Any]) -> list[str]:
    """What would make jaxmem faster on this machine."""
    listed = []
    forced = os.environ.get("JAX_PLATFORMS")
    if found["jax"]["backend"] == "cpu":
        for device, name in (("/dev/nvidia0", "cuda"), ("/dev/accel0", "tpu")):
            if Path(device).exists():
                remedy = f"JAX_PLATFORMS={forced} is set" if forced else _install(name)
                listed.append(f"{device} is here but jax runs on the CPU: {remedy}")
    if found["jax"]["backend"] and not found["jax"]["compile_cache"]:
        listed.append("compiled programs are not kept: set JAX_COMPILATION_CACHE_DIR to a folder to start faster")
    return listed


def render(found: Mapping[str, Any]) -> str:
    """The report as text, one fact a line."""
    jax, host = found["jax"], found["host"]
    lines = [f"jaxmem {found['jaxmem']}, Python {found['python']}, {found['platform']}", "", "packages"]
    lines += [f"  {name:<18}{version or 'MISSING':<12}{PACKAGES[name]}" for name, version in found["packages"].items()]
    lines += ["", f"devices (backend: {jax['backend'] or 'none'})"]
    lines += [f"  {d['id']:<4}{d['kind']:<24}{_gib(d['memory'])}" for d in jax["devices"]]
    lines += [f"  host: {host['cores']} cores, {_gib(host['memory'])}, {_gib(host['available'])} available"]
    lines += [f"  compile cache: {jax['compile_cache'] or 'off'}", "", f"extras ({_install('NAME')})"]
    for name, extra in found["extras"].items():
        state = "installed" if not extra["missing"] else "not installed"
        lines.append(f"  {name:<12}{state:<16}{extra['for']}")
    lines += ["", f"tiny backbone: {found['tiny_backbone'] or 'MISSING'}"]
    lines += [f"hint: {hint}" for hint in found["hints"]]
    lines += [f"PROBLEM: {problem}" for problem in found["problems"]] or ["no problems found"]
    return "\n".join(lines)


def _device(device: Any) -> dict[str, Any]:
    """One device; its memory in bytes where the backend tells."""
    stats = device.memory_stats() or {}
    return {"id": device.id, "kind": device.device_kind, "memory": stats.get("bytes_limit")}


def _extra(name: str) -> dict[str, Any]:
    distributions, purpose = EXTRAS[name]
    return {"missing": [d for d in distributions if _version(d) is None], "for": purpose}


def _install(extra: str) -> str:
    return f"in jaxmem's source folder: pip install -e '.[{extra}]'"


def _outside_ranges() -> list[str]:
    """Base dependencies whose installed version is outside the range that jaxmem's metadata states."""
    try:
        from packaging.requirements import Requirement

        stated = [Requirement(r) for r in metadata.requires("jaxmem") or []]
    except (ImportError, metadata.PackageNotFoundError):
        return []  # run from a source tree that was never installed: no metadata to hold versions against
    listed = []
    for requirement in stated:
        version = _version(requirement.name)
        base = requirement.marker is None and version is not None
        if base and not requirement.specifier.contains(version, prereleases=True):
            listed.append(f"{requirement.name} {version} is untested: pip install '{requirement}'")
    return listed


def _tiny_is_whole() -> bool:
    return (assets.TINY / "config.json").is_file() and any(assets.TINY.glob("*.safetensors"))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _key(version: str) -> tuple[int, ...]:
    """The first three numbers of a version."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _gib(size: int | None) -> str:
    return "memory unknown" if size is None else f"{size / 2**30:.1f} GiB"
