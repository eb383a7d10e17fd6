"""Fixtures: real data where it is present, and a tiny model with weights that hide nothing."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("MEDREASON_DATA", "../shared/data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data; tests that need it are skipped where it is missing."""
    if not DATA.is_dir():
        pytest.skip(f"no real data in {DATA}; set MEDREASON_DATA")
    return DATA.resolve()
