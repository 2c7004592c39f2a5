"""VisMem as an exported folder: transformers' Auto classes load it, and it calls for the memories that jaxmem does."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem import model as functions
from jaxmem.checkpoints.exported import load_memory
from jaxmem.export import hf
from jaxmem.memory import vismem
from jaxmem.model import Spec
from jaxmem.sampling.rollout import Rollout
from jaxmem.sampling.slots import Slot
from tests.helpers import write_qwen2_tokenizer, write_tokenizer
from tests.memory import vismem_world as v
from tests.memory import world as w
from tests.memory.vismem_folder import KNOWN, MEDIA, SMALL

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests import tiny  # noqa: E402
from tests.export.test_pvm import PICTURES, Pair, torch_logits  # noqa: E402
from tests.llava_folder import write_llava  # noqa: E402

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LARGER = SMALL | {"long_targets": ("q", "k", "o", "up", "down"), "builder_length": 160}
NEW = 38
RULES = {"max_invocations": 4}


def backbone(family: str, folder: Any, **settings: Any) -> Any:
    """A tiny model's folder, with more rows in its tables than its tokenizer has tokens."""
    if family.startswith("llava"):
        return write_llava(family.removeprefix("llava_"), folder, seed=3, layers=2, **settings)
    ids = (write_tokenizer if family == "qwen3_vl" else write_qwen2_tokenizer)(folder, vocab_size=KNOWN)
    media = {key: ids[token] for key, token in MEDIA.items()}
    return getattr(tiny, f"write_{family}")(folder, seed=5, layers=2, **media, **settings)


def exported(family: str, folder: Any, *, tied: bool = False, **settings: Any) -> Pair:
    """Random weights everywhere, written and read again."""
    plain = backbone(family, folder / "base", tied=tied)
    ours = jaxmem.load(folder / "base")
    known = len(ours.processor.tokenizer)
    config = vismem.create(ours.spec.backbone, vocab=known, **(LARGER | settings))
    memory = v.memory_of(config, eagerness=1.5)
    ours = dataclasses.replace(ours, spec=Spec(ours.spec.backbone, (config,)), memory=memory)
    (folder / "out").mkdir()
    hf.write(ours, folder / "out")
    return Pair(family, ours, load(folder / "out"), plain)


def load(folder: Any) -> Any:
    """The torch model; every tensor has its place."""
    auto = transformers.AutoModelForImageTextToText
    model, found = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, dtype=torch.float32)
    odd = set().union(*(found[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")))
    assert not odd
    return model.eval()


@pytest.fixture(scope="module", params=(*QWEN, "llava_next", "llava_onevision"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return exported(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return exported("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def once(qwen: Pair) -> Any:
    """Its greedy answers."""
    return ask(qwen)


def ask(pair: Pair, pictures: Any = PICTURES, **options: Any) -> Any:
    """What torch answers."""
    fixed = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    fixed |= {"suppress_tokens": list(pair.ours.spec.backbone.media_tokens), "return_dict_in_generate": True}
    return pair.theirs.generate(**pair.inputs(pictures), **(fixed | RULES | options))


def said(pair: Pair, answers: Any, row: int) -> list[int]:
    """The tokens of a row behind its prompt."""
    return answers.sequences[row, pair.inputs(PICTURES)["input_ids"].shape[1] :].tolist()


def played(pair: Pair, **rules: Any) -> Rollout:
    """What we answer, greedily."""
    ours, (_, batch) = pair.ours, pair.batch(PICTURES)
    settings = ours.sampler(max_new_tokens=NEW, stop_tokens=(), invoke=RULES | rules)
    keys = jax.random.split(jax.random.key(0), len(batch.tokens))
    return v.rolled(v.last_state(ours.spec, ours.base, ours.memory, batch, settings, keys, 1))


def assert_same_answers(pair: Pair, theirs: Any, ours: Rollout) -> set[str]:
    """Tokens and memories of all rows are equal; the types of memories that were formed.

    Later memories are formed of states that have read earlier ones, and differences grow.
    """
    config, kinds = pair.ours.spec.vismem, set()
    for row, memories in enumerate(theirs.memories):
        tokens, found = ours.tokens[row, 0][ours.kinds[row, 0] != Slot.MEMORY], said(pair, theirs, row)
        assert len(tokens) >= 20 and found[: len(tokens)] == tokens.tolist() and not any(found[len(tokens) :])
        calls = [(number, call) for number, call in enumerate(v.calls(ours, row, 0, config)) if call.end >= 0]
        for place, ((number, call), memory) in enumerate(zip(calls, memories, strict=True)):
            wanted = ours.memories[row, 0, number, : config.sizes[call.formed]]
            np.testing.assert_allclose(memory.numpy(), wanted, atol=5e-3 if place else 1e-4, rtol=0)
            kinds.add(vismem.TYPES[call.formed])
    return kinds


def test_answers_and_memories_equal_ours(pair: Pair) -> None:
    """Greedy tokens of a left-padded batch, with several images, one, and none; both types are called for."""
    assert assert_same_answers(pair, ask(pair), played(pair)) == {"short", "long"}


def test_logits_equal_ours(pair: Pair) -> None:
    """All columns: those of the tokenizer's tokens, and of the control tokens."""
    ours, (_, batch) = pair.ours, pair.batch(PICTURES)
    hidden = w.quick_hidden(ours.spec, ours.base, ours.memory, jax.tree.map(jnp.asarray, batch))
    wanted = np.asarray(functions.next_logits(ours.spec, ours.base, ours.memory, hidden))
    found, valid = torch_logits(pair.theirs, pair.inputs(PICTURES)), np.asarray(batch.segments) > 0
    config = ours.spec.vismem
    assert found.shape[-1] == config.vocab + 4 and np.abs(wanted[valid]).max() > 1 and not valid.all()
    np.testing.assert_allclose(found[valid], wanted[valid], atol=1e-4, rtol=0)
    tokens = np.arange(config.vocab + 4)
    rows = vismem.embed(config, ours.memory["vismem"], ours.base["embed"], tokens)
    np.testing.assert_array_equal(pair.theirs.get_input_embeddings()(torch.tensor(tokens)).detach(), rows)


def test_without_its_memory_the_model_is_the_backbone_to_the_bit(pair: Pair) -> None:
    inputs = pair.inputs(PICTURES)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    pair.theirs.use_memory = False
    try:
        np.testing.assert_array_equal(torch_logits(pair.theirs, inputs), torch_logits(pair.plain, inputs))
        bare = pair.theirs.generate(**inputs, **options)
        beams = pair.theirs.generate(**inputs, **options, num_beams=2)
    finally:
        pair.theirs.use_memory = True
    np.testing.assert_array_equal(bare, pair.plain.generate(**inputs, **options))
    np.testing.assert_array_equal(beams, pair.plain.generate(**inputs, **options, num_beams=2))


def test_the_backbone_s_tables_are_untouched_and_import_gives_the_memory_back(pair: Pair) -> None:
    ours, own, plain = pair.ours, pair.theirs.state_dict(), pair.plain.state_dict()
    stored = {name: tensor for name, tensor in plain.items() if "post_layernorm" not in name}
    assert all(torch.equal(own[name], tensor) for name, tensor in stored.items())
    assert {name for name in own if name not in plain} == {name for name in own if name.startswith("memory.")}
    config = ours.spec.vismem
    shapes = jax.eval_shape(lambda: vismem.init(jax.random.key(0), config))
    folder = ours.folder.parent / "out"
    back = load_memory(folder, config, ours.spec.backbone, shapes)
    jax.tree.map(np.testing.assert_array_equal, back, ours.memory["vismem"])
    whole = jaxmem.load(folder)
    assert whole.spec == ours.spec
    jax.tree.map(np.testing.assert_array_equal, (whole.base, whole.memory), (ours.base, ours.memory))


VARIANTS = {
    "official": (
        "qwen3_vl",
        {"visual_source": "llm_last", "visual_spans": "first", "builder_residual": "paper_eq10", "invoke_bias": 2.0},
        {"min_gap": 3, "max_invocations": 2},
    ),
    "few": (  # of the visual states 6 count, of the text's 5
        "qwen2_5_vl",
        {"text_cap": 5, "builder_length": 14, "out_norm": True, "tied": True, "alpha": 3.0, "invoke_bias": 4.0},
        {"disabled": ("long",)},
    ),
    "masked": (
        "qwen2_vl",
        {"queries": 1, "short": 5, "builder_layers": 1},
        {"disabled": ("short",), "disabled_mode": "mask", "min_gap": 0},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_settings(name: str, tmp_path: Any) -> None:
    family, settings, rules = VARIANTS[name]
    pair = exported(family, tmp_path, **settings)
    ours = played(pair, **rules)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        theirs = ask(pair, **rules)
    kinds = assert_same_answers(pair, theirs, ours)
    assert kinds == ({"short"} if name == "few" else {"long"})
    strided = any("uniform stride" in str(one.message) for one in told)
    assert strided == (name == "few")
    if name == "few":  # a skipped invocation has nothing behind it
        skipped = [call for row in range(3) for call in v.calls(ours, row, 0, pair.ours.spec.vismem) if call.end < 0]
        assert skipped


def test_too_many_visual_states_may_be_refused(tmp_path: Any) -> None:
    pair = exported("qwen2_vl", tmp_path, text_cap=5, builder_length=14, overflow="error")
    with pytest.raises(ValueError, match="visual states, and memories are formed of at most 6"):
        ask(pair)


def test_several_answers_to_a_prompt(qwen: Pair, once: Any) -> None:
    several = ask(qwen, do_sample=True, top_k=1, num_return_sequences=2, temperature=0.7)
    np.testing.assert_array_equal(several.sequences, once.sequences.repeat_interleave(2, 0))
    for row, memories in enumerate(several.memories):
        for one, two in zip(memories, once.memories[row // 2], strict=True):
            np.testing.assert_allclose(one, two, atol=5e-3)


def test_sampled_answers_keep_the_rules(qwen: Pair) -> None:
    """Every invocation is followed by its end, and ends by nothing else; there are tokens between and room behind."""
    config, invoked = qwen.ours.spec.vismem, []
    for seed in range(3):
        torch.manual_seed(seed)
        answers = ask(qwen, do_sample=True, temperature=4.0, top_k=0, min_gap=2, max_invocations=3)
        for row, memories in enumerate(answers.memories):
            tokens = said(qwen, answers, row)
            starts = [at for at, token in enumerate(tokens) if token in config.invoke_ids]
            ends = [at for at, token in enumerate(tokens) if token in config.end_ids]
            assert ends == [at + 1 for at in starts] and len(starts) == len(memories) <= 3
            assert all(later - sooner >= 4 for sooner, later in zip(starts, starts[1:], strict=False))
            sizes = [config.sizes[config.invoke_ids.index(tokens[at])] for at in starts]
            assert sizes == [len(memory) for memory in memories]
            used = len(np.trim_zeros(tokens, "b")) + sum(sizes)
            assert used <= NEW
            invoked.append(len(starts))
    assert sum(invoked) > 9 and len(set(invoked)) > 1


def test_an_invocation_needs_room_for_all_that_follows(qwen: Pair) -> None:
    """Of a model that cannot but call: a short memory takes 4 places with its tokens, a long one 6."""
    config, settings = qwen.ours.spec.vismem, qwen.theirs.settings
    settings.invoke_bias = 1e3
    try:
        for kind, needed in (("short", 4), ("long", 6)):
            only = {"disabled": tuple({"short", "long"} - {kind}), "disabled_mode": "mask"}
            for places in (needed - 1, needed):
                answers = ask(qwen, max_new_tokens=places, **only)
                for row, memories in enumerate(answers.memories):
                    tokens, at = said(qwen, answers, row), vismem.TYPES.index(kind)
                    assert (tokens == [config.invoke_ids[at], config.end_ids[at]]) == (places == needed)
                    assert len(memories) == (places == needed) and (memories or max(tokens) < KNOWN)
    finally:
        settings.invoke_bias = config.invoke_bias


def test_rows_end_by_themselves_and_do_not_disturb_others(qwen: Pair, once: Any) -> None:
    rows = [said(qwen, once, row) for row in range(3)]
    ordinary = [token for token in rows[0] if token < KNOWN and token not in rows[1]]
    stop = ordinary[0]
    ended = ask(qwen, eos_token_id=stop)
    cut = rows[0].index(stop) + 1
    assert said(qwen, ended, 0)[:cut] == rows[0][:cut] and not any(said(qwen, ended, 0)[cut:])
    assert said(qwen, ended, 1)[: len(rows[1])] == rows[1][: len(said(qwen, ended, 1))]


def test_a_prompt_alone_is_answered_as_in_a_batch(qwen: Pair, once: Any) -> None:
    for row, pictures in enumerate(PICTURES):
        alone = ask(qwen, [pictures], return_dict_in_generate=False)
        prompt = qwen.inputs([pictures])["input_ids"].shape[1]
        answer = alone[0, prompt:].tolist()
        assert len(answer) > 20 and said(qwen, once, row)[: len(answer)] == answer


def test_answers_are_streamed_with_their_control_tokens(qwen: Pair) -> None:
    class Kept(transformers.generation.streamers.BaseStreamer):
        tokens, ended = (), False

        def put(self, value: Any) -> None:
            self.tokens += tuple(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    streamer = Kept()
    answer = ask(qwen, PICTURES[2:], streamer=streamer)
    assert list(streamer.tokens) == answer.sequences[0].tolist() and streamer.ended


def test_the_loss_counts_control_tokens(qwen: Pair) -> None:
    inputs = qwen.inputs(PICTURES[2:])
    labels = inputs["input_ids"].clone()
    inputs["input_ids"][0, -3:] = labels[0, -3:] = torch.tensor([KNOWN, KNOWN + 1, 7])
    labels[0, :-3] = -100
    with torch.no_grad():
        out = qwen.theirs(**inputs, labels=labels)
    found = torch.log_softmax(out.logits[0, -4:-1], -1)[torch.arange(3), labels[0, -3:]]
    np.testing.assert_allclose(float(out.loss), -float(found.mean()), rtol=1e-5)


def test_what_generate_refuses(qwen: Pair) -> None:
    for message, options in {
        "VisMem has no beam search": {"num_beams": 2},
        "VisMem has no assisted generation": {"prompt_lookup_num_tokens": 2},
        "may hold short and long alone": {"disabled": ("medium",)},
        "neither 'skip' nor 'mask'": {"disabled_mode": "drop"},
        "must not be negative": {"min_gap": -1},
    }.items():
        with pytest.raises(ValueError, match=message):
            ask(qwen, **options)
