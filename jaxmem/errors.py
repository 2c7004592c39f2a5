"""What jaxmem raises when an input is wrong: each message says what, where, and what would be right."""

from __future__ import annotations


class JaxmemError(Exception):
    """The root of all of jaxmem's own errors; the command line prints their message without a traceback."""


class ConfigError(JaxmemError, ValueError):
    """A setting is unknown, missing or impossible."""


class CheckpointError(JaxmemError, ValueError):
    """A folder or file of weights cannot be used."""


class DataError(JaxmemError, ValueError):
    """A record, an image or a prompt cannot be used."""
