"""Recipes and the published models' sizes: data files, shipped as medreason_jax.configs."""
