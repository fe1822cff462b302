"""Calls that arrive at odd moments of the group before them."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from nats.aio.client import Client
from nats.aio.msg import Msg
from pydantic import BaseModel

from shared.answering import Call, _Line


class Question(BaseModel):
    text: str


class Heard:
    """A connection on which answers go nowhere, at once."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []

    async def publish(self, _subject: str, body: bytes, **_kw: Any) -> None:
        self.answers.append(body)


def question(client: Heard, text: str) -> Msg:
    return Msg(cast(Client, client), reply="inbox", data=Question(text=text).model_dump_json().encode())


async def test_a_call_that_is_heard_the_moment_the_group_before_it_ends_is_answered() -> None:
    async def answer(questions: Sequence[Question]) -> list[Question]:
        return list(questions)

    client = Heard()
    line = _Line(cast(Client, client), Call("test", Question, answer))
    await line.heard(question(client, "first"))
    # Runs right after the group of the first, before anybody is told that it has ended.
    await asyncio.create_task(line.heard(question(client, "second")))
    while line.under_way:
        await asyncio.wait(line.under_way)
    assert client.answers == [b'{"text":"first"}', b'{"text":"second"}']
