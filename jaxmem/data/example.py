"""One encoded row, before it is padded into a batch."""

from __future__ import annotations

import dataclasses

import numpy as np

PER_TOKEN = {
    "tokens": 0,
    "positions": 0,
    "loss_mask": 0,
    "visual_rows": -1,
    "prefix_rows": -1,
    "visual_taps": 0,
    "visual_weights": 0,
    "question": 0,
    "query_rows": -1,
}
"""Fields of an Example whose last axis is its tokens, and the values of their padding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One row of tokens with its patches; the fields are those of `Batch` without the batch axis and padding.

    Axis letters: T tokens, P patches, C length of a flattened patch.

    Attributes:
      tokens: [T] int32.
      positions: [3, T] int32.
      loss_mask: [T] float32, 1 on assistant content and on the token that ends the turn.
      visual_rows: [T] int32 index of the merged visual row, or -1 for text.
      patches: [P, C] float32; P is 0 without images.
      patch_segments: [P] int32.
      patch_coords: [P, 2] int32.
      patch_table: [P, 4] int32.
      patch_weights: [P, 4] float32.
      patch_windows: [P] int32, or None for a tower without windows.
      patch_images: [P] int32 number of the image, where its frames are tiles; None where a frame is an image.
      prefix_rows: [T] int32 index among the vectors in front of the row, or -1; None without such vectors.
      items: the knowledge items whose embeddings these vectors are, or
      vectors: [S, D] the vectors themselves.
      visual_taps: [4, T] int32 and
      visual_weights: [4, T] float32: the visual rows that a token is a weighted sum of; None where each stands for one.
      question: [T] bool, the tokens of the first user turn's text; None where nobody asks for them.
      query_rows: [T] int32 index among the tokens of `query`, or -1; None without one.
      query: the row's prompt as another backbone reads it for the one that answers.
      images: merged (rows, columns) per image and per temporal patch of a video, in the order of the tokens.
      unit: patches that become one visual token, or are one tile: a batch holds a multiple of them.
    """

    tokens: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    visual_rows: np.ndarray
    patches: np.ndarray
    patch_segments: np.ndarray
    patch_coords: np.ndarray
    patch_table: np.ndarray
    patch_weights: np.ndarray
    images: tuple[tuple[int, int], ...] = ()
    patch_windows: np.ndarray | None = None
    patch_images: np.ndarray | None = None
    prefix_rows: np.ndarray | None = None
    items: tuple[Example, ...] = ()
    vectors: np.ndarray | None = None
    visual_taps: np.ndarray | None = None
    visual_weights: np.ndarray | None = None
    question: np.ndarray | None = None
    query_rows: np.ndarray | None = None
    query: Example | None = None
    unit: int = 1

    def __len__(self) -> int:
        """T."""
        return len(self.tokens)

    @property
    def visual_count(self) -> int:
        """Number of tokens that stand for merged visual rows."""
        return int((self.visual_rows >= 0).sum())

    def upto(self, end: int) -> Example:
        """The row without its tokens from `end` on; patches stay."""
        held = [name for name in PER_TOKEN if getattr(self, name) is not None]
        return dataclasses.replace(self, **{name: getattr(self, name)[..., :end] for name in held})
