"""The description at /openapi.json is true: schemathesis calls every route as it says, and as it does not say."""

from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings

from tests.people import client_of
from tests.stack import Stack

if TYPE_CHECKING:
    from schemathesis import Case
    from schemathesis.schemas import BaseSchema

ROUTES = {
    "/api/chat": {"post"},
    "/api/usage": {"get", "post"},
    "/api/usage/adjustments": {"post"},
    "/api/usage/history": {"get"},
    "/api/usage/logs": {"get"},
    "/api/usage/events": {"get"},
    "/api/usage/explain": {"get"},
    "/api/plans": {"get"},
    "/api/subscriptions/{userId}": {"put"},
}


ENDLESS = {"/api/usage/events"}


@pytest.fixture
def described(stack: Stack) -> "BaseSchema":
    import schemathesis  # noqa: PLC0415

    return schemathesis.openapi.from_dict(
        httpx2.get(f"{stack.url}/openapi.json", trust_env=False, verify=False).json()
    )


@pytest.mark.parametrize(
    ("path", "method"),
    [(path, method) for path, methods in ROUTES.items() for method in sorted(methods) if path not in ENDLESS],
)
def test_a_route_answers_as_it_is_described(stack: Stack, described: "BaseSchema", path: str, method: str) -> None:
    from schemathesis.checks import not_a_server_error  # noqa: PLC0415
    from schemathesis.specs.openapi.checks import (  # noqa: PLC0415
        content_type_conformance,
        response_schema_conformance,
    )

    checks = [not_a_server_error, content_type_conformance, response_schema_conformance]

    @given(described[path][method].as_strategy())
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    def answers_as_described(case: "Case[Any]") -> None:
        case.call_and_validate(base_url=stack.url, checks=checks)

    answers_as_described()


async def test_the_description_names_every_route_with_an_example_of_each_body(stack: Stack) -> None:
    async with client_of(stack) as http:
        document = (await http.get("/openapi.json")).json()
        page = await http.get("/docs")
    assert {path: set(methods) for path, methods in document["paths"].items()} == ROUTES
    for name in ("ChatRequest", "Report", "AdjustmentRequest", "SubscriptionChange"):
        assert document["components"]["schemas"][name]["examples"]
    assert page.status_code == 200
    assert "/openapi.json" in page.text


async def test_each_answer_has_an_example_which_is_what_its_schema_describes(stack: Stack) -> None:
    from jsonschema_rs import validator_for  # noqa: PLC0415

    async with client_of(stack) as http:
        document = (await http.get("/openapi.json")).json()
    answers = [
        (content.get("schema", {}), content["example"])
        for methods in document["paths"].values()
        for operation in methods.values()
        for answer in operation["responses"].values()
        for content in answer["content"].values()
    ]
    bodies = [
        (schema, example)
        for schema in document["components"]["schemas"].values()
        for example in schema.get("examples", [])
    ]
    for schema, example in [*answers, *bodies]:
        wrong = validator_for({**schema, "components": document["components"]}).iter_errors(example)
        assert [error.message for error in wrong] == []


def test_the_description_is_valid_openapi(described: "BaseSchema") -> None:
    described.validate()
