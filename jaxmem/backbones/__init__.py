"""Frozen vision-language backbones: pure functions of a configuration and one parameter tree, `base`."""
