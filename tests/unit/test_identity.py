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


# Of Latin-1, in which a header comes, the last byte of "à" is white space.
@pytest.mark.parametrize("key", ["any", "schlüssel", "鍵", "voilà", "two  words"])
def test_a_key_is_taken_as_it_is_typed(key: str) -> None:
    for presented in (f"Bearer {key}", f"bearer  {key}", f" \tBEARER {key} \t "):
        identity.operator(request(presented.encode(), key=key))
    others = (f"Bearer\t{key}", f"Bearer {key}x", f"Basic {key}", key, "Bearer ")
    for other in (b"Bearer \xff", *(other.encode() for other in others)):
        with pytest.raises(Problem):
            identity.operator(request(other, key=key))
