"""Declare the settings of training data. Light to import, since command lines show them."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt

from lwm.core.config import Checked
from lwm.core.errors import ConfigError
from lwm.data.examples.examples import LongExamples
from lwm.data.examples.fields import parse_fields
from lwm.data.rows.packing import LossWeights, Packing

SourceFormat = Literal["auto", "jsonl", "parquet", "array_record", "huggingface"]

_LEAST_SHARE = 0.001  # of a mixture, since shares are exact in every thousand examples
_MOST_SETS = 255


@dataclass(frozen=True, kw_only=True)
class DataSet(Checked, section="data.mixture"):
    """Declare one data set of a mixture; unset fields default to the settings of all data."""

    path: str = ""
    """Files, globs or URLs, as in --data.path."""
    weight: Annotated[float, Ge(0), Lt(math.inf)] = 1.0
    """Share of the examples, relative to the other weights; 0 omits the data set."""
    fields: str = ""
    """Keys to train on, as in --data.fields."""
    fields_from_example: str = ""
    """Key of the example that holds its fields text."""
    messages: str = ""
    """Key of a list of chat messages."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked, section="data"):
    """Declare training data: its files, the parts to train on, and how it becomes rows."""

    path: str = ""
    """Files, globs or URLs, separated by commas; `hf:NAME` for a Hugging Face dataset; `book` for
    the King James Bible."""
    mixture: dict[str, DataSet] = field(default_factory=dict)
    """Several data sets by weight, instead of one path: --data.mixture.NAME.path FILE, and
    .weight, .fields, .fields-from-example or .messages, for any NAME."""
    format: SourceFormat = "auto"
    """Format of the files; auto detects it."""
    fields: str = "text"
    """Keys of an example to train on, separated by commas: `+` joins as text, `[key]` carries no
    loss, <|bos|> and <|eos|> are tokens."""
    fields_from_example: str = ""
    """Key of the example that holds its fields text, or a list of them."""
    fields_index: Annotated[int, Ge(-1)] = -1
    """Index into that list; -1 chooses one at random by the line number."""
    subfield_separator: str = " "
    """Text between keys that `+` joins."""
    prepend_text: str = ""
    """Text before the first field."""
    add_bos: bool = True
    """Begin each example with the beginning-of-text token, without loss."""
    add_eos: bool = True
    """End each example with the end-of-text token, with loss."""
    messages: str = ""
    """Key of a list of chat messages (role, content), instead of fields; only the assistant's
    words carry loss."""
    template: str = "auto"
    """Chat template for messages: auto (the model's own), original or chatml."""
    max_frames: Annotated[int, Ge(0)] = 0
    """Most frames of a video, evenly spaced; 0 for all."""
    drop_prompt: Annotated[float, Ge(0), Le(1)] = 0.0
    """Probability that an image or video loses its prompt, as classifier-free guidance needs."""
    packing: Packing = "concatenate"
    """concatenate cuts a running text into rows, pack fits whole examples into rows, pad gives
    each example a row."""
    too_long: LongExamples = "truncate"
    """What pack and pad do with an example longer than a row: truncate keeps the system message
    and the end of a chat, or shortens the longest field without loss; skip omits it. Images,
    videos and stored tokens are skipped; plain texts (one field, with loss) go on in the next
    row."""
    loss_weights: LossWeights = "example"
    """Unit that counts equally: each example (in concatenate, each row), each token, or the halves
    of text and vision in each example; row_halves: in each row."""
    held_out: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the examples, from the end, reserved for evaluation."""
    shuffle: bool = True
    """Read examples in random order, different in each pass."""
    seed: int = 0
    """Seed of the random order."""
    workers: Annotated[int, Ge(0)] = 0
    """Processes that prepare rows; rounded down to a divisor of this process's rows."""
    prefetch: Annotated[int, Ge(0)] = 2
    """Batches prepared in advance."""
    max_broken: Annotated[float, Ge(0), Le(1)] = 0.01
    """Share of broken examples that stops the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.messages and self.fields_from_example:
            raise ConfigError(
                f"messages is {self.messages!r} and fields_from_example is "
                f"{self.fields_from_example!r}; use one of them"
            )
        if not self.messages and not self.fields_from_example:
            parse_fields(self.fields)
        if self.mixture:
            self._require_mixture()

    def _require_mixture(self) -> None:
        if self.path:
            raise ConfigError(
                f"path is {self.path!r} and mixture has {', '.join(self.mixture)}; use one of them"
            )
        total = sum(part.weight for part in self.mixture.values())
        if not total or len(self.mixture) > _MOST_SETS:
            raise ConfigError(
                f"the mixture has {len(self.mixture)} data sets whose weights sum to {total:g}; "
                f"give at least one a weight above 0, and use at most {_MOST_SETS} of them"
            )
        for name, part in self.mixture.items():
            if 0 < part.weight < _LEAST_SHARE * total:
                raise ConfigError(
                    f"mixture.{name}.weight is {part.weight:g} of {total:g}; give it a share of "
                    f"at least {_LEAST_SHARE:g}, or 0 to omit the data set"
                )

    def sets(self) -> dict[str, tuple[float, "DataConfig"]]:
        """Return weight and settings of each data set by name; "" names the only one."""
        if not self.mixture:
            return {"": (1.0, self)}
        sets = {}
        for name, part in self.mixture.items():
            if not part.weight:
                continue
            if not part.path:
                raise ConfigError(
                    f"the data set {name!r} of the mixture has no path; set "
                    f"--data.mixture.{name}.path, omit it with --data.mixture.{name}.weight 0, or "
                    "give all data with --data.path"
                )
            settings = replace(self, mixture={}, path=part.path)
            if part.fields or part.fields_from_example or part.messages:
                settings = replace(
                    settings,
                    fields=part.fields or type(self).fields,
                    fields_from_example=part.fields_from_example,
                    messages=part.messages,
                )
            sets[name] = part.weight, settings
        return sets
