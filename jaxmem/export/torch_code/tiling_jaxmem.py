"""How LLaVA-style models cut images to tiles, and in which order the tokens of its tiles stand for an image.

Letters: n tiles of an image, the thumbnail first; N' tokens of a tile; D their width.
"""

import dataclasses
import math

import torch
from torch import nn
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image


@dataclasses.dataclass
class Tiling:
    """The tiling of a model.

    Attributes:
      image_size: pixels per side of a tile.
      pinpoints: (height, width) in pixels that an image may fill with tiles.
      aspect: "anyres", "anyres_max_K" (the tokens of K tiles at most, about) or "single": an image is one tile.
      grid: tokens per side of a tile; None where they have no place in it.
      tokens: N'.
      single_when_several: several images of one prompt are one padded tile each (LLaVA-OneVision).
    """

    image_size: int
    pinpoints: list
    aspect: str
    grid: int | None
    tokens: int
    single_when_several: bool

    @classmethod
    def of(cls, config):
        """That of a config.json, as a dict."""
        tiles = config["jaxmem"]["tiles"]
        onevision = config["jaxmem"]["backbone"] == "llava_onevision"
        size, pinpoints = config["vision_config"]["image_size"], config["image_grid_pinpoints"]
        return cls(size, pinpoints, tiles["aspect"], tiles["grid"], tiles["tokens"], onevision)

    def count_tiles(self, size, several):
        """n of an image of size = (height, width) in pixels, alone in its prompt or one of several."""
        if self.aspect == "single" or (several and self.single_when_several):
            return 1
        rows, columns = self.canvas(size)
        return 1 + rows * columns

    def count_tokens(self, size, several=False):
        """Tokens of an image of size = (height, width) in pixels, alone in its prompt or one of several."""
        tokens = torch.zeros(self.count_tiles(size, several), self.tokens, 1)
        return len(self.arrange(tokens, size, tokens.new_zeros(1)))

    def canvas(self, size):
        """(rows, columns) of the tiles that an image is cut to beside its thumbnail."""
        return tuple(length // self.image_size for length in select_best_resolution(size, self.pinpoints))

    def arrange(self, tokens, size, newline):
        """The tokens of one image as they stand in the prompt.

        The thumbnail's come first. The other tiles are stitched, the bars of their canvas are cut off, with
        "anyres_max_K" a large map is scaled down, and a newline ends each row. Without a grid, tiles stay whole and a
        newline ends each row of tiles. A single tile has one newline behind it.

        Args:
          tokens: [n, N', D], or numbers of tokens [n, N', 1].
          size: (height, width) of the image in pixels.
          newline: [D], or a number [1].

        Returns:
          [tokens of the image, D].
        """
        if len(tokens) == 1:
            return torch.cat([tokens[0], newline[None].to(tokens)])
        thumbnail, fine, (rows, columns) = tokens[0], tokens[1:], self.canvas(size)
        if self.grid is None:
            lines = fine.reshape(rows, -1, fine.shape[-1])
        else:
            lines = fine.view(rows, columns, self.grid, self.grid, -1).permute(4, 0, 2, 1, 3)
            lines = unpad_image(lines.flatten(1, 2).flatten(2, 3), size)  # [D, rows of tokens, columns]
            lines = self.scaled(lines).movedim(0, -1)
        ends = newline.to(lines).expand(len(lines), 1, -1)
        return torch.cat([thumbnail, torch.cat([lines, ends], dim=1).flatten(0, 1)])

    def scaled(self, lines):
        """[D, h, w], with "anyres_max_K" scaled down to about K tiles where it has over 1.1^2 K."""
        most = self.aspect.removeprefix("anyres_max_")
        if not most.isdigit():
            return lines
        height, width = lines.shape[1:]
        ratio = math.sqrt(height * width / (int(most) * self.grid**2))
        if ratio <= 1.1:
            return lines
        return nn.functional.interpolate(lines[None], (int(height // ratio), int(width // ratio)), mode="bilinear")[0]
