"""Knowledge items as CoMEM's encoder reads them: written as they were in training, pictures at their sizes.

An item is a user turn with the images and a constant suffix, and an assistant turn with the text, without any system
turn. Axis letters: N items, L tokens of an item.
"""

import re

import numpy as np
import torch
from PIL import Image, ImageOps


def prepare(settings, config, processor, items):
    """Items as tensors: input_ids, attention_mask [N, L], padded on the left; pixel_values, image_grid_thw.

    Args:
      settings: of the memory: suffix, text_limit, squash, item_min_pixels, item_max_pixels.
      config: of the model; names the placeholders.
      processor: its `tokenizer` and `image_processor` are used.
      items: see `JaxMemForConditionalGeneration.prepare_items`.
    """
    reader, sizes = processor.image_processor, {}
    limits = {"shortest_edge": settings.item_min_pixels, "longest_edge": settings.item_max_pixels}
    if any(limits.values()):
        sizes["size"] = {edge: limits[edge] or reader.size[edge] for edge in limits}
    rows, seen = [], []
    for item in items:
        images = item.get("images") or ([] if item.get("image") is None else [item["image"]])
        text = item.get("text") or ""
        if not images and not text.strip():
            raise ValueError("an item needs an image or a text")
        counts = []
        if images:
            pictures = [squashed(open_image(image), settings.squash) for image in images]
            seen.append(reader(images=pictures, return_tensors="pt", **sizes))
            counts = [int(grid.prod()) // reader.merge_size**2 for grid in seen[-1]["image_grid_thw"]]
        rows.append(tokens(settings, config, processor.tokenizer, counts, text[: settings.text_limit]))
    pixels = {name: torch.cat([one[name] for one in seen]) for name in ("pixel_values", "image_grid_thw") if seen}
    return left_padded(rows, processor.tokenizer.pad_token_id or 0) | pixels


def tokens(settings, config, tokenizer, counts, text):
    """Tokens of an item whose images take `counts` of them; special tokens that its text spells out stay text."""
    ids = (config.vision_start_token_id, config.image_token_id, config.vision_end_token_id)
    start, pad, end = (tokenizer.convert_ids_to_tokens(id_) for id_ in ids)
    images = "".join(start + pad * count + end for count in counts)
    media = {*ids, config.video_token_id}
    special = [token.content for id_, token in tokenizer.added_tokens_decoder.items() if token.special or id_ in media]
    pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    pieces = re.split(f"({pattern})", text)  # alternates: plain, special, plain, ...
    pieces[0] = f"<|im_start|>user\n{images}{settings.suffix}<|im_end|>\n<|im_start|>assistant\n{pieces[0]}"
    pieces[-1] += "<|im_end|>\n"
    found = []
    for place, piece in enumerate(pieces):
        found += tokenizer(piece, add_special_tokens=False, split_special_tokens=place % 2 == 1)["input_ids"]
    return found


def left_padded(rows, pad):
    """Lists of tokens as input_ids and attention_mask [N, L]."""
    most = max(map(len, rows))
    ids = [[pad] * (most - len(row)) + row for row in rows]
    mask = [[0] * (most - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def open_image(source):
    """A path or PIL image as 8-bit RGB: upright by its EXIF tag, transparency on white, 16-bit greys cut to 8."""
    image = ImageOps.exif_transpose(source if isinstance(source, Image.Image) else Image.open(source))
    if image.mode == "F":
        raise ValueError("pixels of mode F have no fixed range; convert the image to 8 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def squashed(image, side):
    """A picture with a longer side than `side` as a square of it; 0 keeps it."""
    return image.resize((side, side), Image.Resampling.LANCZOS) if side and max(image.size) > side else image
