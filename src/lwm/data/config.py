"""What a user can set about training data. Light to import: command lines show it."""

from dataclasses import dataclass
from typing import Literal

from lwm.core.errors import ConfigError
from lwm.data.fields import parse_fields
from lwm.data.packing import LossWeights, Packing

Format = Literal["auto", "jsonl", "parquet", "array_record", "huggingface"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data: where it lies, what of it is learnt, how it is cut into rows."""

    path: str = ""
    """Files, globs or URLs, separated by commas; `hf:NAME` for a Hugging Face dataset; `book` for
    the King James Bible."""
    format: Format = "auto"
    """What the files are; auto looks into them."""
    fields: str = "text"
    """Keys of an example that are learnt: commas between, `+` joins as text, `[key]` carries no
    loss, <|bos|> and <|eos|> are tokens."""
    fields_from_example: str = ""
    """Key of the example that holds its own fields text, or a list of them."""
    fields_index: int = -1
    """Which of such a list; -1 draws one by the line number."""
    subfield_separator: str = " "
    """Stands between keys that `+` joins."""
    prepend_text: str = ""
    """Stands before the first field."""
    add_bos: bool = True
    """Begin each example with the beginning-of-text token, without loss."""
    add_eos: bool = True
    """End each example with the end-of-text token, with loss."""
    messages: str = ""
    """Key of a list of chat messages (role, content), instead of fields; the assistant's words
    alone carry loss."""
    template: str = "auto"
    """Chat template for messages: auto (the model's own), original or chatml."""
    packing: Packing = "concatenate"
    """Rows: concatenate cuts a running text, pack fits whole examples into rows, pad gives each a
    row."""
    loss_weights: LossWeights = "example"
    """Whether each example counts the same (in concatenate, each row), or each token."""
    held_out: float = 0.0
    """Share of the examples, from the end, kept for evaluation."""
    shuffle: bool = True
    """Draw examples in random order, another one each pass."""
    seed: int = 0
    """Of the random order."""
    workers: int = 0
    """Processes that prepare rows; the nearest lower divisor of this process's rows is used."""
    prefetch: int = 2
    """Batches prepared ahead."""
    max_broken: float = 0.01
    """Share of the examples that may be broken before the run stops."""

    def __post_init__(self) -> None:
        for name in ("held_out", "max_broken"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ConfigError(f"{name} is {share}; it must be a share from 0 to 1")
        for name in ("workers", "prefetch"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.fields_index < -1:
            raise ConfigError(f"fields_index is {self.fields_index}; it must be -1 or more")
        if self.messages and self.fields_from_example:
            raise ConfigError(
                f"messages is {self.messages!r} and fields_from_example is "
                f"{self.fields_from_example!r}; an example is made from one of them"
            )
        if not self.messages and not self.fields_from_example:
            parse_fields(self.fields)
