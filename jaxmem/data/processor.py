"""Chats to arrays: chat template, tokenizer and image settings of a Hugging Face folder, joined without torch."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.backbones.config import BackboneConfig
from jaxmem.data.example import Example
from jaxmem.data.guard import Guard
from jaxmem.data.images import load_image
from jaxmem.data.messages import Media, Message, take_apart
from jaxmem.data.pixels import ImageProcessor, load_image_processor
from jaxmem.data.positions import Grid, mrope_positions, patch_tables
from jaxmem.data.video import time_step, timeline, timestamps
from jaxmem.errors import CheckpointError, DataError

_END_OF_TURN = "<|im_end|>"
_END_OF_TEXT = "<|endoftext|>"
_TOKENIZER_STATE = threading.Lock()  # a fast tokenizer keeps `split_special_tokens` as state; loaders may use threads


@dataclasses.dataclass(frozen=True)
class _Picture:
    """A read image or video.

    Attributes:
      kind: "image" or "video".
      patches: [P, C].
      grid: of all of them.
      text: what stands for it in the prompt, one placeholder per block.
      blocks: the grids of its placeholders: one, or one per temporal patch.
      step: rotary positions from one temporal patch of a block to the next.
    """

    kind: str
    patches: np.ndarray
    grid: Grid
    text: str
    blocks: tuple[Grid, ...]
    step: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Chat:
    """A chat on its way to tokens: messages without media and with marked text, the media, the marks."""

    messages: list[dict[str, Any]]
    pictures: list[_Picture]
    guard: Guard
    where: str


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """Turns messages into an `Example` and tokens into text.

    Attributes:
      tokenizer: a fast transformers tokenizer.
      image_processor: resize rules and normalisation.
      chat_template: Jinja source.
      config: of the backbone; token ids, patch sizes and the position table are taken from it.
      stop_tokens: ids that end an answer.
      pad_token: id that fills padding.
      video_wrapper: keep the template's own vision start and end around the time line of a video, as transformers
        since 5.10 does; False drops the pair, as the processor released with Qwen3-VL did. Videos without a time line
        (Qwen2-VL, Qwen2.5-VL) stand in the template's pair always.
    """

    tokenizer: Any
    image_processor: ImageProcessor
    chat_template: str
    config: BackboneConfig
    stop_tokens: tuple[int, ...]
    pad_token: int
    video_wrapper: bool = True

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        images: Sequence[Any] | None = None,
        where: str = "the chat",
        newline: bool = False,
    ) -> Example:
        """Encodes one chat.

        Tokens equal the tokenizer's on the rendered template, with two exceptions that are meant: special tokens
        written in a text stay text, and assistant content is tokenised apart from the header before it, so that
        the tokens of a prompt are always a prefix of the tokens of prompt and answer.

        Args:
          messages: see `jaxmem.data.messages.take_apart`.
          add_generation_prompt: end with the opening of an assistant turn.
          images: sources for bare {"type": "image"} parts.
          where: how errors call the chat, e.g. "row 17".
          newline: supervise the line break behind the end of an assistant turn too, which no answer ever reaches (some
            published recipes do).

        Returns:
          An unpadded Example.

        Raises:
          DataError: bad messages, bad images (ImageError), placeholders and images that differ in number, or a
            chat template that rewrites earlier turns, so that assistant tokens cannot be told.
        """
        chat = self._open(messages, images, where)
        rendered = self._render(chat, len(chat.messages), add_generation_prompt)
        tokens, mask = self._tokenise(rendered, self._assistant_spans(chat, rendered, newline), chat.guard)
        return self._assemble(tokens, mask, chat)

    def encode_as(
        self, messages: Sequence[Message], written: Callable[[list[dict[str, Any]]], str], where: str = "the chat"
    ) -> Example:
        """Encodes a chat in a format of its own instead of the chat template's; none of its tokens is supervised.

        Args:
          messages: as in `encode`.
          written: the messages, without their media and with marked text -> the whole text, one `image_placeholder`
            for each image in order.
          where: how errors call the chat.
        """
        chat = self._open(messages, None, where)
        tokens, mask = self._tokenise(written(chat.messages), [], chat.guard)
        return self._assemble(tokens, mask, chat)

    @property
    def image_placeholder(self) -> tuple[str, str, str]:
        """What stands for an image: texts of vision start, image placeholder and vision end."""
        ids = (self.config.vision_start_token, self.config.image_token, self.config.vision_end_token)
        return self._token(ids[0]), self._token(ids[1]), self._token(ids[2])

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, *, images: Sequence[Any] | None = None
    ) -> str:
        """The prompt as text with one placeholder per image; videos as their time line. For reading only."""
        chat = self._open(messages, images, "the chat")
        return chat.guard.unmark(self._render(chat, len(chat.messages), add_generation_prompt))

    def decode(self, tokens: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Text of one row of token ids."""
        ids = np.asarray(tokens, np.int64).tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def image_tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of an image of `size` = (width, height) pixels."""
        _, rows, columns = self.image_processor.image_grid(size)
        return rows * columns // self.config.vision.merge_unit

    @functools.cached_property
    def _special(self) -> tuple[str, ...]:
        """Strings that text may hold but never means."""
        added = self.tokenizer.added_tokens_decoder
        meant = {*self.config.media_tokens, *self.stop_tokens}
        return tuple(token.content for id_, token in added.items() if token.special or id_ in meant)

    def _token(self, id_: int) -> str:
        """Text of a single token."""
        return self.tokenizer.convert_ids_to_tokens(id_)

    def _open(self, messages: Sequence[Message], images: Sequence[Any] | None, where: str) -> _Chat:
        """Takes a chat apart, marks its text and reads its media."""
        parts, media = take_apart(messages, images, where)
        guard = Guard(parts, self._special)
        return _Chat(parts, self._read(media, where), guard, where)

    def _read(self, media: Sequence[Media], where: str) -> list[_Picture]:
        """Loads the media of one chat; errors count images and videos from 0."""
        pictures, counts = [], {"image": 0, "video": 0}
        for item in media:
            name = f"{item.kind} {counts[item.kind]} of {where}"
            counts[item.kind] += 1
            pictures.append(self._read_image(item, name) if item.kind == "image" else self._read_video(item, name))
        return pictures

    def _read_image(self, item: Media, name: str) -> _Picture:
        patches, grid = self.image_processor.image(load_image(item.source, name))
        return _Picture("image", patches, grid, self._token(self.config.image_token), (grid,))

    def _read_video(self, item: Media, name: str) -> _Picture:
        frames = [load_image(frame, f"frame {i} of {name}") for i, frame in enumerate(item.source)]
        patches, grid = self.image_processor.video(frames, name)
        (start, pad, end), span = self._vision, self.image_processor.temporal_patch_size
        if self.config.timed_video:
            line = timeline(timestamps(len(frames), item.fps, span), start, pad, end)
            return _Picture("video", patches, grid, line, ((1, *grid[1:]),) * grid[0])
        speed = self.config.positions_per_second
        step = 1.0 if speed is None else time_step(item.fps, span, speed)
        return _Picture("video", patches, grid, pad, (grid,), step)

    @property
    def _vision(self) -> tuple[str, str, str]:
        """Texts of vision start, video placeholder and vision end."""
        config = self.config
        ids = (config.vision_start_token, config.video_token, config.vision_end_token)
        return self._token(ids[0]), self._token(ids[1]), self._token(ids[2])

    def _render(self, chat: _Chat, count: int, prompt: bool) -> str:
        """The template's text of the first `count` messages, every video placeholder replaced by its time line."""
        try:
            text = self.tokenizer.apply_chat_template(
                chat.messages[:count], chat_template=self.chat_template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # Jinja errors of many kinds; the template's own message is what helps
            raise DataError(f"the chat template refused {chat.where}: {error}") from error
        start, pad, end = self._vision
        wrapped = start + pad + end
        keep = self.video_wrapper or not self.config.timed_video or wrapped not in text
        target = pad if keep else wrapped
        return chat.guard.fill(text, target, [item.text for item in chat.pictures if item.kind == "video"])

    def _assistant_spans(self, chat: _Chat, rendered: str, newline: bool) -> list[tuple[int, int]]:
        """(start, end) in `rendered` of each assistant content with the token that ends its turn."""
        spans = []
        for i, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise DataError(f"{chat.where} starts with the assistant; it must start with a system or user message")
            before, after = self._render(chat, i, True), self._render(chat, i + 1, False)
            if not after.startswith(before) or not rendered.startswith(after):
                raise DataError(
                    f"the chat template rewrites what stands before or in message {i} of {chat.where}, so its tokens "
                    "cannot be told apart; give one example per answer, or use a template that only appends"
                )
            stop = after.rfind(_END_OF_TURN, len(before))
            end = len(after) if stop < 0 else stop + len(_END_OF_TURN)
            spans.append((len(before), end + (newline and after[end : end + 1] == "\n")))
        return spans

    def _tokenise(self, rendered: str, spans: list[tuple[int, int]], guard: Guard) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [T] (one per placeholder) and loss mask [T] of a rendered chat."""
        tokens: list[int] = []
        mask: list[float] = []
        for first, last, weight in _cut(len(rendered), spans):
            for piece, plain in guard.split(rendered[first:last]):
                with _TOKENIZER_STATE:
                    ids = self.tokenizer(piece, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
                tokens += ids
                mask += [weight] * len(ids)
        return np.asarray(tokens, np.int32), np.asarray(mask, np.float32)

    def _assemble(self, tokens: np.ndarray, mask: np.ndarray, chat: _Chat) -> Example:
        """Repeats placeholders once per merged row and adds positions, patches and tables."""
        vision, pictures = self.config.vision, chat.pictures
        blocks = self._blocks(tokens, pictures, chat.where)
        repeats = np.ones(len(tokens), np.int64)
        for index, (frames, rows, columns), _ in blocks:
            repeats[index] = frames * rows * columns // vision.merge_unit
        ends = np.cumsum(repeats)
        is_visual = np.zeros(len(tokens), bool)
        is_visual[[index for index, *_ in blocks]] = True
        visual = np.repeat(is_visual, repeats)
        placed = [(int(ends[index] - repeats[index]), grid) for index, grid, _ in blocks]
        steps = [step for *_, step in blocks]
        shapes = [(rows // vision.merge_size, columns // vision.merge_size) for _, (_, rows, columns), _ in blocks]
        empty = np.zeros((0, vision.patch_dim), np.float32)
        grids = [picture.grid for picture in pictures]
        tables = patch_tables(grids, vision.table_side, vision.merge_size, vision.window)
        return Example(
            tokens=np.repeat(tokens, repeats),
            positions=mrope_positions(int(repeats.sum()), placed, vision.merge_size, steps),
            loss_mask=np.repeat(mask, repeats),
            visual_rows=np.where(visual, np.cumsum(visual) - 1, -1).astype(np.int32),
            patches=np.concatenate([empty, *(picture.patches for picture in pictures)]),
            patch_segments=tables.segments,
            patch_coords=tables.coords,
            patch_table=tables.table,
            patch_weights=tables.weights,
            images=tuple(shape for shape, (_, grid, _) in zip(shapes, blocks, strict=True) for _ in range(grid[0])),
            patch_windows=tables.windows,
        )

    def _blocks(self, tokens: np.ndarray, pictures: list[_Picture], where: str) -> list[tuple[int, Grid, float]]:
        """(index, grid, step between its frames) of every placeholder; placeholders and blocks must agree in number."""
        ids = {"image": self.config.image_token, "video": self.config.video_token}
        found = np.flatnonzero(np.isin(tokens, list(ids.values())))
        wanted = [(ids[item.kind], block, item.step) for item in pictures for block in item.blocks]
        for kind, id_ in ids.items():
            seen, count = int(np.sum(tokens == id_)), sum(block[0] == id_ for block in wanted)
            if count != seen:
                unit = "images" if kind == "image" else "temporal patches of videos"
                unit = unit if kind == "image" or self.config.timed_video else "videos"
                raise DataError(
                    f"the prompt of {where} has {seen} {kind} placeholders for {count} {unit}; "
                    "the chat template adds or drops some (many templates take no images in system messages)"
                )
        if tokens[found].tolist() != [id_ for id_, *_ in wanted]:
            raise DataError(f"the chat template puts the images and videos of {where} into another order")
        return [(int(index), grid, step) for index, (_, grid, step) in zip(found, wanted, strict=True)]


def _cut(length: int, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, float]]:
    """0..length cut at the spans: (start, end, 1 inside a span else 0), empty pieces left out."""
    done = 0
    for first, last in spans:
        yield done, first, 0.0
        yield first, last, 1.0
        done = last
    yield done, length, 0.0


def load_processor(
    folder: str | Path,
    config: BackboneConfig,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    chat_template: str | None = None,
) -> Processor:
    """Composes the processor of a Hugging Face folder. torch is not needed.

    Args:
      folder: tokenizer files, preprocessor_config.json and a chat template.
      config: of the backbone in the same folder.
      min_pixels: replaces the folder's lower limit per image; and per frame, where the folder has none for videos and
        the backbone sizes them frame by frame.
      max_pixels: likewise the upper limit.
      chat_template: Jinja source that replaces the folder's.

    Returns:
      A Processor.

    Raises:
      CheckpointError: a file is missing.
      DataError: tokenizer or image settings do not fit `config`.
    """
    folder = Path(folder)
    tokenizer = _load_tokenizer(folder, config)
    image_processor = load_image_processor(
        folder, min_pixels=min_pixels, max_pixels=max_pixels, frame_budget=not config.timed_video
    )
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        ours, theirs = getattr(config.vision, name), getattr(image_processor, name)
        if ours != theirs:
            raise CheckpointError(
                f"{folder}/preprocessor_config.json says {name} {theirs}, the backbone's config says {ours}"
            )
    stops = _stop_tokens(folder, tokenizer)
    pad = tokenizer.pad_token_id
    return Processor(
        tokenizer=tokenizer,
        image_processor=image_processor,
        chat_template=chat_template or _load_template(folder, tokenizer),
        config=config,
        stop_tokens=stops,
        pad_token=pad if pad is not None else (stops[0] if stops else 0),
    )


def _load_tokenizer(folder: Path, config: BackboneConfig) -> Any:
    """The folder's fast tokenizer, checked against the backbone's vocabulary and media tokens."""
    import transformers  # heavy: only when a processor is wanted

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        raise CheckpointError(f"{folder} has no tokenizer.json; copy the tokenizer files of the model into it")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder}: the tokenizer is not a fast one; add its tokenizer.json")
    if len(tokenizer) > config.text.vocab:
        raise CheckpointError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the backbone {config.text.vocab}")
    for name in ("image_token", "video_token", "vision_start_token", "vision_end_token"):
        id_ = getattr(config, name)
        if id_ not in tokenizer.added_tokens_decoder:
            raise CheckpointError(f"{folder}: the tokenizer has no special token of id {id_}, the backbone's {name}")
    return tokenizer


def _load_template(folder: Path, tokenizer: Any) -> str:
    """chat_template.jinja, else chat_template.json, else the tokenizer's own."""
    source, legacy = folder / "chat_template.jinja", folder / "chat_template.json"
    if source.is_file():
        return source.read_text(encoding="utf-8")
    if legacy.is_file():
        return json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    raise CheckpointError(
        f"{folder} has no chat template; add chat_template.jinja (jaxmem/assets has Qwen3-VL's format)"
    )


def _stop_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ends of an answer: generation_config.json, else the tokenizer's end, end of turn and end of text."""
    file = folder / "generation_config.json"
    stops = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    if stops is not None:
        return tuple(stops) if isinstance(stops, list) else (int(stops),)
    vocab = tokenizer.get_vocab()
    ids = [tokenizer.eos_token_id, vocab.get(_END_OF_TURN), vocab.get(_END_OF_TEXT)]
    return tuple(dict.fromkeys(id_ for id_ in ids if id_ is not None))
