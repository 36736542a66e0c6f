"""What a user can set about training data. Light to import: command lines show it."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from lwm.core.errors import ConfigError
from lwm.data.examples.fields import parse_fields
from lwm.data.rows.packing import LossWeights, Packing

Format = Literal["auto", "jsonl", "parquet", "array_record", "huggingface"]


LEAST_SHARE = 0.001
"""Of a mixture: shares are kept exactly in every thousand draws."""
MOST_SETS = 255


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set of a mixture; what it does not say of itself is as for the whole data."""

    path: str = ""
    """Files, globs or URLs, as --data.path."""
    weight: float = 1.0
    """Share of the examples that are drawn from here, in relation to the other weights; 0 leaves
    it out."""
    fields: str = ""
    """Keys that are learnt, as --data.fields."""
    fields_from_example: str = ""
    """Key of the example that holds its own fields text."""
    messages: str = ""
    """Key of a list of chat messages."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"the weight of a data set is {self.weight}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data: where it lies, what of it is learnt, how it is cut into rows."""

    path: str = ""
    """Files, globs or URLs, separated by commas; `hf:NAME` for a Hugging Face dataset; `book` for
    the King James Bible."""
    mixture: dict[str, DataSet] = field(default_factory=dict)
    """Several data sets by weight, instead of one path: --data.mixture.NAME.path FILE, and
    .weight, .fields, .fields-from-example or .messages, for any NAME."""
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
    max_frames: int = 0
    """Frames that a longer video gives, evenly spread; 0 for all."""
    drop_prompt: float = 0.0
    """Probability that an example which teaches pictures loses what stands before them, as
    classifier-free guidance needs."""
    packing: Packing = "concatenate"
    """Rows: concatenate cuts a running text, pack fits whole examples into rows, pad gives each a
    row."""
    loss_weights: LossWeights = "example"
    """What counts the same: each example (in concatenate, each row), each token, or halves of text
    and vision in each example, row_halves in each row."""
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
        for name in ("held_out", "max_broken", "drop_prompt"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ConfigError(f"{name} is {share}; it must be a share from 0 to 1")
        for name in ("workers", "prefetch", "max_frames"):
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
        if self.mixture:
            self._require_mixture()

    def _require_mixture(self) -> None:
        if self.path:
            raise ConfigError(
                f"path is {self.path!r} and mixture has {', '.join(self.mixture)}; data comes "
                "from one of them"
            )
        total = sum(part.weight for part in self.mixture.values())
        if not total or len(self.mixture) > MOST_SETS:
            raise ConfigError(
                f"the mixture has {len(self.mixture)} data sets whose weights sum to {total:g}; "
                f"give at least one a weight above 0, and at most {MOST_SETS} of them"
            )
        for name, part in self.mixture.items():
            if 0 < part.weight < LEAST_SHARE * total:
                raise ConfigError(
                    f"mixture.{name}.weight is {part.weight:g} of {total:g}; give it a share of "
                    f"at least {LEAST_SHARE:g}, or 0 to leave it out"
                )

    def sets(self) -> dict[str, tuple[float, "DataConfig"]]:
        """The data sets that are drawn from: weight and settings by name; one without a name where
        nothing is mixed.

        Raises:
            ConfigError: a data set of the mixture has no path.
        """
        if not self.mixture:
            return {"": (1.0, self)}
        found = {}
        for name, part in self.mixture.items():
            if not part.weight:
                continue
            if not part.path:
                raise ConfigError(
                    f"the data set {name!r} of the mixture has no path; give it one with "
                    f"--data.mixture.{name}.path, leave it out with --data.mixture.{name}.weight "
                    "0, or give all data with --data.path"
                )
            own = {
                "fields": part.fields or type(self).fields,
                "fields_from_example": part.fields_from_example,
                "messages": part.messages,
            }
            says = part.fields or part.fields_from_example or part.messages
            changes = own if says else {}
            found[name] = part.weight, replace(self, mixture={}, path=part.path, **changes)
        return found
