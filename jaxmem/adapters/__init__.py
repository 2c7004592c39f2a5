"""Adapters of a frozen backbone: small updates of its own weights."""
