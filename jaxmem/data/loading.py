"""The processor of a Hugging Face folder: tokenizer, chat template and image settings, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxmem.backbones.config import BackboneConfig, VisionConfig
from jaxmem.checkpoints import exported, huggingface
from jaxmem.data.control import without_control_tokens
from jaxmem.data.pixels import load_image_processor
from jaxmem.data.processor import END_OF_TURN, Processor
from jaxmem.data.tiles import load_tile_processor
from jaxmem.errors import CheckpointError, ConfigError

_END_OF_TEXT = "<|endoftext|>"


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
    image_processor = _load_images(folder, config, min_pixels, max_pixels)
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


def _load_images(folder: Path, config: BackboneConfig, min_pixels: int | None, max_pixels: int | None) -> Any:
    """The image processor that fits the backbone's vision tower; None without one."""
    if config.vision is None:
        return None
    if not isinstance(config.vision, VisionConfig):
        if min_pixels is not None or max_pixels is not None:
            raise ConfigError(f"{config.model_type} cuts images to tiles: min_pixels and max_pixels do not apply")
        tower, projector = config.vision.tower, config.vision.projector
        return load_tile_processor(
            folder,
            huggingface.read_config(folder),
            image_size=tower.image_size,
            patch_size=tower.patch_size,
            cells=projector.grid,
            tokens=None if projector.grid else projector.tokens,
            aspect=config.vision.aspect,
        )
    frame_budget = not config.timed_video
    processor = load_image_processor(folder, min_pixels=min_pixels, max_pixels=max_pixels, frame_budget=frame_budget)
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        ours, theirs = getattr(config.vision, name), getattr(processor, name)
        if ours != theirs:
            raise CheckpointError(
                f"{folder}/preprocessor_config.json says {name} {theirs}, the backbone's config says {ours}"
            )
    return processor


def _load_tokenizer(folder: Path, config: BackboneConfig) -> Any:
    """The folder's fast tokenizer, checked against the backbone's vocabulary and media tokens."""
    import transformers  # heavy: only when a processor is wanted

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        raise CheckpointError(f"{folder} has no tokenizer.json; copy the tokenizer files of the model into it")
    own = {}
    if exported.section(folder) is not None:  # says what it is, so that the folder's code is not asked
        own = {"config": transformers.AutoConfig.for_model(config.model_type)}
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, **own)
    if own:
        tokenizer = without_control_tokens(tokenizer)
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder}: the tokenizer is not a fast one; add its tokenizer.json")
    if len(tokenizer) > config.text.vocab:
        raise CheckpointError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the backbone {config.text.vocab}")
    for name in ("image_token", "video_token", "vision_start_token", "vision_end_token"):
        id_ = getattr(config, name)
        if id_ >= 0 and id_ not in tokenizer.added_tokens_decoder:
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
    ids = [tokenizer.eos_token_id, vocab.get(END_OF_TURN), vocab.get(_END_OF_TEXT)]
    return tuple(dict.fromkeys(id_ for id_ in ids if id_ is not None))
