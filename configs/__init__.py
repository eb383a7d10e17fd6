"""Recipes, stage settings and model sizes: data files, shipped as medreason_jax.configs."""
