"""Chats as users write them, taken apart: roles and text for the chat template, images and videos in reading order."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmem.errors import DataError

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")
_REFUSED_KEYS = ("tool_calls", "reasoning_content")  # templates render them, and dropping them would be silent
_IMAGE_KEYS = ("image", "image_url", "path", "url", "bytes", "base64")


@dataclasses.dataclass(frozen=True)
class Media:
    """One image or video of a chat, not yet read.

    Attributes:
      kind: "image" or "video".
      source: what the message held: an image, or the list of a video's frames.
      fps: frames per second of a video's frames.
    """

    kind: str
    source: Any
    fps: float = 1.0


def take_apart(
    messages: Sequence[Message], images: Sequence[Any] | None = None, where: str = "the chat"
) -> tuple[list[dict[str, Any]], list[Media]]:
    """Separates the text of a chat from its media.

    Args:
      messages: each {"role": ..., "content": text or list of parts}; a part is {"type": "text", "text": ...},
        {"type": "image", "image": source}, {"type": "image_url", "image_url": {"url": data URI}} or
        {"type": "video", "video": [frames], "fps": 2.0}.
      images: fills the parts {"type": "image"} that have no source, in order.
      where: how errors call the chat, e.g. "row 17".

    Returns:
      Messages whose parts are {"type": "text" | "image" | "video"}, and the media in the order of their parts.

    Raises:
      DataError: an unknown role or part, or a number of images that differs from the number of bare image parts.
    """
    if not messages:
        raise DataError(f"{where} has no messages; give at least one with a role and content")
    media: list[Media] = []
    chat = [_message(message, f"message {i} of {where}", media) for i, message in enumerate(messages)]
    bare = [i for i, item in enumerate(media) if item.source is None]
    given = list(images) if images is not None else []
    if len(bare) != len(given):
        raise DataError(
            f"{where} has {len(bare)} image placeholders without an image and {len(given)} images beside the messages; "
            "the numbers must agree"
        )
    for i, source in zip(bare, given, strict=True):
        media[i] = Media("image", source)
    return chat, media


def _message(message: Message, where: str, media: list[Media]) -> dict[str, Any]:
    """Role and content of one message, its media moved to `media`."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise DataError(f"{where} is not of the form {{'role': ..., 'content': ...}}")
    if message["role"] not in ROLES:
        raise DataError(f"{where} has the role {message['role']!r}; use one of {', '.join(ROLES)}")
    hidden = [key for key in _REFUSED_KEYS if message.get(key)]
    if hidden:
        raise DataError(f"{where} has {hidden[0]!r}, which is not supported; write it into the content")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    if not isinstance(content, Sequence):
        raise DataError(f"{where} has content of type {type(content).__name__}; use text or a list of parts")
    return {"role": message["role"], "content": [_part(part, where, media) for part in content]}


def _part(part: Any, where: str, media: list[Media]) -> dict[str, Any]:
    """One content part without its payload."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "image_url"):
        media.append(Media("image", _image_source(part)))
        return {"type": "image"}
    if kind == "video":
        media.append(_video(part, where))
        return {"type": "video"}
    raise DataError(f"{where} has a part of type {kind!r} that is not text, image, image_url or video")


def _image_source(part: Mapping[str, Any]) -> Any:
    """Where the image of a part is, under any of the usual keys; None when it is a bare placeholder."""
    source = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
    if isinstance(source, Mapping) and "url" in source:
        source = source["url"]
    return f"data:image;base64,{source}" if "base64" in part and source is part["base64"] else source


def _video(part: Mapping[str, Any], where: str) -> Media:
    """A list of frames with their rate."""
    frames, fps = part.get("video"), part.get("fps")
    if frames is None or isinstance(frames, (str, bytes)) or not hasattr(frames, "__len__"):
        raise DataError(f"{where}: a video must be a list of frames; decode the file first and state its 'fps'")
    if not isinstance(fps, (int, float)) or not fps > 0:
        raise DataError(f"{where}: a video needs 'fps', the frames per second of the given frames, got {fps!r}")
    return Media("video", list(frames), float(fps))


def text_runs(chat: Sequence[dict[str, Any]]) -> list[list[tuple[dict[str, Any], str]]]:
    """Texts that the template may put side by side: runs of (holder, key), so that holder[key] is a text."""
    runs: list[list[tuple[dict[str, Any], str]]] = []
    for message in chat:
        if isinstance(message["content"], str):
            runs.append([(message, "content")])
            continue
        runs.append([])
        for part in message["content"]:
            if part["type"] == "text":
                runs[-1].append((part, "text"))
            else:
                runs.append([])
    return [run for run in runs if run]


def question_spans(
    rendered: str, chat: Sequence[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str], where: str
) -> list[tuple[int, int]]:
    """(start, end) in a rendered chat of every text of its first user turn, without the space around it.

    The texts are put between two marks and rendered once more: a search would find short ones in the template's own
    words.

    Args:
      rendered: `render(chat)`.
      chat: as `take_apart` gives it.
      render: messages -> the whole text.
      where: how errors call the chat.

    Raises:
      DataError: the chat has no such text, or the chat template rewrites it.
    """
    first = next((i for i, message in enumerate(chat) if message["role"] == "user"), None)
    turn = [] if first is None else [copy.deepcopy(chat[first])]
    texts = [(holder, key) for run in text_runs(turn) for holder, key in run if holder[key].strip()]
    if first is None or not texts:
        raise DataError(f"{where} has no text in its first user turn, and a memory reads the question there; add one")
    start, end = [chr(code) for code in range(0xE000, 0xF900) if chr(code) not in rendered][:2]
    for holder, key in texts:
        core = holder[key].strip()
        holder[key] = holder[key].replace(core, f"{start}{core}{end}", 1)
    pieces = re.split(f"[{start}{end}]", render([*chat[:first], *turn, *chat[first + 1 :]]))
    if "".join(pieces) != rendered or len(pieces) != 2 * len(texts) + 1:
        raise DataError(f"the chat template rewrites the first question of {where}, so that it cannot be found")
    ends = list(itertools.accumulate(map(len, pieces)))
    return list(zip(ends[:-1:2], ends[1::2], strict=True))
