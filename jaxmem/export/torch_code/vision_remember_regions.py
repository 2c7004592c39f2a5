"""Vision Remember: which tokens of a batch are vision tokens, and which features of the tower each of them may ask.

Letters: N vision tokens of the batch, one after the other; K keys of a window; T tiles, P patches and N' tokens of one,
W width of the tower, C channels of the fused features.
"""

import dataclasses
import math

import torch

from .vision_remember_layers import margin


@dataclasses.dataclass
class VisionTokens:
    """The vision tokens of a batch of prompts; newlines of LLaVA-style models are none.

    Attributes:
      rows, places: [N] of each token: its row of the batch, and where it stands there.
      images: per image (of videos, per frame) its row of the batch and the indices of its tokens among the N.
      windows: [N, K, C] the features that each token may ask, and
      mask: [N, K] bool, which of them exist; None where tokens ask whole tiles:
      wholes: per tile or frame the indices of its tokens, and its features [P, C].
    """

    rows: torch.Tensor
    places: torch.Tensor
    images: list
    windows: torch.Tensor = None
    mask: torch.Tensor = None
    wholes: list = None

    @property
    def in_rows(self):
        """Rows of the batch that have vision tokens."""
        return sorted({row for row, _ in self.images})

    def __add__(self, other):
        """The tokens of both."""
        shift = len(self.rows)
        moved = lambda groups: [(key, members + shift) for key, members in groups]  # noqa: E731
        joined = lambda name: torch.cat([getattr(self, name), getattr(other, name)])  # noqa: E731
        places, images = (joined("rows"), joined("places")), self.images + moved(other.images)
        if self.windows is not None:
            return VisionTokens(*places, images, joined("windows"), joined("mask"))
        wholes = self.wholes + [(members + shift, features) for members, features in other.wholes]
        return VisionTokens(*places, images, wholes=wholes)


def images_by_row(counts, tokens):
    """The images of every row of the batch.

    Args:
      counts: tokens of each image, in order.
      tokens: placeholders in each row. Where `generate` continues a prompt several times, its row is there several
        times in a row, and its images may be there once.

    Returns:
      A list of lists of numbers of images.
    """
    copies, rest = divmod(sum(tokens), max(1, sum(counts)))
    found, at = [], 0
    for total in tokens[:: max(1, copies)]:
        own = []
        while sum(counts[i] for i in own) < total and at < len(counts):
            own.append(at)
            at += 1
        found += [own] * max(1, copies)
    if rest or [sum(counts[i] for i in own) for own in found] != list(tokens):
        raise ValueError(f"images of {counts} tokens do not fill rows with {list(tokens)} placeholders")
    return found


def tile_tokens(c, model, outputs, features, is_image):
    """The vision tokens of a LLaVA-style model.

    Args:
      c: settings of the memory.
      model: `TiledImages`.
      outputs: of its `get_image_features`.
      features: [T, P, C] of all tiles.
      is_image: [R, S] bool, the placeholders of images.
    """
    by_row = images_by_row([len(rows) for rows in outputs.image_rows], is_image.sum(1).tolist())
    order = [(row, image) for row, own in enumerate(by_row) for image in own]
    spans = [outputs.image_rows[image].to(is_image.device) for _, image in order]
    numbers = torch.cat(spans)  # of each placeholder: its token among those of all tiles
    owners = torch.cat([torch.full_like(span, i) for i, span in enumerate(spans)])
    rows, places = is_image.nonzero(as_tuple=True)
    rows, places, numbers, owners = (x[numbers >= 0] for x in (rows, places, numbers, owners))  # no newlines
    images = [(row, (owners == i).nonzero()[:, 0]) for i, (row, _) in enumerate(order)]
    inside = torch.cat([shown(model, *image) for image in outputs.image_tiles]).to(features.device)
    if not c["local"]:
        return VisionTokens(
            rows, places, images, wholes=tiles_of(images, numbers // model.tiling.tokens, features, inside)
        )
    windows, there = cut(features, c, model.tiles["side"])
    seen = cut(inside[..., None], c, model.tiles["side"])[0][..., 0]
    seen = torch.where(seen.any(dim=2, keepdim=True), seen, there)  # a window of bars alone sees them
    return VisionTokens(rows, places, images, windows.flatten(0, 1)[numbers], seen.flatten(0, 1)[numbers])


def tiles_of(images, tiles, features, inside):
    """Per tile of each image its tokens, and the features that they may ask.

    Args:
      images: of `VisionTokens`.
      tiles: [N] the tile of each token.
      features: [T, P, C].
      inside: [T, P] bool, patches that show some of their image.
    """
    found = []
    for _, members in images:
        for tile in tiles[members].unique().tolist():
            valid = inside[tile] if inside[tile].any() else torch.ones_like(inside[tile])
            found.append((members[tiles[members] == tile], features[tile][valid]))
    return found


def cut(features, c, side):
    """The patches of every cell and those around it: [T, side^2, C] -> [T, N', K, C], and [1, N', K] which exist.

    Zeros stand over the border; windows reach over the lower and right one where the ratio does not divide the side.
    """
    ratio, around = c["cells"]["ratio"], margin(c)
    count, reach = math.ceil(side / ratio), ratio + 2 * around
    image = features.unflatten(1, (side, side)).movedim(-1, 1)
    border = (around, count * ratio - side + around) * 2

    def windows(image):
        padded = torch.nn.functional.pad(image, border)
        return padded.unfold(2, reach, ratio).unfold(3, reach, ratio).flatten(4).flatten(2, 3).movedim(1, -1)

    there = torch.ones_like(image[:1, :1], dtype=torch.bool)
    return windows(image), windows(there)[..., 0]


def shown(model, size, tiles, padded):
    """Patches that show some of an image, not only the bars around it.

    Args:
      model: `TiledImages`.
      size: (height, width) of the image in pixels.
      tiles: n, the thumbnail among them.
      padded: the image stands in the middle of a square, which is resized to one tile.

    Returns:
      [n, P] bool.
    """
    tile, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    whole = torch.ones(1, (tile // patch) ** 2, dtype=torch.bool)  # the thumbnail is squeezed
    if padded:
        canvas, most = (1, 1), max(size)
        starts = [((most - length) // 2, length) for length in size]
        bounds = [(start * tile / most, (start + length) * tile / most) for start, length in starts]
    elif tiles == 1:
        return whole
    else:
        canvas = model.tiling.canvas(size)
        bounds = on_canvas(size, [count * tile for count in canvas])
    down, across = (touched(count, tile, patch, *bound) for count, bound in zip(canvas, bounds, strict=True))
    fine = (down[:, None, :, None] & across[None, :, None, :]).flatten(2).flatten(0, 1)
    return fine if padded else torch.cat([whole, fine])


def on_canvas(size, canvas):
    """((top, bottom), (left, right)) in pixels of an image that is resized to the middle of its canvas."""
    scales = [there / own for there, own in zip(canvas, size, strict=True)]
    tight = 1 if scales[1] < scales[0] else 0
    fitted = [min(math.ceil(own * scales[tight]), there) for own, there in zip(size, canvas, strict=True)]
    fitted[tight] = canvas[tight]
    starts = [(there - own) // 2 for there, own in zip(canvas, fitted, strict=True)]
    return [(start, start + own) for start, own in zip(starts, fitted, strict=True)]


def touched(count, tile, patch, start, end):
    """[count, side] bool: the patches along one axis of `count` tiles that reach into [start, end)."""
    first = torch.arange(count)[:, None] * tile + torch.arange(tile // patch) * patch
    return (first < end) & (first + patch > start)


def grid_tokens(c, grids, features, is_placeholder):
    """The vision tokens of a model of the Qwen-VL family, each of which stands for ratio^2 neighbouring patches.

    Args:
      c: settings of the memory.
      grids: (frames, rows, columns) of patches of every image or video.
      features: [patches of all of them, C].
      is_placeholder: [R, S] bool, the placeholders of images, or of videos.
    """
    unit = c["cells"]["ratio"] ** 2
    frames = [rows * columns // unit for _, rows, columns in grids]
    counts = [grid[0] * frame for grid, frame in zip(grids, frames, strict=True)]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    order = images_by_row(counts, is_placeholder.sum(1).tolist())
    order = [(row, image) for row, own in enumerate(order) for image in own]
    images, spans, at = [], [], 0
    for row, image in order:
        for frame in range(grids[image][0]):
            first, size = starts[image] + frame * frames[image], frames[image]
            images.append((row, torch.arange(at, at + size, device=features.device)))
            spans.append((first, first + size))
            at += size
    rows, places = is_placeholder.nonzero(as_tuple=True)
    windows = features.unflatten(0, (-1, unit))  # [all tokens, ratio^2, C]
    if not c["local"]:
        pairs = zip(images, spans, strict=True)
        wholes = [(members, windows[start:end].flatten(0, 1)) for (_, members), (start, end) in pairs]
        return VisionTokens(rows, places, images, wholes=wholes)
    seen = torch.cat([windows[start:end] for start, end in spans])
    return VisionTokens(rows, places, images, seen, torch.ones_like(seen[..., 0], dtype=torch.bool))


def by_window(grids, config):
    """The order of merged patches in Qwen2.5-VL's tower, window by window: [merged patches] of all images."""
    size = config.window_size // config.spatial_merge_size // config.patch_size
    orders, start = [], 0
    for frames, rows, columns in grids:
        rows, columns = rows // config.spatial_merge_size, columns // config.spatial_merge_size
        down, across = torch.arange(rows) // size, torch.arange(columns) // size
        windows = down[:, None] * math.ceil(columns / size) + across
        numbers = torch.arange(frames)[:, None, None] * (1 + windows.max()) + windows
        orders.append(start + numbers.flatten().argsort(stable=True))
        start += numbers.numel()
    return torch.cat(orders)
