"""All that takes part: broker, stand-ins, quota, ledger, and what is measured: chat and the bare limit."""

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx2
import psutil

from shared.streams import GIB
from tests.bench.processes import Cores, Processes, answers, listens, python
from tests.stack import free_port

# Rounds to no wait at all, but makes each delta a write of its own, as the provider's are. With 0 they leave as one.
DELAY_MS = 0.1

# Nobody is ever refused.
PLANS = """\
default = "unlimited"
[plans.unlimited]
period = "month"
"""


class Count(NamedTuple):
    generations: int
    tokens: int


@dataclass(frozen=True, slots=True)
class System:
    """ChatRail has a stand-in of its own: what that one gave is what must have been counted."""

    data: Path
    claude_port: int
    chat_claude_port: int
    chat_port: int
    limit_port: int
    chat: psutil.Process
    limit: psutil.Process
    helpers: list[psutil.Process]

    def given(self) -> Count:
        given = httpx2.get(f"http://127.0.0.1:{self.chat_claude_port}/given", trust_env=False).json()
        return Count(given["generations"], given["tokens"])

    def recorded(self) -> Count:
        return self._ask("ledger.db", "SELECT count(*), sum(tokens_used) FROM usage")

    def totalled(self) -> Count:
        return self._ask(
            "quota.db", "SELECT (SELECT count(*) FROM settlements), (SELECT sum(tokens_used) FROM usage_totals)"
        )

    def _ask(self, file: str, question: str) -> Count:
        with closing(sqlite3.connect(f"file:{self.data / file}?mode=ro", uri=True)) as database:
            generations, tokens = database.execute(question).fetchone()
        return Count(generations, tokens or 0)


@contextmanager
def running(folder: Path, cores: Cores) -> Iterator[System]:
    """All of it, ready, with its data and its logs in `folder`."""
    data, plans = folder / "data", folder / "plans.toml"
    plans.write_text(PLANS)
    nats, claude, chat_claude, quota, ledger, chat, limit = (free_port() for _ in range(7))
    nats_url = f"nats://127.0.0.1:{nats}"
    variables = {
        "CHATRAIL_DATA": str(data),
        "CHATRAIL_NATS_URL": nats_url,
        "CHATRAIL_PLANS": str(plans),
        "CHATRAIL_STREAM_BYTES_MAX": str(GIB),
        "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{chat_claude}",
        "ANTHROPIC_API_KEY": "simulated",
    }
    with Processes(folder, variables) as processes:

        def listening(name: str, port: int, *command: str) -> psutil.Process:
            return processes.start(name, *command, ready=lambda: listens(port))

        def service(name: str, port: int) -> psutil.Process:
            url = f"http://127.0.0.1:{port}/readyz"
            serve = python(f"services.{name}", "serve")
            return processes.start(name, *serve, ready=lambda: answers(url), CHATRAIL_PORT=str(port))

        def stand_in(name: str, port: int) -> psutil.Process:
            return listening(name, port, *python("deploy.claude", "--port", f"{port}", "--delay-ms", f"{DELAY_MS}"))

        server, config = str(Path(sys.executable).with_name("nats-server")), "deploy/nats/nats.conf"
        address = ["-a", "127.0.0.1", "-p", str(nats), "-sd", str(data / "nats")]
        helpers = [
            listening("broker", nats, server, "-c", config, *address),
            stand_in("claude", claude),
            stand_in("chat-claude", chat_claude),
        ]
        for step in (["services.quota", "migrate"], ["services.ledger", "migrate"], ["shared.streams"]):
            processes.run(*python(*step))
        allow = python("tests.bench.limit", "allow", nats_url)
        helpers += [
            processes.start("allow", *allow, ready=lambda: True),
            service("quota", quota),
            service("ledger", ledger),
        ]
        pass_on = python("tests.bench.limit", "pass-on", nats_url, f"http://127.0.0.1:{claude}", str(limit))
        with cores.measuring():
            measured = service("chat", chat), listening("limit", limit, *pass_on)
        yield System(data, claude, chat_claude, chat, limit, *measured, helpers)
