"""Rewards for completions: built-in judges, users' own functions, and the processes that verify without hanging a run.

`settings.RewardConfig` names the functions, `runner.RewardRunner` calls them. Importing this package loads nothing.
"""
