"""What jaxmem brings along: a tiny Qwen3-VL-format backbone for digit boards, and the command that made it."""

from __future__ import annotations

from pathlib import Path

TINY = Path(__file__).parent / "tiny-qwen3-vl"
"""The embedded default: a Hugging Face folder (see its README.md)."""
