"""The arrays that every backbone reads: one batch of prompts with their images.

Axis letters: B rows (prompts), T tokens, P patches, M merged visual rows (M = P / merge^2), D model width, K knowledge
items of a row, S vectors in front of a prompt.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp

Array = Any  # jax.Array or numpy.ndarray: a batch is made with numpy on the host and is a pytree for jax


@flax.struct.dataclass
class Batch:
    """A padded batch. Every array shards on its first axis and on nothing else.

    Patches live with their row, in the order of the row's images and video frames; all tables that depend on
    image sizes are computed on the host, so a compiled program depends only on (B, T, P).

    Attributes:
      tokens: [B, T] int32 token ids; media placeholders are repeated once per merged visual row.
      positions: [B, 3, T] int32 rotary positions (time, height, width); equal on all axes for text.
      segments: [B, T] int32, 0 for padding, 1.. for the documents packed into a row.
      loss_mask: [B, T] float32 weight of *predicting* the token that stands at this index (0 for prompts).
      visual_rows: [B, T] int32 index into the row's merged visual rows, or -1 where the token is text.
      blind: [B] bool, visual-key blocking: text queries of this row cannot attend to visual keys in the backbone.
      patches: [B, P, C] flattened pixels, C = channels * temporal_patch * patch * patch; P may be 0.
      patch_segments: [B, P] int32, 0 for padding, 1.. one number per frame (or tile): attention stays within it.
      patch_coords: [B, P, 2] int32 (row, column) of the patch in its frame, for the 2-D rotary embedding.
      patch_table: [B, P, 4] int32 rows of the learned position table that surround the patch; zero without a table.
      patch_weights: [B, P, 4] float32 bilinear weights of those rows; zero for padding.
      patch_windows: [B, P] int32, 0 for padding, 1.. one number per attention window of a frame; None for a tower
        without windows.
      patch_images: [B, P] int32, 0 for padding, 1.. one number per image, where its frames are tiles; None where each
        frame is an image.
      visual_taps: [B, 4, T] int32 and
      visual_weights: [B, 4, T] float32: the visual rows that a token is a weighted sum of, where a backbone scales the
        grid down; None where each token stands for the one row of `visual_rows`.
      question: [B, T] bool, the tokens of the first question; None unless a memory asks for them.
      prefix_rows: [B, T] int32 index among the vectors that stand in front of the row's prompt, or -1 where the token
        is none of them; None for a batch without such vectors.
      vectors: [B, S, D] these vectors, where they are known already (from a memory bank).
      items: the knowledge items whose embeddings they are, where they are still to be encoded: leaves [B, K, ...].
      query_rows: [B, T] int32 index among the tokens of the row's `query`, whose last hidden state stands here, or -1;
        None for a batch without queries.
      query: the prompts as another backbone reads them for the one that answers (CoMEM's transfer): leaves [B, ...].
    """

    tokens: Array
    positions: Array
    segments: Array
    loss_mask: Array
    visual_rows: Array
    blind: Array
    patches: Array
    patch_segments: Array
    patch_coords: Array
    patch_table: Array
    patch_weights: Array
    patch_windows: Array | None = None
    patch_images: Array | None = None
    visual_taps: Array | None = None
    visual_weights: Array | None = None
    question: Array | None = None
    prefix_rows: Array | None = None
    vectors: Array | None = None
    items: Batch | None = None
    query_rows: Array | None = None
    query: Batch | None = None

    @property
    def is_visual(self) -> Array:
        """[B, T] bool: does the token stand for a visual row?"""
        return self.visual_rows >= 0

    @property
    def shape_key(self) -> tuple[int, int, int]:
        """(B, T, P): two batches with the same key run the same compiled program."""
        return (*self.tokens.shape, self.patches.shape[1])


def rows_at(rows: Array, index: Array) -> Array:
    """[B, M, D] at [B, T] -> [B, T, D]: the row that each token stands for (any row where the index is negative)."""
    return jnp.take_along_axis(rows, jnp.maximum(jnp.asarray(index), 0)[..., None], axis=1)


def visual_at(rows: Array, batch: Batch) -> Array:
    """[B, M, D] -> [B, T, D]: what each token shows (anything where it is text)."""
    if batch.visual_taps is None:
        return rows_at(rows, batch.visual_rows)
    taps, weights = jnp.asarray(batch.visual_taps), jnp.asarray(batch.visual_weights).astype(rows.dtype)
    return sum(weights[:, tap, :, None] * rows_at(rows, taps[:, tap]) for tap in range(taps.shape[1]))


def shown_rows(rows: Array, batch: Batch) -> Array:
    """[B, M, D] -> [B, M, D]: every row that a token stands for as that token shows it, blended with its neighbours
    where a grid was scaled down."""
    if batch.visual_taps is None:
        return rows
    at = jnp.where(batch.is_visual, batch.visual_rows, rows.shape[1])
    return rows.at[jnp.arange(len(at))[:, None], at].set(visual_at(rows, batch), mode="drop")


def text_batch(tokens: Array, lengths: Array | None = None, patch_dim: int = 0) -> Batch:
    """A batch of plain text, right-padded.

    Args:
      tokens: [B, T] int32.
      lengths: [B] number of valid tokens per row; all T when None.
      patch_dim: width of the (empty) patch axis.

    Returns:
      A Batch with P = 0 whose loss mask covers every valid token but the first.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    rows, width = tokens.shape
    index = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width))
    valid = index < (width if lengths is None else jnp.asarray(lengths)[:, None])
    return Batch(
        tokens=tokens,
        positions=jnp.broadcast_to(jnp.where(valid, index, 0)[:, None], (rows, 3, width)),
        segments=valid.astype(jnp.int32),
        loss_mask=(valid & (index > 0)).astype(jnp.float32),
        visual_rows=jnp.full((rows, width), -1, jnp.int32),
        blind=jnp.zeros((rows,), bool),
        patches=jnp.zeros((rows, 0, patch_dim), jnp.float32),
        patch_segments=jnp.zeros((rows, 0), jnp.int32),
        patch_coords=jnp.zeros((rows, 0, 2), jnp.int32),
        patch_table=jnp.zeros((rows, 0, 4), jnp.int32),
        patch_weights=jnp.zeros((rows, 0, 4), jnp.float32),
    )
