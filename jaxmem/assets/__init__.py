"""What jaxmem brings along: a tiny Qwen3-VL-format backbone for digit boards, and the command that made it."""

from __future__ import annotations

from pathlib import Path

TINY = Path(__file__).parent / "tiny-qwen3-vl"
"""The embedded default: a Hugging Face folder (see its README.md)."""
TINY_PVM = Path(__file__).parent / "tiny-pvm"
"""A PVM for that backbone, as `configs/digits_quickstart.py` leaves it: where the digit boards' GRPO starts."""
