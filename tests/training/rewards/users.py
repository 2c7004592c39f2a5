"""What a user's module of reward functions may look like, including everything that goes wrong."""

import asyncio
import os
import time


def obey(completions, **columns):
    """Does to itself what the completion says."""
    return [_obey(text) for text in completions]


def _obey(text):
    if text == "hang":
        while True:
            pass
    if text == "sleep":
        time.sleep(60)
    if text == "raise":
        raise ZeroDivisionError("no\nreason")
    if text == "die":
        os._exit(7)
    if text == "exit":
        raise SystemExit(3)
    odd = {"nan": float("nan"), "inf": float("inf"), "none": None, "word": "0.5", "true": True}
    return odd[text] if text in odd else float(text) if text.replace(".", "").isdigit() else 0.0


def arguments(prompts, completions, completion_ids, answer, images, diagnostics, bonus=0.0):
    """Uses all that it is given."""
    rows = zip(prompts, completions, completion_ids, answer, images, diagnostics, strict=True)
    return [len(p) + 10 * len(c) + 100 * sum(i) + 1000 * a + (m or 0) + (d or 0) + bonus for p, c, i, a, m, d in rows]


def keywords(completions, **given):
    """One bit per name that it got."""
    names = ("prompts", "completion_ids", "answer", "images", "diagnostics")
    return [float(sum(2**bit for bit, name in enumerate(names) if name in given))] * len(completions)


async def later(completions, **columns):
    await asyncio.sleep(0.01)
    return [0.25] * len(completions)


def judge(requests):
    """A judge that replies 1 when the answer is the reference, letter by letter."""
    parts = [request.split("]\n") for request in requests]
    return [f"Score: {int(part[3].split(chr(10))[0] == part[5].split(chr(10))[0])}/1" for part in parts]


async def slow_judge(requests):
    await asyncio.sleep(0.01)
    return [float(request) for request in requests]


def lazy_judge(requests):
    return "1"


def batch(completions, **columns):
    """Needs the whole batch: the share of completions that differ from the row's own."""
    return [sum(other != own for other in completions) / len(completions) for own in completions]


def scalar(completions, **columns):
    return 1.0


def two(completions, **columns):
    return [1.0, 1.0]


def text(completions, **columns):
    return "1"


def words(completions, **columns):
    return ["good"] * len(completions)


def raises(completions, **columns):
    raise KeyError("answer")


def needy(completions, solution):
    return [0.0] * len(completions)


def loaded(completions, **columns):
    """1 when the process has imported none of the heavy packages."""
    import sys

    return [float(not {"jax", "numpy", "transformers", "torch", "pytest"} & set(sys.modules))] * len(completions)


def children(completions, **columns):
    """Leaves a process behind and hangs; its id goes to the file that the completion names."""
    import subprocess

    if os.sep in completions[0]:
        process = subprocess.Popen(["sleep", "60"])
        with open(completions[0], "w") as file:
            file.write(str(process.pid))
        time.sleep(60)
    return [0.0]


not_callable = 3
