"""Tests of the conversions and of the training checkpoints."""
