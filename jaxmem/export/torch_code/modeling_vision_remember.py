"""A backbone with Vision Remember (arXiv 2506.03928): between decoder layers, vision tokens look at the image again.

A projector that makes few tokens throws features away. Behind some decoder layers every vision token asks features of
several depths of the vision tower, of its own region of the image; in v2 the tokens of an image first ask each other
and the question. All of it happens while a prompt is read: its keys and values remember what was seen, and generated
tokens cost nothing.

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    model.generate(**inputs)       # reads prompts with the memory
    model.use_memory = False       # the backbone alone

v2 reads the question: the text of the first user turn. It is found by the marks that the chat template sets around it
(`config.jaxmem["question"]`); for prompts in another format, give `question_mask`, [R, S] bool, which is True where a
token belongs to the question.

Letters: R rows of a batch, S tokens, D width of the decoder.
"""

import dataclasses
import functools
import inspect

import torch

from .backbone_jaxmem import Backbone
from .configuration_jaxmem import JaxMemConfig
from .vision_remember_layers import VisionRemember
from .vision_remember_regions import by_window, grid_tokens, tile_tokens


@dataclasses.dataclass
class Prompt:
    """What a pass over prompts knows.

    Attributes:
      input_ids: [R, S].
      question_mask: [R, S] or None.
      seen: what the vision tower gave, in the order of `kinds`.
      kinds: "image" and "video".
      tokens: the vision tokens, once a layer asks for them.
      questions: of each row the places of the question, or None for a memory that does not read it.
    """

    input_ids: torch.Tensor
    question_mask: torch.Tensor
    seen: list
    kinds: list
    tokens: object = None
    questions: list = None


def _with_question(forward):
    """`forward` with the signature of the backbone's and `question_mask`: `generate` reads what may be passed."""
    signature = inspect.signature(Backbone.forward)
    question = inspect.Parameter("question_mask", inspect.Parameter.KEYWORD_ONLY, default=None)
    entries = list(signature.parameters.values())
    at = len(entries) - (entries[-1].kind is inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[*entries[:at], question, *entries[at:]])
    return forward


class JaxMemForConditionalGeneration(Backbone):
    """The backbone with the memory.

    Attributes:
      use_memory: False leaves exactly the backbone.
    """

    config_class = JaxMemConfig
    use_memory = True

    def __init__(self, config):
        super().__init__(config)
        self.settings = config.jaxmem["memory"]
        self.memory = VisionRemember(self.settings)
        self._prompt = None
        # What leaves a layer (and what the backbone itself adds behind it, as DeepStack does) enters the next one.
        following = [*self.model.language_model.layers, self.model.language_model.norm]
        for slot, layer in enumerate(self.settings["layers"]):
            hook = functools.partial(self._behind_layer, slot)
            following[layer + 1].register_forward_pre_hook(hook, with_kwargs=True)
        self._watch_tower()
        self.post_init()

    @_with_question
    def forward(self, *args, question_mask=None, **kwargs):
        """The backbone's forward.

        Args:
          question_mask: [R, S] bool, the tokens of the question of each prompt; None: found in `input_ids`.
          others: the backbone's.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        encoded = kwargs.get("mm_encoder_outputs") or {}
        pixels = {"image": kwargs.get("pixel_values"), "video": kwargs.get("pixel_values_videos")}
        kinds = [kind for kind in pixels if encoded.get(kind) is not None or pixels[kind] is not None]
        if not self.use_memory or not kinds:
            return super().forward(*args, **kwargs)
        if ids is None:
            raise ValueError("Vision Remember finds vision tokens in input_ids; give them instead of inputs_embeds")
        given = [encoded[kind] for kind in kinds if encoded.get(kind) is not None]
        self._prompt = Prompt(ids, question_mask, given, kinds)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._prompt = None

    # ------------------------------------------------------------------------------------------------- the decoder

    def _behind_layer(self, slot, module, args, kwargs):
        """Rewrites the vision tokens in what enters the module behind a layer that remembers."""
        prompt = self._prompt
        if prompt is None:
            return None
        if prompt.tokens is None:
            prompt.tokens = self._vision_tokens(prompt)
            prompt.questions = self._questions(prompt) if self.memory.blocks[slot].text is not None else None
        x = args[0] if args else kwargs["hidden_states"]
        x = self.memory.blocks[slot](x, prompt.tokens, prompt.questions).to(x.device)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def _vision_tokens(self, prompt):
        """The vision tokens of the prompts and what they may ask."""
        found = []
        for kind, outputs in zip(prompt.kinds, prompt.seen, strict=True):
            if self._tiled and kind == "video":
                raise ValueError("Vision Remember reads images of this backbone; give the frames of a video as images")
            if not hasattr(outputs, "levels"):
                raise ValueError(
                    "features of images were encoded without the memory, or cut to pieces (prefill_chunk_size);"
                    " Vision Remember reads a prompt whole"
                )
            features = self.memory.fusion([outputs.levels[level] for level in self.settings["levels"]])
            places = prompt.input_ids == getattr(self.config, f"{kind}_token_id")
            if self._tiled:
                found.append(tile_tokens(self.settings, self.model, outputs, features, places))
            else:
                found.append(grid_tokens(self.settings, outputs.grids, features, places))
        return functools.reduce(lambda one, other: one + other, found)

    # ----------------------------------------------------------------------------------------------- the question

    def _questions(self, prompt):
        """Per row the places of its question [n]."""
        found = []
        for row, ids in enumerate(prompt.input_ids):
            if prompt.question_mask is None:
                places = torch.tensor(self._question(ids.tolist()), device=ids.device, dtype=torch.long)
            else:  # generated tokens may stand behind
                places = prompt.question_mask[row].to(ids.device).nonzero()[:, 0]
            if not len(places) and row in prompt.tokens.in_rows:
                raise ValueError(
                    f"row {row} of the batch has an image and no question was found in its first user turn; Vision"
                    " Remember reads it: ask something, or give question_mask"
                )
            found.append(places)
        return found

    def _question(self, ids):
        """Places of the first user turn's text: between its marks, without media and the blanks around each text."""
        marks = self.config.jaxmem["question"]
        start = _find(ids, marks["start"], 0)
        if start is None:
            return []
        start += len(marks["start"])
        end = _find(ids, marks["end"], start)
        media = {getattr(self.config, f"{kind}_token_id", None) for kind in ("image", "video")}
        opens = getattr(self.config, "vision_start_token_id", None)
        closes = getattr(self.config, "vision_end_token_id", None)
        blank, texts, depth = set(marks["blank"]), [[]], 0
        for place in range(start, len(ids) if end is None else end):
            depth += (ids[place] == opens) - (ids[place] == closes)
            if ids[place] in media or ids[place] in (opens, closes) or depth > 0:
                texts.append([])
            else:
                texts[-1].append(place)
        found = []
        for text in texts:
            solid = [i for i, place in enumerate(text) if ids[place] not in blank]
            found += text[solid[0] : solid[-1] + 1] if solid else []
        return found

    # -------------------------------------------------------------------------------------------------- the tower

    def _watch_tower(self):
        """Keeps, with what the tower gives, the hidden states that the memory reads."""
        self._tiled = self.settings["tile_patches"] > 0
        if self._tiled:
            tower = self.model.vision_tower
            self.model.memory_levels = tuple(self.settings["levels"])
        else:
            tower, self._caught = self.model.visual, {}
            for level in self.settings["levels"]:  # k leaves block k, counted from 1
                block = tower.blocks[level % (len(tower.blocks) + 1) - 1]
                block.register_forward_hook(functools.partial(self._catch, level))
        tower.register_forward_hook(self._saw, with_kwargs=True)

    def _catch(self, level, module, args, output):
        """Of a block of a Qwen-VL tower."""
        if self.use_memory:
            self._caught[level] = output

    def _saw(self, module, args, kwargs, output):
        """The tower of a Qwen-VL has seen images; `generate` may have it look before the forward pass."""
        if not self.use_memory:
            return
        if not self._tiled:
            grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            output.grids = [tuple(grid) for grid in grids.tolist()]
            output.levels, self._caught = self._caught, {}
            if hasattr(module, "fullatt_block_indexes"):  # Qwen2.5-VL's patches lie window by window
                back = by_window(output.grids, module.config).argsort().to(grids.device)
                unit = module.spatial_merge_size**2
                reordered = lambda x: x.unflatten(0, (-1, unit))[back.to(x.device)].flatten(0, 1)  # noqa: E731
                output.levels = {level: reordered(x) for level, x in output.levels.items()}
        if self._prompt is not None:
            self._prompt.seen.append(output)


def _find(ids, mark, start):
    """The first place from `start` on where the tokens `mark` stand; None without one."""
    hits = (i for i in range(start, len(ids) - len(mark) + 1) if ids[i : i + len(mark)] == mark)
    return next(hits, None)
