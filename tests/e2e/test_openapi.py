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
OPERATORS = {
    ("/api/usage", "post"),
    ("/api/usage/adjustments", "post"),
    ("/api/subscriptions/{userId}", "put"),
}
HEADERS = ("Retry-After", "RateLimit", "RateLimit-Policy", "X-Next-Cursor", "WWW-Authenticate")


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
        response_headers_conformance,
        response_schema_conformance,
    )

    answers = described.raw_schema["paths"][path][method]["responses"]

    def headers_are_described(_context: Any, response: Any, _case: "Case[Any]") -> None:
        known = answers.get(str(response.status_code), answers["default"]).get("headers", {})
        assert [name for name in HEADERS if name.lower() in response.headers and name not in known] == []

    checks = [
        not_a_server_error,
        content_type_conformance,
        response_schema_conformance,
        response_headers_conformance,
        headers_are_described,
    ]

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
        (told.get("schema", {}), told["example"])
        for methods in document["paths"].values()
        for operation in methods.values()
        for answer in operation["responses"].values()
        for told in [*answer["content"].values(), *answer.get("headers", {}).values()]
    ]
    bodies = [
        (schema, example)
        for schema in document["components"]["schemas"].values()
        for example in schema.get("examples", [])
    ]
    for schema, example in [*answers, *bodies]:
        wrong = validator_for({**schema, "components": document["components"]}).iter_errors(example)
        assert [error.message for error in wrong] == []


async def test_the_description_tells_what_an_answer_is_sent_with_and_who_must_present_a_key(stack: Stack) -> None:
    async with client_of(stack) as http:
        document = (await http.get("/openapi.json")).json()
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            told = {status: set(answer.get("headers", {})) for status, answer in operation["responses"].items()}
            is_operators, is_of_a_user = (path, method) in OPERATORS, path != "/api/plans"
            limits = {"RateLimit", "RateLimit-Policy"} if is_of_a_user else set()
            cursor = {"X-Next-Cursor"} if path == "/api/usage/logs" else set()
            assert told["200"] == limits | cursor
            assert told.get("503") == ({"Retry-After"} if is_of_a_user else None)
            assert told.get("401") == ({"WWW-Authenticate"} if is_operators else None)
            assert ("security" in operation) == is_operators
            if path == "/api/chat":
                assert told["429"] == {"Retry-After", *limits}


def test_the_description_is_valid_openapi(described: "BaseSchema") -> None:
    described.validate()
