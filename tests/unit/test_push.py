"""Who watches usage while chat stops."""

import pytest
from nats.aio.client import Client

from services.chat.deadline import Deadline
from services.chat.push import Watchers
from services.chat.quota import Quota
from shared.errors import Unavailable


async def test_nobody_begins_to_watch_what_is_closing() -> None:
    watchers = Watchers(Client(), Quota(Client()))
    watchers.watch("user_1", Deadline(), headers={})
    watchers.close()
    with pytest.raises(Unavailable, match="restarting"):
        watchers.watch("user_1", Deadline(), headers={})
