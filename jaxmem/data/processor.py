"""Chats to arrays: chat template, tokenizer and image settings of a Hugging Face folder, joined without torch."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxmem.backbones.config import BackboneConfig
from jaxmem.data.assembly import Picture, Written, join_grids, join_text, join_tiles
from jaxmem.data.example import Example
from jaxmem.data.guard import Guard
from jaxmem.data.images import load_image
from jaxmem.data.messages import Media, Message, question_spans, take_apart
from jaxmem.data.tiles import TileProcessor
from jaxmem.data.video import time_step, timeline, timestamps
from jaxmem.errors import DataError

END_OF_TURN = "<|im_end|>"
_TOKENIZER_STATE = threading.Lock()  # a fast tokenizer keeps `split_special_tokens` as state; loaders may use threads


@dataclasses.dataclass(frozen=True)
class _Chat:
    """A chat on its way to tokens: messages without media and with marked text, the media, the marks."""

    messages: list[dict[str, Any]]
    pictures: list[Any]
    guard: Guard
    where: str


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """Turns messages into an `Example` and tokens into text.

    Attributes:
      tokenizer: a fast transformers tokenizer.
      image_processor: resize rules and normalisation: an ImageProcessor, a TileProcessor, or None for a decoder without
        a vision tower.
      chat_template: Jinja source.
      config: of the backbone; token ids, patch sizes and the position table are taken from it.
      stop_tokens: ids that end an answer.
      pad_token: id that fills padding.
      video_wrapper: keep the template's own vision start and end around the time line of a video, as transformers
        since 5.10 does; False drops the pair, as the processor released with Qwen3-VL did. Videos without a time line
        (Qwen2-VL, Qwen2.5-VL) stand in the template's pair always.
      mark_question: rows say which tokens are the first question's, for memories that read it.
      encoder: the processor of the model that reads knowledge items and prompts for this one; None where this one does.
    """

    tokenizer: Any
    image_processor: Any
    chat_template: str
    config: BackboneConfig
    stop_tokens: tuple[int, ...]
    pad_token: int
    video_wrapper: bool = True
    mark_question: bool = False
    encoder: Processor | None = None

    @property
    def reader(self) -> Processor:
        """What encodes knowledge items."""
        return self.encoder or self

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
        spans = self._assistant_spans(chat, rendered, newline)
        asked = self._question(chat, rendered, add_generation_prompt) if self.mark_question else None
        return self._assemble(self._tokenise(rendered, spans, asked, chat), chat)

    def encode_as(
        self, messages: Sequence[Message], written: Callable[[list[dict[str, Any]]], str], where: str = "the chat"
    ) -> Example:
        """Encodes a chat in a format of its own instead of the chat template's, as what is not asked about: none of its
        tokens is supervised, or marked as a question.

        Args:
          messages: as in `encode`.
          written: the messages, without their media and with marked text -> the whole text, one `image_placeholder`
            for each image in order.
          where: how errors call the chat.
        """
        chat = self._open(messages, None, where)
        return self._assemble(self._tokenise(written(chat.messages), [], None, chat), chat)

    @property
    def image_placeholder(self) -> tuple[str, str, str]:
        """What stands for an image: texts of vision start, image placeholder and vision end (where there are any)."""
        ids = (self.config.vision_start_token, self.config.image_token, self.config.vision_end_token)
        start, pad, end = (self._token(id_) if id_ >= 0 else "" for id_ in ids)
        return start, pad, end

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
        if self.tiled:
            return self.image_processor.count(size)
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

    @property
    def tiled(self) -> bool:
        """Are images cut to tiles (LLaVA-style backbones)?"""
        return isinstance(self.image_processor, TileProcessor)

    def _read(self, media: Sequence[Media], where: str) -> list[Any]:
        """Loads the media of one chat; errors count images and videos from 0."""
        kind = self.config.model_type
        if media and self.image_processor is None:
            raise DataError(f"{where} has images, and the backbone is a decoder alone ({kind}); leave them out")
        if self.tiled and any(item.kind == "video" for item in media):
            raise DataError(f"{where} has a video, which is not supported on {kind}; give its frames as images")
        if self.tiled:
            return self.image_processor.images(
                [load_image(item.source, f"image {i} of {where}") for i, item in enumerate(media)]
            )
        pictures, counts = [], {"image": 0, "video": 0}
        for item in media:
            name = f"{item.kind} {counts[item.kind]} of {where}"
            counts[item.kind] += 1
            pictures.append(self._read_image(item, name) if item.kind == "image" else self._read_video(item, name))
        return pictures

    def _read_image(self, item: Media, name: str) -> Any:
        patches, grid = self.image_processor.image(load_image(item.source, name))
        return Picture("image", patches, grid, self._token(self.config.image_token), (grid,))

    def _read_video(self, item: Media, name: str) -> Any:
        frames = [load_image(frame, f"frame {i} of {name}") for i, frame in enumerate(item.source)]
        patches, grid = self.image_processor.video(frames, name)
        (start, pad, end), span = self._vision, self.image_processor.temporal_patch_size
        if self.config.timed_video:
            line = timeline(timestamps(len(frames), item.fps, span), start, pad, end)
            return Picture("video", patches, grid, line, ((1, *grid[1:]),) * grid[0])
        speed = self.config.positions_per_second
        step = 1.0 if speed is None else time_step(item.fps, span, speed)
        return Picture("video", patches, grid, pad, (grid,), step)

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
        texts = [item.text for item in chat.pictures if getattr(item, "kind", "") == "video"]
        if not texts:
            return text
        start, pad, end = self._vision
        wrapped = start + pad + end
        keep = self.video_wrapper or not self.config.timed_video or wrapped not in text
        target = pad if keep else wrapped
        return chat.guard.fill(text, target, texts)

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
            stop = after.rfind(END_OF_TURN, len(before))
            end = len(after) if stop < 0 else stop + len(END_OF_TURN)
            spans.append((len(before), end + (newline and after[end : end + 1] == "\n")))
        return spans

    def _question(self, chat: _Chat, rendered: str, prompt: bool) -> list[tuple[int, int]]:
        """(start, end) in `rendered` of each text of the first user turn."""
        render = lambda messages: self._render(dataclasses.replace(chat, messages=messages), len(messages), prompt)  # noqa: E731
        return question_spans(rendered, chat.messages, render, chat.where)

    def _tokenise(
        self, rendered: str, spans: list[tuple[int, int]], asked: list[tuple[int, int]] | None, chat: _Chat
    ) -> Written:
        """A rendered chat as tokens, one per placeholder; `spans` are supervised, `asked` are the question."""
        tokens: list[int] = []
        mask: list[float] = []
        question: list[bool] = []
        for first, last, weight in _cut(len(rendered), spans):
            at = first
            for piece, plain in chat.guard.split(rendered[first:last]):
                at = rendered.index(piece, at)
                with _TOKENIZER_STATE:
                    found = self.tokenizer(
                        piece,
                        add_special_tokens=False,
                        split_special_tokens=plain,
                        return_offsets_mapping=asked is not None,
                    )
                tokens += found["input_ids"]
                mask += [weight] * len(found["input_ids"])
                for start, end in found.get("offset_mapping", ()):
                    question.append(any(at + start < stop and at + end > begin for begin, stop in asked or ()))
                at += len(piece)
        marked = None if asked is None else np.asarray(question, bool)
        return Written(np.asarray(tokens, np.int32), np.asarray(mask, np.float32), marked)

    def _assemble(self, prompt: Written, chat: _Chat) -> Example:
        """Repeats placeholders once per visual token and adds positions, patches and tables."""
        vision, pictures = self.config.vision, chat.pictures
        if vision is None:
            return join_text(prompt)
        if self.tiled:
            places = self._places(prompt.tokens, [(self.config.image_token, "image")] * len(pictures), chat.where)
            return join_tiles(prompt, places, pictures, vision.patch_dim, vision.tile_patches)
        ids = {"image": self.config.image_token, "video": self.config.video_token}
        wanted = [(ids[item.kind], item.kind) for item in pictures for _ in item.blocks]
        return join_grids(prompt, self._places(prompt.tokens, wanted, chat.where), pictures, vision)

    def _places(self, tokens: np.ndarray, wanted: list[tuple[int, str]], where: str) -> list[int]:
        """Where the placeholders stand; they and the (id, kind) of what they stand for must agree in number."""
        ids = {"image": self.config.image_token, "video": self.config.video_token}
        found = np.flatnonzero(np.isin(tokens, [id_ for id_ in ids.values() if id_ >= 0]))
        for kind, id_ in ids.items():
            seen, count = int(np.sum(tokens == id_)), sum(item == (id_, kind) for item in wanted)
            if count != seen:
                unit = "images" if kind == "image" else "temporal patches of videos"
                unit = unit if kind == "image" or self.config.timed_video else "videos"
                raise DataError(
                    f"the prompt of {where} has {seen} {kind} placeholders for {count} {unit}; "
                    "the chat template adds or drops some (many templates take no images in system messages)"
                )
        if tokens[found].tolist() != [id_ for id_, _ in wanted]:
            raise DataError(f"the chat template puts the images and videos of {where} into another order")
        return found.tolist()


def _cut(length: int, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, float]]:
    """0..length cut at the spans: (start, end, 1 inside a span else 0), empty pieces left out."""
    done = 0
    for first, last in spans:
        yield done, first, 0.0
        yield first, last, 1.0
        done = last
    yield done, length, 0.0
