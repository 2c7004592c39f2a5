"""Weights in and out: Hugging Face folders, memory files, and the checkpoints of a training run."""
