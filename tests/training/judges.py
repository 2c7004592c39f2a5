"""Reward functions of the tests, imported by the processes that judge."""


def vowels(completions, **others):
    """Share of vowels: a reward that differs between random texts."""
    return [sum(text.count(letter) for letter in "aeiou") / max(1, len(text)) for text in completions]


def constant(completions, **others):
    """The same for all: no group has a signal."""
    return [0.5 for _ in completions]
