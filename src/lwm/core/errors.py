"""Define the errors that a user can cause and fix.

Each message is one sentence that names the offending value and the remedy. The command line prints
it and exits with code 2. Any other exception is a bug and keeps its traceback.
"""


class LwmError(Exception):
    """Serve as the base of every error that is shown to users."""

    exit_code = 2
    agreed = False
    """Whether every process raises the error, see `distributed.together`."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # reasons of libraries may have several lines


class ConfigError(LwmError):
    """Signal that a setting is out of range, or that two settings contradict each other."""


class CheckpointError(LwmError):
    """Signal that a checkpoint is missing, broken, or in a format that cannot be read."""


class InputError(LwmError):
    """Signal that an argument, a prompt, a document, a file or tokens cannot be used."""


class CapacityError(LwmError):
    """Signal that a request exceeds the model's context or the machine's memory."""
