"""Who may do what is an operator's."""

from types import SimpleNamespace

import pytest
from fastapi import Request
from pydantic import SecretStr

from services.chat import identity
from services.chat.problems import Problem


def request(authorization: bytes, *, key: str) -> Request:
    app = SimpleNamespace(state=SimpleNamespace(settings=SimpleNamespace(operator_key=SecretStr(key))))
    return Request({"type": "http", "app": app, "headers": [(b"authorization", authorization)]})


@pytest.mark.parametrize("key", ["any", "schlüssel", "鍵"])
def test_a_key_is_taken_as_it_is_typed(key: str) -> None:
    identity.operator(request(f"Bearer {key}".encode(), key=key))
    for other in (b"Bearer ", f"Bearer {key}x".encode(), b"Bearer \xff", f"Basic {key}".encode()):
        with pytest.raises(Problem):
            identity.operator(request(other, key=key))
