"""Send requests generated from the server's OpenAPI document; none may make it fail.

`make fuzz` sends many more than the suite; `LWM_FUZZ_CASES` sets how many.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from running import running, vision_model

from lwm.serving.host import Host

CASES = int(os.environ.get("LWM_FUZZ_CASES", "50"))
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]


@pytest.mark.filterwarnings("ignore")  # of the library
def test_no_request_makes_the_server_fail(tmp_path: Path) -> None:
    host = Host("tiny", lambda: vision_model(tmp_path), slots=2, context=0, queue=64)
    statuses: set[int] = set()

    def send(case: Any) -> None:
        response = case.call(timeout=30)
        statuses.add(response.status_code)
        assert response.status_code < 500 or response.status_code == 503, response.text

    limits = settings(max_examples=max(4, CASES // 10), deadline=None, suppress_health_check=QUIET)
    with running(host, videos=tmp_path / "videos") as address:
        document = schemathesis.openapi.from_url(f"{address}/openapi.json")
        operations: list[Any] = [result.ok() for result in document.get_all_operations()]  # type: ignore[union-attr]
        assert len(operations) == 15
        for operation in operations:
            limits(given(case=operation.as_strategy())(lambda case: send(case)))()
    assert statuses >= {200, 400, 404}
