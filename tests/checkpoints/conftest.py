"""What the checkpoint tests share: where the original's files lie."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def originals() -> Path:
    """Files that the original wrote itself, and the logits it computes from them."""
    return Path(__file__).resolve().parents[1] / "fixtures" / "original"
