"""The time of a video: as text in front of each temporal patch (Qwen3-VL), or as rotary positions (Qwen2.5-VL)."""

from __future__ import annotations


def timestamps(frames: int, fps: float, temporal_patch_size: int) -> list[float]:
    """Seconds of each temporal patch: the middle between its first and its last frame.

    Args:
      frames: number of frames; the last is repeated until the patches are full.
      fps: frames per second.
      temporal_patch_size: frames per patch.

    Returns:
      ceil(frames / temporal_patch_size) times.
    """
    starts = range(0, frames, temporal_patch_size)
    return [(first / fps + min(first + temporal_patch_size - 1, frames - 1) / fps) / 2 for first in starts]


def time_step(fps: float, temporal_patch_size: int, positions_per_second: float) -> float:
    """Rotary positions from one temporal patch to the next: the seconds between them, times positions per second."""
    return temporal_patch_size / fps * positions_per_second


def timeline(times: list[float], start: str, pad: str, end: str) -> str:
    """The text of one video of Qwen3-VL: `<0.5 seconds>` and one wrapped placeholder per temporal patch.

    Args:
      times: seconds of the temporal patches.
      start: text of the vision start token.
      pad: text of the video placeholder.
      end: text of the vision end token.
    """
    return "".join(f"<{time:.1f} seconds>{start}{pad}{end}" for time in times)
