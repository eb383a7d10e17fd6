"""Qwen2.5 in Flax NNX."""
