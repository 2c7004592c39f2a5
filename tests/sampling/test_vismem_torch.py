"""Memories spliced into a Qwen3-VL's answers against transformers: one plain forward over the spliced embeddings."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from jaxmem.sampling.rollout import Rollout, rollout
from jaxmem.sampling.slots import Slot
from tests.backbones.prompts import PROMPTS
from tests.memory import oracle, vismem_oracle
from tests.memory import vismem_world as v
from tests.memory.vismem_folder import BUCKETS, pair, with_vismem

torch = pytest.importorskip("torch")
CHATS = [PROMPTS[name] for name in ("wide_and_tall", "text", "three_interleaved")]
NEW = 24


@dataclasses.dataclass(frozen=True)
class World:
    """The same backbone in both libraries, and sampled answers."""

    ours: Any
    theirs: Any
    rolled: Rollout
    settings: dict[str, Any]

    @property
    def config(self) -> Any:
        """Of the VisMem."""
        return self.ours.spec.vismem


@pytest.fixture(scope="module")
def world() -> World:
    bare, theirs = pair()
    model = with_vismem(bare, eagerness=1.5)
    settings = {"max_new_tokens": NEW, "temperature": 1.0, "stop_tokens": (), "invoke": {"max_invocations": 3}}
    batch, keys = model.batch(CHATS, buckets=BUCKETS, padding="right"), jax.random.split(jax.random.key(2), len(CHATS))
    rolled = rollout(model.spec, model.base, model.memory, batch, model.sampler(**settings), keys, 1)
    return World(model, theirs, rolled, settings | {"key": keys, "buckets": BUCKETS})


def forward(world: World, row: int) -> tuple[np.ndarray, np.ndarray, int]:
    """transformers' states [T + N, D] after the final norm, the embeddings they follow from, and T."""
    example = world.ours.processor.encode(CHATS[row], add_generation_prompt=True)
    slots = v.embedded_by_hand(world.config, world.ours.base, world.ours.memory, world.rolled)[row, 0]
    behind = 1 + example.positions.max() + np.arange(NEW)
    positions = np.concatenate([example.positions, np.broadcast_to(behind, (3, NEW))], axis=1)
    model, given = world.theirs.model, {}
    prompt = model.get_input_embeddings()(torch.tensor(example.tokens, dtype=torch.long))
    if example.images:
        grids = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in example.images])
        given = {"pixel_values": torch.tensor(example.patches), "image_grid_thw": grids}
    read = {}
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.update(x=kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        out = model(
            inputs_embeds=torch.cat([prompt, torch.tensor(slots)])[None],
            position_ids=torch.tensor(positions, dtype=torch.long)[:, None],
            attention_mask=torch.ones(1, len(example) + NEW, dtype=torch.long),
            **given,
        )
    hook.remove()
    return out.last_hidden_state[0].numpy(), read["x"][0].numpy(), len(example)


@pytest.mark.parametrize("row", range(len(CHATS)))
def test_check_17_logprobs_equal_those_of_transformers(world: World, row: int) -> None:
    states, _, prompt = forward(world, row)
    states, rows = states[prompt - 1 : -1], world.ours.memory["vismem"]["rows"]["unembed"]["invoke"]
    head = world.theirs.lm_head.weight.detach().numpy()[: world.config.vocab]
    permits = world.rolled.permits[row, 0]
    scores = np.full((NEW, world.config.vocab + 4), -np.inf)
    scores[:, : world.config.vocab] = states @ head.T
    for kind, id_ in enumerate(world.config.invoke_ids):
        scores[:, id_] = np.where(permits >> kind & 1, states @ np.asarray(rows[kind]), -np.inf)
    known = np.take_along_axis(
        torch.log_softmax(torch.tensor(scores), -1).numpy(), world.rolled.tokens[row, 0][:, None], 1
    )
    used = np.isin(world.rolled.kinds[row, 0], (Slot.TEXT, Slot.INVOKE))
    np.testing.assert_allclose(world.rolled.logprobs[row, 0][used], known[used, 0], atol=1e-4)


def test_check_09_memories_equal_transformers_with_merged_kernels(world: World) -> None:
    """The frozen language model with A B alpha / rank added, over [images; text; queries; slots] at 0, 1, 2, ..."""
    config, params, kinds = world.config, oracle.float64(world.ours.memory["vismem"]), set()
    backbone = world.ours.spec.backbone
    media = (*backbone.media_tokens, backbone.vision_start_token, backbone.vision_end_token)
    for row, chat in enumerate(CHATS):
        states, x, prompt = forward(world, row)
        tokens = world.ours.processor.encode(chat, add_generation_prompt=True).tokens
        visual = x[:prompt][np.isin(tokens, media)]
        for nth, call in enumerate(v.calls(world.rolled, row, 0, config)):
            text = states[prompt - 1 + call.first : prompt + 1 + call.slot][-config.text_cap :]
            given = vismem_oracle.former_input(config, params, call.formed, visual, text)
            adapter = params[("short", "long")[call.formed]]
            known = merged_forward(world, adapter, given)[-config.sizes[call.formed] :]
            made = world.rolled.memories[row, 0, nth]
            np.testing.assert_allclose(made[: len(known)], known, atol=2e-4)
            assert not made[len(known) :].any()
            kinds.add(call.formed)
    assert kinds == {0, 1}


def merged_forward(world: World, adapter: Any, x: np.ndarray) -> np.ndarray:
    """transformers' language model with an adapter's update in its kernels: [T, D] -> [T, D]."""
    language, scale = world.theirs.model.language_model, world.config.alpha / world.config.rank
    weights = {name: leaf.clone() for name, leaf in language.state_dict().items()}
    for name, factors in adapter["layers"]["attention"].items():
        for layer, (a, b) in enumerate(zip(factors["lora_a"], factors["lora_b"], strict=True)):
            weights[f"layers.{layer}.self_attn.{name}_proj.weight"] += torch.tensor((a @ b).T * scale).float()
    given = {
        "inputs_embeds": torch.tensor(x).float()[None],
        "position_ids": torch.arange(len(x)).expand(3, 1, -1),
        "attention_mask": torch.ones(1, len(x), dtype=torch.long),
    }
    with torch.no_grad():
        out = torch.func.functional_call(language, weights, (), {**given, "use_cache": False})
    return out.last_hidden_state[0].numpy()


def test_completions_tell_of_their_memories(world: World) -> None:
    """The same program from a model's face: events, tokens without vectors, text without control tokens."""
    answers = world.ours.generate(CHATS, **world.settings)
    config, found = world.config, []
    for row, answer in enumerate(answers):
        kinds, tokens = world.rolled.kinds[row, 0], world.rolled.tokens[row, 0]
        assert answer.tokens == tuple(tokens[kinds != Slot.MEMORY])
        assert answer.text == world.ours.processor.decode(tokens[kinds == Slot.TEXT])
        assert "<m" not in answer.text and not answer.stopped and len(answer.logprobs) == len(answer.tokens)
        calls = v.calls(world.rolled, row, 0, config)
        assert [kind for _, kind in answer.events] == [("short", "long")[call.kind] for call in calls]
        for place, kind in answer.events:
            index = ("short", "long").index(kind)
            assert answer.tokens[place : place + 2] == (config.invoke_ids[index], config.end_ids[index])
        found += answer.events
    assert len({kind for _, kind in found}) == 2
