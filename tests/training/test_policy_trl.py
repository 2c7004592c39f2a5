"""Losses and advantages against the numbers of TRL's own GRPOTrainer, without a model.

What is TRL's: `GRPOTrainer._compute_loss` (ratios, clipping, KL, masks, normalisers), and
`GRPOTrainer._generate_and_score_completions` from padding on (the mask of truncated completions, the number of items
in the batch, advantages, their metrics). What is stubbed: the object is made without `__init__`; log-probabilities,
completions and rewards are handed in instead of computed; the accelerator is a single process that gathers nothing.

Where we differ on purpose, and the tests say so: rows without a token that counts (truncated, groups without signal)
leave our divisors, while TRL keeps them: its means over rows include them, and groups without signal count as tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import types

import jax
import numpy as np
import pytest
import torch
from trl import GRPOTrainer

from jaxmem.training.advantages import AdvantageConfig, advantages
from jaxmem.training.policy import LOSSES, LossConfig, policy_loss
from tests.training.policy_oracle import CASES, DEAD, MAX_LENGTH, Case, case, double, settings

END, PAD = 1, 0
UNDIVIDED = ("grpo", "gspo", "dr_grpo")  # TRL divides these by rows, whether they count or not


class OneProcess:
    """The part of an accelerate.Accelerator that these methods touch."""

    device, num_processes, process_index, sync_gradients = torch.device("cpu"), 1, 0, True

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        return value


def trainer(config: LossConfig, scale: AdvantageConfig, **others) -> GRPOTrainer:
    """A GRPOTrainer with our settings under TRL's names and nothing behind it."""
    trl = GRPOTrainer.__new__(GRPOTrainer)
    trl.accelerator = OneProcess()
    trl.model = types.SimpleNamespace(training=True, is_gradient_checkpointing=False)
    trl.args = types.SimpleNamespace(
        delta=config.dual_clip,
        use_bias_correction_kl=False,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing_kwargs=None,
        per_device_train_batch_size=64,
    )
    trl.loss_type = {"gspo": "grpo"}.get(config.kind, config.kind)
    trl.importance_sampling_level = config.recipe.ratio
    trl.epsilon_low, trl.epsilon_high, trl.beta = config.clip_low, config.high, config.kl_weight
    trl.max_completion_length, trl.current_gradient_accumulation_steps, trl.num_iterations = MAX_LENGTH, 1, 1
    trl.scale_rewards, trl.multi_objective_aggregation = scale.scale, scale.aggregate
    trl.top_entropy_quantile, trl.off_policy_mask_threshold = 1.0, None
    trl.use_vllm = trl.aux_loss_enabled = trl._entropy_bonus_enabled = trl.log_multimodal = False
    trl.mask_truncated_completions = True
    trl.environment_factories = trl.environments = trl.pad_to_multiple_of = trl.tools = None
    trl._tokenizer, trl.eos_token_ids = types.SimpleNamespace(pad_token_id=PAD), [END]
    trl._metrics, trl._logs = {"train": collections.defaultdict(list)}, collections.defaultdict(list)
    trl._logs["rewards"] = collections.defaultdict(list)
    trl._pending_extra_logs, trl._pending_metrics = {}, {}
    for name, value in others.items():
        setattr(trl, name, value)
    return trl


def microbatch(c: Case, items: float) -> dict[str, torch.Tensor]:
    """What TRL's loss reads of a microbatch of a step with `items` tokens that count."""
    rows, tokens = c.mask.shape
    return {
        "prompt_ids": torch.ones(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.ones(rows, tokens, dtype=torch.long),
        "completion_mask": torch.tensor(c.mask),
        "advantages": torch.tensor(c.advantages),
        "old_per_token_logps": torch.tensor(c.old),
        "ref_per_token_logps": torch.tensor(c.reference),
        "num_items_in_batch": torch.tensor(items),
    }


def theirs(config: LossConfig, c: Case, parts: tuple[slice, ...] = (slice(None),)) -> tuple[float, np.ndarray, dict]:
    """TRL's loss of a step, its gradient [R, N] and its metrics; `parts` are the microbatches."""
    trl = trainer(config, AdvantageConfig(), current_gradient_accumulation_steps=len(parts))
    trl.args.steps_per_generation = len(parts)
    new = torch.tensor(c.new, requires_grad=True)
    total = 0.0
    for part in parts:
        found = (new[part], torch.zeros_like(new[part]), None)
        trl._get_per_token_logps_and_entropies = lambda *_, found=found, **__: found
        loss = trl._compute_loss(None, microbatch(c.rows(part), float(c.mask.sum())))
        loss.backward()
        total += loss.item()
    return total, new.grad.numpy(), trl._metrics["train"]


def ours(config: LossConfig, c: Case, parts: tuple[slice, ...] = (slice(None),)) -> tuple[float, np.ndarray]:
    """Our loss of a step and its gradient: sums over microbatches, divided once."""

    def of(new: np.ndarray) -> tuple:
        each = [
            policy_loss(config, new[p], c.old[p], c.advantages[p], c.mask[p], MAX_LENGTH, c.reference[p]) for p in parts
        ]
        return sum(s.loss for s in each), sum(s.denominator for s in each)

    with double(True):
        (loss, divisor), grads = jax.value_and_grad(of, has_aux=True)(jax.numpy.asarray(c.new))
        return float(loss / divisor), np.asarray(grads / divisor)


def compact(c: Case) -> Case:
    """Only rows that count: what is left when TRL is to divide by the rows that we divide by."""
    kept = c.mask.any(axis=1)
    return Case(*(getattr(c, field.name)[kept] for field in dataclasses.fields(c)))


@pytest.mark.parametrize("name", ["plain", "asymmetric", "dual", "kl", "all"])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradient_equal_trl(kind: str, name: str) -> None:
    """Off policy (as in a second iteration) and on policy, ragged, with rows masked."""
    config = settings(kind, name)
    for title, c in CASES.items():
        c = compact(c)
        loss, grads, _ = theirs(config, c)
        found, slopes = ours(config, c)
        assert found == pytest.approx(loss, rel=1e-12, abs=1e-14), title
        np.testing.assert_allclose(slopes, grads, rtol=1e-10, atol=1e-14, err_msg=title)


@pytest.mark.parametrize("kind", LOSSES)
def test_rows_that_do_not_count_stay_in_trl_s_mean_over_rows(kind: str) -> None:
    """On purpose: a truncated row or a group without signal is no completion with loss 0."""
    config, c = settings(kind, "all"), CASES["truncated"]
    counted, rows = int(c.mask.any(axis=1).sum()), len(c.mask)
    loss, grads, _ = theirs(config, c)
    share = counted / rows if kind in UNDIVIDED else 1.0
    assert share < 1 or kind not in UNDIVIDED
    found, slopes = ours(config, c)
    assert found * share == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(slopes * share, grads, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", LOSSES)
def test_groups_without_signal_stay_in_trl_s_divisors(kind: str) -> None:
    """On purpose: their advantages are 0, so TRL averages zeros in; with their rows in our mask too we agree."""
    config, kept = settings(kind, "plain"), compact(case(3))
    dropped = compact(CASES["dead groups"])
    assert len(kept.mask) - len(dropped.mask) == len(DEAD)
    loss, _, _ = theirs(config, kept)
    assert ours(config, kept)[0] == pytest.approx(loss, rel=1e-12)
    lengths = [c.mask.sum() if kind in ("dapo", "bnpo", "cispo") else len(c.mask) for c in (kept, dropped)]
    assert ours(config, dropped)[0] * lengths[1] / lengths[0] == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_accumulation_equals_trl_and_where_it_cannot(kind: str) -> None:
    """Microbatches of equal rows and unequal tokens. With unequal rows, TRL's mean of means weighs rows unequally."""
    config, c = settings(kind, "all"), compact(case(8))
    c = c.rows(slice(0, 6))
    equal = (slice(0, 3), slice(3, 6))
    loss, grads, _ = theirs(config, c, equal)
    found, slopes = ours(config, c, equal)
    assert found == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(slopes, grads, rtol=1e-10, atol=1e-14)
    unequal = (slice(0, 1), slice(1, 6))
    apart = abs(ours(config, c, unequal)[0] - theirs(config, c, unequal)[0])
    assert apart < 1e-12 if kind in ("dapo", "cispo", "bnpo") else apart > 1e-3
    if kind != "bnpo":
        assert ours(config, c, unequal)[0] == pytest.approx(found, rel=1e-12)


def test_metrics_equal_trl() -> None:
    config, c = settings("dapo", "all"), compact(CASES["truncated"])
    metrics = theirs(config, c)[2]
    found = policy_loss(config, c.new, c.old, c.advantages, c.mask, MAX_LENGTH, c.reference)
    for name, value in (("clip_ratio/low_mean", "clipped_low"), ("clip_ratio/high_mean", "clipped_high"), ("kl", "kl")):
        assert float(getattr(found, value) / found.tokens) == pytest.approx(metrics[name][0], rel=1e-5), name
    metrics = theirs(settings("cispo", "plain"), c)[2]
    found = policy_loss(settings("cispo", "plain"), c.new, c.old, c.advantages, c.mask, MAX_LENGTH)
    assert float(found.clipped_high / found.tokens) == pytest.approx(metrics["cispo_clip_ratio"][0], rel=1e-5)
    assert metrics["cispo_clip_ratio"][0] > 0


# Advantages


def scored(scale: AdvantageConfig, rewards: np.ndarray, weights: np.ndarray, completions: list[list[int]]) -> tuple:
    """TRL's generation batch and metrics for completions and rewards [B, G, F] that are handed in."""
    _, group, functions = rewards.shape
    names = [f"f{i}" for i in range(functions)]
    trl = trainer(LossConfig(), scale, num_generations=group, reward_funcs=names, reward_func_names=names)
    trl.reward_weights = torch.tensor(weights)
    count, flat = len(completions), torch.tensor(rewards.reshape(-1, functions))
    trl._generate = lambda prompts: ([[2]] * count, completions, None, ["text"] * count, None, {}, None, [])
    trl._calculate_rewards = lambda *_: flat
    output = trl._generate_and_score_completions([{"prompt": "a"} for _ in range(count)])
    return output, trl._metrics["train"]


def rewards(seed: int, missing: bool) -> np.ndarray:
    """[5, 4, 3] float64: a group without signal, and (if `missing`) functions that do not apply."""
    found = np.random.default_rng(seed).choice([0.0, 0.25, 0.5, 1.0], (5, 4, 3))
    found[1] = [0.5, 0.0, 1.0]
    if missing:
        found[0, :, 1] = np.nan  # a function that applies to none of a group
        found[2, 1, 2] = found[3, 0, 0] = np.nan
        found[4, 3] = np.nan  # a completion that nothing scores
    return found


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    "scale",
    [
        AdvantageConfig("group"),
        AdvantageConfig("batch"),
        AdvantageConfig("none"),
        AdvantageConfig("group", "normalize_then_sum"),
    ],
    ids=lambda scale: f"{scale.scale}-{scale.aggregate}",
)
def test_advantages_equal_trl(scale: AdvantageConfig, missing: bool) -> None:
    given, weights = rewards(0, missing), np.array([1.0, 0.5, 2.0])
    output, metrics = scored(scale, given, weights, [[3, END]] * 20)
    found = advantages(scale, given, weights)
    # TRL's standard deviations hold a float32 quotient of counts.
    np.testing.assert_allclose(found.advantage.ravel(), output["advantages"], rtol=1e-6, atol=1e-9)
    assert np.any(found.advantage) and found.dead.tolist() == [False, True, False, False, False]
    assert np.nanmean(found.reward) == pytest.approx(metrics["reward"][0], rel=1e-10)
    assert np.nanstd(found.reward, ddof=1) == pytest.approx(metrics["reward_std"][0], rel=1e-6)
    if scale.scale == "group" and scale.aggregate == "sum_then_normalize":
        assert metrics["frac_reward_zero_std"] == [pytest.approx(found.dead.mean())]


def test_truncated_completions_leave_trl_s_mask_and_token_count() -> None:
    """`mask_truncated_completions`: the mask that we build from `truncated` is TRL's, and so is dapo's divisor."""
    completions = [[3, 4, END], [3] * 5, [END], [5, 6]] * 5
    output, _ = scored(AdvantageConfig(), rewards(0, False), np.ones(3), completions)
    want = [[float(at < len(ids) and ids[-1] == END) for at in range(5)] for ids in completions]
    np.testing.assert_array_equal(output["completion_mask"], want)
    assert output["num_items_in_batch"] == np.sum(want)
