"""The processors of LLaVA-NeXT and LLaVA-OneVision for any projector: a prompt gets as many placeholders as its images
have tokens.

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

transformers' own count what its own projector would make. Everything else is inherited.
"""

from transformers import LlavaNextProcessor, LlavaOnevisionProcessor, PreTrainedConfig, ProcessorMixin

from .tiling_jaxmem import Tiling


class Counting:
    """What the two processors share."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As for every processor; `config.json` of the same folder says how images are tiled."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs.pop("trust_remote_code", None)
        config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        image = config.get("image_token_index", config.get("image_token_id"))
        processor.image_token_id, processor.image_token = image, processor.tokenizer.convert_ids_to_tokens(image)
        processor.tiling = Tiling.of(config)
        processor.num_image_tokens = processor.tiling.tokens
        processor.vision_feature_select_strategy = "full"  # of "default", a class token would be taken off the count
        return processor

    def _get_number_of_features(self, orig_height, orig_width, height, width):
        """Tokens of an image of these pixels; the size of its tiles is known."""
        return self.tiling.count_tokens((int(orig_height), int(orig_width)))


class JaxMemNextProcessor(Counting, LlavaNextProcessor):
    """Of LLaVA-NeXT."""


class JaxMemOnevisionProcessor(Counting, LlavaOnevisionProcessor):
    """Of LLaVA-OneVision, for images; frames of a video are given as images."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token, self.video_token_id = "<image>", "<video>", None
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
