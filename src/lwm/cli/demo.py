"""`lwm demo`."""


def demo() -> None:
    """The tour on the embedded default."""
