"""schemathesis asks everything that the description of the service allows, and much that it does not."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from tests.serving.client import GENERATIONS, RunningService

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
LIMITED = settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


@pytest.fixture(scope="module")
def description(service: RunningService) -> dict[str, Any]:
    """That of the service, of one cheap step and one image."""
    told: dict[str, Any] = service.client.get("/openapi.json").json()
    body = told["paths"][GENERATIONS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body["properties"]["steps"] |= {"maximum": 1}
    body["properties"]["n"] |= {"maximum": 1}
    body["required"] += ["steps"]
    return told


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_no_request_finds_a_fault(service: RunningService, description: dict[str, Any], mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(description)
    statuses: list[int] = []
    asked = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @seeded(6)
        @LIMITED
        @pytest.mark.filterwarnings("ignore")
        def run(case: Any) -> None:
            nonlocal asked
            response = case.call(base_url=service.url)
            statuses.append(response.status_code)
            asked += 1
            case.validate_response(response, checks=CHECKS)

        operation.as_strategy(generation_mode=mode)
        test = __import__("hypothesis").given(case=operation.as_strategy(generation_mode=mode))(run)
        test()
    assert asked > 60 and service.client.get("/healthz").status_code == 200
