"""Check the figures of memory against psutil's."""

import jax
import psutil

from lwm.core.memory import available_bytes, gigabytes


def test_a_cpu_device_has_at_most_the_memory_of_the_host() -> None:
    available = available_bytes(jax.devices()[0])
    assert available is not None
    assert 0 < available <= psutil.virtual_memory().total


def test_gigabytes_are_decimal() -> None:
    assert gigabytes(13_476_831_232) == "13.48 GB"
