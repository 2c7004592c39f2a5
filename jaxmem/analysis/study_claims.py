"""One honest sentence per claim of the PVM paper (arXiv 2605.00814), made of a study's numbers.

Every sentence can come out either way. A share of one arm is called higher than another's when the means differ by at
least the study's margin and every seed of the one lies above every seed of the other; "no" when the means do not differ
by the margin; "unclear" in between. The arms' names that sentences know are those of `configs/digits_benchmark.py`;
what a study does not have is said to be untested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from jaxmem.analysis.study_results import Results
from jaxmem.analysis.study_settings import StudyConfig
from jaxmem.evaluation.conditions import Condition
from jaxmem.evaluation.pooling import Pooled

Verdict = Literal["yes", "no", "unclear", "partly", "untested"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim, what came of it, and the numbers in words."""

    claim: str
    verdict: Verdict
    numbers: str

    def __str__(self) -> str:
        return f"{self.claim}: {self.verdict}{', ' if self.numbers else ''}{self.numbers}."


def claims(results: Results, study: StudyConfig) -> tuple[Claim, ...]:
    """All sentences, in the paper's order; the last ones are not the paper's, but belong to an honest picture."""
    makers: Sequence[Callable[[Results, StudyConfig], Claim]] = (
        dilution,
        dilution_or_position,
        resists,
        not_parameters,
        second_stage,
        what_the_second_stage_repairs,
        memory_alone,
        without_memory,
        no_harm,
        blocking,
        adapters,
        adapted_at_length,
    )
    return tuple(make(results, study) for make in makers)


def dilution(results: Results, study: StudyConfig) -> Claim:
    """Attention to the image falls as text grows: Theorem 3.1 of the paper."""
    name = "Attention to the image dilutes as text grows (memory off)"
    found = [(c.k, _mean(one.mean for one in results.each("off", "mass", c))) for c in _plain(results)]
    found = [(k, mass) for k, mass in found if mass is not None]
    if len(found) < 2:
        return Claim(name, "untested", "")
    falls = [b < a for (_, a), (_, b) in zip(found, found[1:], strict=False)]
    verdict = "yes" if all(falls) else "partly" if found[-1][1] < found[0][1] else "no"
    shown = ", ".join(f"{mass:.3f} at k={k}" for k, mass in found)
    return Claim(name, verdict, f"the image's share, mean over layers, is {shown}")


def dilution_or_position(results: Results, study: StudyConfig) -> Claim:
    """Which of the two explains the backbone's decline: many keys, or far positions?"""
    name = "What costs the backbone its sight is many keys (dilution) rather than far positions"
    conditions = results.conditions()
    near = results.share("off", "read", Condition(0))
    far = [c for c in conditions if c.positions == "stretched"]
    many = [c for c in conditions if c.positions == "packed"]
    if not near or not far or not many:
        return Claim(name, "untested", "")
    stretched, packed = results.share("off", "read", far[-1]), results.share("off", "read", many[-1])
    if not stretched or not packed:
        return Claim(name, "untested", "")
    lost_far, lost_many = near.mean - stretched.mean, near.mean - packed.mean
    if max(lost_far, lost_many) < study.margin:
        verdict: Verdict = "no"
    elif abs(lost_many - lost_far) < study.margin:
        verdict = "unclear"
    else:
        verdict = "no" if lost_many < lost_far else "yes" if lost_far < study.margin else "partly"
    return Claim(
        name,
        verdict,
        f"reading goes from {near.mean:.3f} to {packed.mean:.3f} with {many[-1].k} words over {many[-1].span} positions"
        f" and to {stretched.mean:.3f} with no words but {far[-1].span} positions skipped",
    )


def resists(results: Results, study: StudyConfig) -> Claim:
    """PVM reads where the backbone alone no longer does."""
    return _higher(results, study, f"PVM resists the decline with length: reads more than memory off at {_at(study)}",
                   ("pvm", "off"), "read")  # fmt: skip


def not_parameters(results: Results, study: StudyConfig) -> Claim:
    """The same parameters without a look at the image."""
    claim = f"The gain comes from looking again, not from parameters: PVM reads more than an equal MLP at {_at(study)}"
    return _higher(results, study, claim, ("pvm", "mlp"), "read")


def second_stage(results: Results, study: StudyConfig) -> Claim:
    """GRPO after supervised training."""
    claim = f"The second stage (GRPO on PVM and language model) adds exact answers at {_at(study, inside=True)}"
    return _higher(results, study, claim, ("grpo_all", "pvm"), "exact", inside=True)


def what_the_second_stage_repairs(results: Results, study: StudyConfig) -> Claim:
    """Reading or text work?"""
    name, condition = "What the second stage repairs is reading", Condition(study.trained_k)
    read, exact = ([results.share(arm, what, condition) for arm in ("grpo_all", "pvm")] for what in ("read", "exact"))
    if None in (*read, *exact):
        return Claim(name, "untested", "")
    (a, b), (c, d) = read, exact
    assert a and b and c and d
    seeing, answers = a.mean - b.mean, c.mean - d.mean
    if answers < study.margin:
        verdict, what = "no", "exact answers gain too little to ask"
    elif seeing >= study.margin:
        verdict, what = "partly", "reading improves too, and text work may"
    else:
        verdict, what = "no", "it is text work (copying, adding, stopping)"
    numbers = f"reading changes by {seeing:+.3f} and exact answers by {answers:+.3f} at k={study.trained_k}: {what}"
    return Claim(name, verdict, numbers)


def memory_alone(results: Results, study: StudyConfig) -> Claim:
    """GRPO on the PVM alone."""
    claim = f"GRPO on the PVM alone adds exact answers at {_at(study, inside=True)}"
    return _higher(results, study, claim, ("grpo_memory", "pvm"), "exact", inside=True)


def without_memory(results: Results, study: StudyConfig) -> Claim:
    """GRPO on the bare backbone, the control of the second stage."""
    claim = f"GRPO with PVM reads more than GRPO without at {_at(study)}"
    return _higher(results, study, claim, ("grpo_all", "grpo_language"), "read")


def no_harm(results: Results, study: StudyConfig) -> Claim:
    """At short range the backbone sees well by itself."""
    name, condition = "PVM does no harm at short range (k=0)", Condition(0)
    shares = [results.share(arm, what, condition) for what in ("read", "exact") for arm in ("off", "pvm")]
    if None in shares:
        return Claim(name, "untested", "")
    (a, b, c, d) = (one for one in shares if one)
    lost = [off.mean - on.mean >= study.margin for off, on in ((a, b), (c, d))]
    verdict = "no" if all(lost) else "partly" if any(lost) else "yes"
    return Claim(name, verdict, f"read {_show(b)} against {_show(a)} without it, exact {_show(d)} against {_show(c)}")


def blocking(results: Results, study: StudyConfig) -> Claim:
    """The one part of the recipe that the paper does not have."""
    claim = f"Visual-key blocking in training is needed here: PVM with it reads more than without at {_at(study)}"
    return _higher(results, study, claim, ("pvm", "pvm_plain"), "read")


def adapters(results: Results, study: StudyConfig) -> Claim:
    """Other ways to train on the same boards."""
    name = f"PVM reads more than LoRA and full fine-tuning on the same boards at {_at(study)}"
    parts = [_higher(results, study, "", ("pvm", other), "read") for other in ("lora", "full")]
    tested = [part for part in parts if part.verdict != "untested"]
    if not tested:
        return Claim(name, "untested", "")
    verdicts = {part.verdict for part in tested}
    verdict = tested[0].verdict if len(verdicts) == 1 else "partly"
    return Claim(name, verdict, " and ".join(part.numbers for part in tested))


def adapted_at_length(results: Results, study: StudyConfig) -> Claim:
    """The adapter that may train on what it is tested on."""
    claim = f"Trained on short boards, PVM still reads more than LoRA trained at full length at {_at(study)}"
    return _higher(results, study, claim, ("pvm", "lora_long"), "read")


def _higher(
    results: Results, study: StudyConfig, claim: str, arms: tuple[str, str], name: str, inside: bool = False
) -> Claim:
    """Has the first arm the higher share at the k of comparison?"""
    condition = Condition(study.trained_k if inside else study.reference)
    one, other = (results.share(arm, name, condition) for arm in arms)
    if one is None or other is None:
        return Claim(claim, "untested", "")
    title = results.arms[arms[1]].title
    return Claim(claim, compare(one, other, study.margin), f"{_show(one)} against {_show(other)} ({title})")


def compare(one: Pooled, other: Pooled, margin: float) -> Literal["yes", "no", "unclear"]:
    """Is the first share higher? See the module's words."""
    if one.mean - other.mean < margin:
        return "no"
    return "yes" if one.low > other.high else "unclear"


def _plain(results: Results) -> list[Condition]:
    return [c for c in results.conditions() if c == Condition(c.k)]


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _at(study: StudyConfig, inside: bool = False) -> str:
    return f"k={study.trained_k}" if inside else f"k={study.reference} (trained to {study.trained_k})"


def _show(one: Pooled) -> str:
    return f"{one.mean:.3f} ± {one.spread:.3f}" if one.seeds > 1 else f"{one.mean:.3f} (one seed)"
