"""deploy/compose.yml on real containers, with the stand-in for Claude and two replicas of each consumer."""

import os
import shutil
import subprocess
import time
from collections.abc import Generator, Iterator
from functools import cached_property
from typing import Any
from uuid import uuid4

import pytest
from docker.errors import DockerException, ImageNotFound  # type: ignore[import-untyped]
from testcontainers.compose import DockerCompose
from testcontainers.core.docker_client import DockerClient

from tests.left_out import left_out
from tests.stack import PROJECT, free_port

IMAGES = {"CHATRAIL_BASE_IMAGE": "python:3.11-slim", "CHATRAIL_POSTGRES_IMAGE": "postgres:18"}
HEALTHY_TIMEOUT_S = 90
# As Compose takes them: in a URL, each of these characters would have to be escaped.
PASSWORD = "it's 100% /secret?#@:$"  # noqa: S105


class Containers(DockerCompose):
    """Up while it is entered; leaves images behind and nothing else."""

    def __init__(self, engine: Any, compose: list[str], *, project: str, chat_port: int, claude_port: int) -> None:
        super().__init__(PROJECT, "deploy/compose.yml")
        self.url = f"http://127.0.0.1:{chat_port}"
        self.claude_url = f"http://127.0.0.1:{claude_port}"
        self._engine = engine
        self._compose = compose
        self._label = f"com.docker.compose.project={project}"

    @cached_property
    def compose_command_property(self) -> list[str]:
        """Whichever Compose there is: testcontainers itself knows version 2 only."""
        _docker, _compose, *options = super().compose_command_property
        return [*self._compose, *options]

    def start(self) -> None:
        for command in ("build", "up --detach --scale ledger=2 --scale quota=2"):
            self._run_command([*self.compose_command_property, *command.split()])
        deadline = time.monotonic() + HEALTHY_TIMEOUT_S
        while not all(container.attrs["State"]["Health"]["Status"] == "healthy" for container in self.running()):
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def stop(self, down: bool = True) -> None:
        super().stop(down)
        engine, ours = self._engine, {"label": self._label}
        left_behind = [engine.containers.list(all=True, filters=ours), engine.networks.list(filters=ours)]
        assert [*left_behind, engine.volumes.list(filters=ours)] == [[], [], []]

    def running(self, service: str = "") -> list[Any]:
        """The containers, of one service or of all, that run just now."""
        labels = [self._label, *([f"com.docker.compose.service={service}"] if service else [])]
        found: list[Any] = self._engine.containers.list(filters={"label": labels})
        return found

    def query(self, service: str, query: str) -> int:
        """One number from the database of a service."""
        [database] = self.running(f"{service}-db")
        return int(output(database, "psql", "--username", service, "--tuples-only", "--command", query))

    def run(self, service: str, *options: str) -> str:
        """What a service that is started by hand says; it must end well."""
        command = [*self.compose_command_property, "run", "--rm", service, *options]
        return subprocess.run(command, check=True, capture_output=True, cwd=PROJECT, text=True, timeout=60).stdout

    def logs(self) -> str:
        return "".join(self.get_logs())


def output(container: Any, *command: str) -> str:
    status, written = container.exec_run(command)
    assert status == 0, written
    text: str = written.decode()
    return text


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """The client of a Docker engine that answers, with the images that ours are built on and run beside."""
    # Asked by the command: the library leaves its socket open when nobody answers.
    if not _answers(["docker"]):
        left_out("no Docker engine answers")
    client = DockerClient().client
    for variable, usual in IMAGES.items():
        _obtain(client, os.environ.get(variable) or usual)
    yield client
    client.close()


def _obtain(engine: Any, image: str) -> None:
    try:
        engine.images.get(image)
    except ImageNotFound:
        try:
            engine.images.pull(image)
        except DockerException:
            left_out(f"the image {image} is not on this machine and cannot be pulled")


@pytest.fixture(scope="session")
def compose() -> list[str]:
    """The command of Compose, version 2 or 1."""
    installed = [command for command in (["docker", "compose"], ["docker-compose"]) if _answers(command)]
    if not installed:
        left_out("neither docker compose nor docker-compose is installed")
    return installed[0]


def _answers(command: list[str]) -> bool:
    if not shutil.which(command[0]):
        return False
    return subprocess.run([*command, "version"], check=False, capture_output=True, timeout=30).returncode == 0


@pytest.fixture(scope="module")
def containers(engine: Any, compose: list[str]) -> Iterator[Containers]:
    project = f"chatrail-{uuid4().hex}"
    chat_port, claude_port, nats_port = (free_port() for _ in range(3))
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("ANTHROPIC_", "CHATRAIL_", "COMPOSE_")) and name not in IMAGES:
                patch.delenv(name)
        ours = {
            "CHATRAIL_CLAUDE_PORT": str(claude_port),
            "CHATRAIL_LEDGER_DATABASE_PASSWORD": PASSWORD,
            "CHATRAIL_NATS_PORT": str(nats_port),
            "CHATRAIL_PORT": str(chat_port),
            "CHATRAIL_QUOTA_DATABASE_PASSWORD": PASSWORD[::-1],
            "CHATRAIL_STREAM_BYTES_MAX": str(64 * 1024**2),
            "CHATRAIL_TAG": "test",
            "COMPOSE_PROJECT_NAME": project,
        }
        for name, value in ours.items():
            patch.setenv(name, value)
        with Containers(engine, compose, project=project, chat_port=chat_port, claude_port=claude_port) as running:
            yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the containers said belongs to the report of a test that failed: soon they are gone."""
    report = yield
    containers = item.funcargs.get("containers")
    if report.failed and isinstance(containers, Containers):
        report.sections.append(("Containers", containers.logs()))
    return report
