"""Share the directory of the original's files between tests of checkpoints."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def originals() -> Path:
    """Return the directory of files that the original wrote, with its logits."""
    return Path(__file__).resolve().parents[1] / "fixtures" / "original"
