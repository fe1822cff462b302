"""Errors, as the API tells them."""

from fastapi import FastAPI
from starlette.types import Message

from services.chat import problems
from services.chat.routes import chat


async def test_a_caller_who_leaves_in_the_middle_of_a_question_is_no_fault_of_ours() -> None:
    app, told = FastAPI(), list[Message]()
    problems.install(app)
    app.include_router(chat.router)
    arriving: list[Message] = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b'{"user', "more_body": True},
    ]

    async def receive() -> Message:
        return arriving.pop()

    async def send(message: Message) -> None:
        told.append(message)

    json = [(b"content-type", b"application/json")]
    address = {"path": "/api/chat", "raw_path": b"/api/chat", "query_string": b""}
    await app({"type": "http", "method": "POST", "headers": json, **address}, receive, send)
    assert told[0]["status"] == 499
