"""What pyproject.toml cannot say: found packages, and configs/ as medreason_jax.configs."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["data_gen*", "medreason_jax*"]),
        "medreason_jax.configs",
    ],
    package_dir={"medreason_jax.configs": "configs"},
)
