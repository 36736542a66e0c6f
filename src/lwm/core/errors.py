"""Errors a user can cause and mend.

Each message is one sentence that names the offending value and the remedy. The command line prints
it and exits with code 2; anything else that escapes is our own bug and keeps its traceback.
"""


class LwmError(Exception):
    """Base of every error meant for a user's eyes."""

    exit_code = 2
    agreed = False
    """Whether every process that works together raises it, see `distributed.together`."""


class ConfigError(LwmError):
    """A setting is out of range, or two settings contradict each other."""


class CheckpointError(LwmError):
    """A checkpoint is missing, broken, or of a kind that cannot be read."""


class InputError(LwmError):
    """A prompt, a document or a token sequence cannot be used as given."""


class CapacityError(LwmError):
    """What was asked for does not fit the model's context or the machine's memory."""
