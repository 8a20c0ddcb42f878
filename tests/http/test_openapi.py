"""The API's description is true: whatever it admits or forbids, the server answers as it says, and never with a 5xx."""

from __future__ import annotations

from typing import Any

import pytest
import requests
import schemathesis
from http_support import Server
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from nanogpt.web.operations import OPERATIONS, Operation

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
]

pytestmark = pytest.mark.filterwarnings("default")  # of schemathesis and what it imports


@pytest.fixture(scope="module")
def description(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


CASES = [
    (operation, mode)
    for operation in OPERATIONS
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or operation.body is not None  # else there is nothing that could be wrong
]


@pytest.mark.parametrize(
    ("operation", "mode"), CASES, ids=[f"{operation.path}-{mode.name.lower()}" for operation, mode in CASES]
)
def test_no_request_gets_an_answer_that_is_not_described(
    description: Any, operation: Operation, mode: GenerationMode
) -> None:
    """What the description admits, and what it forbids."""
    described = description[operation.path][operation.method]

    @given(case=described.as_strategy(generation_mode=mode))
    @settings(
        max_examples=20,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    check()


@pytest.mark.parametrize(
    "operation",
    [operation for operation in OPERATIONS if operation.example is not None],
    ids=lambda operation: operation.path,
)
def test_the_examples_are_answered(server: Server, operation: Operation) -> None:
    answer = requests.post(server.url + operation.path, json=operation.example, timeout=60)
    assert answer.status_code == 200, answer.text
    assert operation.answer is not None
    operation.answer.model_validate(answer.json())
