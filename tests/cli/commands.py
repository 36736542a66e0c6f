"""What a command did, and the size of the model that the command-line tests give it."""

from collections.abc import Callable
from dataclasses import dataclass

CONTEXT = 128
"""Tokens that the tiny model can hold."""


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]
