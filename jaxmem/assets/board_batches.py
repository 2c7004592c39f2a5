"""Boards straight into `Batch` arrays, for the thousands of batches that training the tiny backbone reads.

All boards have one image size, so the patch tables are constants and only tokens and pixels are new. The result
equals `Processor.encode` and `collate` on the same messages (a test compares them), at a tenth of their time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmem.backbones.batch import Batch
from jaxmem.backbones.config import BackboneConfig
from jaxmem.data.boards import CELL_PIXELS, SIDE, Board

_GRID = 2 * SIDE  # patches per side of a board
_PATCH = CELL_PIXELS // 2


class BoardBatcher:
    """Makes batches of boards for a tower with 16-pixel patches, 2x2 merging and a position table of side 8.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      config: the backbone.

    Raises:
      ValueError: the tower cuts images otherwise.
    """

    def __init__(self, tokenizer: Any, config: BackboneConfig) -> None:
        seen = config.vision
        if (seen.patch_size, seen.merge_size, seen.table_side) != (_PATCH, 2, _GRID):
            raise ValueError(f"boards need patches of {_PATCH}, merging 2x2, a table of side {_GRID}; this is {seen}")
        self.tokenizer = tokenizer
        self.image_token = config.image_token
        self.end_token = tokenizer.token_to_id("<|im_end|>")
        self.start_token = tokenizer.token_to_id("<|im_start|>")
        self.coords = np.stack(np.unravel_index(_merge_order(), (_GRID, _GRID)), axis=-1).astype(np.int32)

    def __call__(self, boards: Sequence[Board], width: int, blind: bool = False) -> Batch:
        """A right-padded batch of `boards`, [B, width] tokens.

        Raises:
          ValueError: a board needs more than `width` tokens.
        """
        tokens = np.zeros((len(boards), width), np.int32)
        lengths = np.zeros(len(boards), np.int32)
        for row, encoding in enumerate(self.tokenizer.encode_batch([_chat(board) for board in boards])):
            if len(encoding.ids) > width:
                raise ValueError(f"board {row} needs {len(encoding.ids)} tokens, the batch has {width}")
            lengths[row] = len(encoding.ids)
            tokens[row, : lengths[row]] = encoding.ids
        valid = np.arange(width) < lengths[:, None]
        tokens = np.where(valid, tokens, self.tokenizer.token_to_id("<|endoftext|>"))
        visual = tokens == self.image_token
        return Batch(
            tokens=tokens,
            positions=_positions(visual, valid),
            segments=valid.astype(np.int32),
            loss_mask=self._answers(tokens, valid),
            visual_rows=np.where(visual, np.cumsum(visual, axis=1) - 1, -1).astype(np.int32),
            blind=np.full(len(boards), blind),
            **self._pixels(boards),
        )

    def _answers(self, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """[B, T] float32, 1 from the third token after the last <|im_start|> to the <|im_end|> that follows."""
        start = np.cumsum(tokens == self.start_token, axis=1) == 2
        place = np.cumsum(start, axis=1)  # 1 at <|im_start|>, 2 at the role, 3 at its newline
        ended = np.cumsum((tokens == self.end_token) & start, axis=1)
        inside = (ended == 0) | ((ended == 1) & (tokens == self.end_token))
        return (start & (place > 3) & inside & valid).astype(np.float32)

    def _pixels(self, boards: Sequence[Board]) -> dict[str, Any]:
        """The patch arrays of a batch: pixels to -1..1, cut in merge order, 3 channels x 2 frames."""
        rows = len(boards)
        grey = np.stack([board.image[..., 0] for board in boards])  # the three channels of a board are equal
        grey = grey.reshape(rows, SIDE, 2, _PATCH, SIDE, 2, _PATCH).transpose(0, 1, 4, 2, 5, 3, 6)
        grey = (grey.reshape(rows, _GRID**2, 1, _PATCH**2).astype(np.float32) / 255.0 - 0.5) / 0.5
        patches = np.broadcast_to(grey, (rows, _GRID**2, 6, _PATCH**2)).reshape(rows, _GRID**2, -1)
        table = np.zeros((rows, _GRID**2, 4), np.int32)
        table[..., 0] = self.coords[:, 0] * _GRID + self.coords[:, 1]
        weights = np.zeros((rows, _GRID**2, 4), np.float32)
        weights[..., 0] = 1.0
        return {
            "patches": patches,
            "patch_segments": np.ones((rows, _GRID**2), np.int32),
            "patch_coords": np.broadcast_to(self.coords, (rows, *self.coords.shape)),
            "patch_table": table,
            "patch_weights": weights,
        }


def _merge_order() -> np.ndarray:
    """[64] places of the row-major patch grid in the order of the tower: the four patches of a cell together."""
    places = np.arange(_GRID**2).reshape(SIDE, 2, SIDE, 2)
    return places.transpose(0, 2, 1, 3).reshape(-1)


def _chat(board: Board) -> str:
    """The whole conversation as Qwen3-VL's chat template writes it, with one placeholder per cell."""
    image = f"<|vision_start|>{'<|image_pad|>' * SIDE**2}<|vision_end|>"
    user = f"<|im_start|>user\n{image}{board.prompt}<|im_end|>\n"
    return f"{user}<|im_start|>assistant\n{board.answer}<|im_end|>\n"


def _positions(visual: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[B, 3, T] int32 rotary positions: the image advances the count by 4, its side, not by its 16 tokens."""
    before = np.cumsum(visual, axis=1) - visual  # image tokens in front of each token
    order = np.cumsum(np.ones_like(before), axis=1) - 1
    row = np.where(visual, before // SIDE, 0)
    column = np.where(visual, before % SIDE, 0)
    skipped = np.where(before > 0, SIDE**2 - SIDE, 0)
    start = np.where(visual, order - before, order - skipped)
    return np.where(valid, np.stack([start, start + row, start + column]), 0).swapaxes(0, 1).astype(np.int32)
