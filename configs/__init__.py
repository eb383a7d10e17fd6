"""Recipes: data files, shipped as medreason_jax.configs."""
