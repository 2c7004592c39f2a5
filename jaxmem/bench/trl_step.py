"""The peer of `jaxmem bench grpo`: whole training steps of TRL's GRPOTrainer."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmem.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Task:
    """A GRPO step that both sides do.

    Attributes:
      questions: text of the prompts, one image each.
      images: PIL images of the prompts.
      group: completions of each prompt.
      new: tokens of each completion, all of them in full length.
      reward: text of a completion -> its reward.
      learning_rate: of AdamW.
    """

    questions: Sequence[str]
    images: Sequence[Any]
    group: int
    new: int
    reward: Callable[[str], float]
    learning_rate: float = 1e-5

    @property
    def completions(self) -> int:
        """Completions of one step."""
        return len(self.questions) * self.group


def trl_step(folder: str | Path, task: Task) -> Callable[[], dict[str, float]]:
    """TRL's side of the comparison, on the processor and in float32.

    All weights but the vision tower train, without gradient checkpointing, one update per batch of completions: what
    TRL does fastest here. Sampling is transformers' generate with its cache, as TRL does without vLLM.

    Args:
      folder: a Qwen3-VL in Hugging Face format with tokenizer, chat template and image settings.
      task: the step.

    Returns:
      A function that does one step and returns its seconds by phase: "rollout", "rewards", "update".

    Raises:
      ConfigError: torch or trl is not installed.
    """
    try:
        import datasets
        import torch
        import transformers
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise ConfigError('bench grpo compares with TRL: pip install "jaxmem[bench]"') from error
    with _quiet():
        model: Any = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        settings = GRPOConfig(**_settings(task, str(Path(folder) / "trl")))
    model.model.visual.requires_grad_(False)
    rows = [
        {"prompt": [{"role": "user", "content": question}], "image": image}
        for question, image in zip(task.questions, task.images, strict=True)
    ]
    rewards: Any = lambda completions, **_: [task.reward(chat[0]["content"]) for chat in completions]  # noqa: E731
    with _quiet():
        trainer = GRPOTrainer(model, rewards, settings, datasets.Dataset.from_list(rows), None, _processor(folder))
    trainer.remove_callback(transformers.PrinterCallback)
    clock = _clock()
    trainer.add_callback(clock)
    return lambda: _step(trainer, clock)


def _settings(task: Task, output: str) -> dict[str, Any]:
    """Of TRL's GRPOConfig."""
    return {
        "output_dir": output,
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": task.completions,
        "num_generations": task.group,
        "max_completion_length": task.new,
        "generation_kwargs": {"min_new_tokens": task.new},
        "gradient_checkpointing": False,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "loss_type": "dapo",
        "max_steps": 1,
        "shuffle_dataset": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def _clock() -> Any:
    """A callback that measures optimizer steps from their begin to their end."""
    import transformers

    class Clock(transformers.TrainerCallback):
        """Keeps the seconds of the last step."""

        start = seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    return Clock()


def _step(trainer: Any, clock: Any) -> dict[str, float]:
    """One optimizer step through TRL's public door, with clocks on two of its methods."""
    seconds = {"rollout": 0.0, "rewards": 0.0}
    names = {"rollout": "_generate", "rewards": "_calculate_rewards"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        for phase, name in names.items():
            stack.enter_context(_timed(trainer, name, seconds, phase))
        trainer.train()
    return {**seconds, "update": clock.seconds - sum(seconds.values())}


@contextlib.contextmanager
def _timed(owner: Any, name: str, seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the time of a method's calls to `seconds[phase]`."""
    method = getattr(owner, name)

    def timed(*words: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*words, **named)
        finally:
            seconds[phase] += time.perf_counter() - start

    setattr(owner, name, timed)
    try:
        yield
    finally:
        delattr(owner, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and progress lines of the peer between the bench's own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _processor(folder: str | Path) -> Any:
    """Qwen3-VL's processor without its video part, which alone would need torchvision."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Images(transformers.Qwen3VLProcessor):
        """Takes text and images."""

        video_processor = None

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
            transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
            for kind in ("image", "video"):
                setattr(self, f"{kind}_token", f"<|{kind}_pad|>")
                setattr(self, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"))

        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    template = (Path(folder) / "chat_template.jinja").read_text(encoding="utf-8")
    return Images(Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer, chat_template=template)
