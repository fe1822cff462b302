"""`make run` from outside: what it prints, what it survives, and what it leaves behind."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forked
from tests.fixtures import eventually
from tests.people import contents, recorded, totalled
from tests.stack import PROJECT, ExecutedStack, Stack, alive, environment, free_port


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Started as users do, in a folder whose name needs quoting everywhere; the last test that has it stops it."""
    with ExecutedStack(tmp_path_factory.mktemp("spare") / 'it\'s 100% "data" #1 ;') as running:
        yield running


async def refusal(**variables: str) -> str:
    """What a stack that must not start says, which is one line of words."""
    ended = await forked.run("deploy.local", env=environment(**variables), apart=True, timeout_s=30)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.count("\n") == 1
    return ended.err


async def test_every_part_answers_where_the_endpoints_file_says(stack: Stack) -> None:
    assert set(stack.endpoints) == {"chat", "ledger", "quota", "nats", "claude"}
    assert stack.endpoints["chat"] == stack.url
    for service in ("chat", "ledger", "quota"):
        await stack.answers(f"{stack.endpoints[service]}/readyz", timeout_s=0)


@pytest.mark.parametrize("name", ["chat", "ledger", "quota", "claude", "broker"])
async def test_a_killed_part_comes_back(stack: Stack, name: str) -> None:
    killed = stack.kill(name)
    assert stack.pid(name) != killed
    for service in ("chat", "ledger", "quota"):
        await stack.answers(f"{stack.endpoints[service]}/readyz")


async def test_a_part_comes_back_however_often_it_is_killed(stack: Stack) -> None:
    for _ in range(4):
        stack.kill("ledger")
    await stack.answers(f"{stack.endpoints['ledger']}/readyz")


async def test_two_stacks_run_side_by_side(stack: Stack, own_stack: Stack) -> None:
    await own_stack.report("user_side_by_side", 5)
    await own_stack.usage_reaches("user_side_by_side", 5)
    await stack.usage_reaches("user_side_by_side", 0)


async def test_a_stop_leaves_no_process_and_the_next_run_goes_on_with_the_same_data(own_stack: Stack) -> None:
    await own_stack.report("user_1", 8094)
    processes = own_stack.processes()
    assert own_stack.stop(signal.SIGTERM) == 0
    assert not alive(processes)

    with Stack(own_stack.data) as again:
        await again.usage_reaches("user_1", 8094)


def test_a_killed_stack_or_supervisor_leaves_no_process_and_the_next_goes_on(tmp_path: Path) -> None:
    with Stack(tmp_path / "data") as running:
        left_behind = running.processes()
        running.stop(signal.SIGKILL)
        running.start()
        assert not alive(left_behind)

        _, supervisor, *programs = running.processes()
        supervisor.kill()
        assert running.wait() == 1
        deadline = time.monotonic() + 10
        while alive(programs):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_key_is_never_written_down_and_a_named_claude_is_used(tmp_path: Path) -> None:
    variables = {"ANTHROPIC_API_KEY": "sk-ant-secret", "ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}
    with Stack(tmp_path / "data", **variables) as running:
        assert running.endpoints["claude"] == variables["ANTHROPIC_BASE_URL"]
        assert "claude" not in running.parts()
        assert not [text for text in contents(running.data) if b"sk-ant-secret" in text]
        processes = running.processes()
        assert running.stop(signal.SIGINT) == 0  # as Ctrl-C does
        assert not alive(processes)


@pytest.mark.parametrize("service", ["ledger", "quota"])
async def test_a_damaged_database_is_named_with_what_to_do_and_that_helps(tmp_path: Path, service: str) -> None:
    data, port = tmp_path / "data", str(free_port())
    stack, database = Stack(data, CHATRAIL_PORT=port), data / f"{service}.db"
    with stack:
        await stack.report("user_1", 8094)
        await stack.usage_reaches("user_1", 8094)
    database.write_bytes(os.urandom(20_000))

    ended = await forked.run("deploy.local", env=environment(CHATRAIL_DATA=str(data), CHATRAIL_PORT=port))
    assert ended.status == 1
    said = f"The database {database} is damaged, or is none. Move it away and start ChatRail: "
    assert ended.out.splitlines()[-1].strip() == f"{said}it makes another from the stream."
    assert "Traceback" not in ended.out

    database.rename(tmp_path / "moved away")
    with stack:
        await stack.usage_reaches("user_1", 8094)

        async def is_recorded() -> bool:
            return recorded(stack) == totalled(stack) == 8094

        await eventually(is_recorded)


async def test_a_second_stack_on_the_same_data_is_refused(stack: Stack) -> None:
    said = await refusal(CHATRAIL_DATA=str(stack.data), CHATRAIL_PORT=str(free_port()))
    assert said.startswith(f"ChatRail is already running on the data folder {stack.data} (process ")


async def test_a_taken_port_is_named_with_a_way_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = await refusal(CHATRAIL_DATA=str(tmp_path), CHATRAIL_PORT=str(port))
    assert said == (
        f"Port {port} on 127.0.0.1 is taken by another program. Choose another: CHATRAIL_PORT={port + 1} make run\n"
    )


@pytest.mark.parametrize("port", ["0", "65536", "http"])
async def test_a_port_that_is_none_is_refused(tmp_path: Path, port: str) -> None:
    assert (await refusal(CHATRAIL_DATA=str(tmp_path), CHATRAIL_PORT=port)).startswith(f"CHATRAIL_PORT is '{port}': ")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("CHATRAIL_TOKENS_MAX", "0", "CHATRAIL_TOKENS_MAX is '0': Input should be greater than or equal to 1."),
        ("CHATRAIL_IDENTITY", "x", "CHATRAIL_IDENTITY is 'x': Input should be 'open'."),
        (
            "CHATRAIL_HOST",
            "0.0.0.0",  # noqa: S104
            "CHATRAIL_IDENTITY=open believes every caller, so chat does not listen on 0.0.0.0.",
        ),
        ("CHATRAIL_GRACE_S", "soon", "CHATRAIL_GRACE_S is 'soon': Input should be a valid number"),
        ("CHATRAIL_CLAUDE_IDLE_S", "inf", "CHATRAIL_CLAUDE_IDLE_S is 'inf': Input should be a finite number."),
        ("CHATRAIL_CORS_ORIGINS", "notanorigin", "CHATRAIL_CORS_ORIGINS is 'notanorigin': each origin is scheme://"),
        ("CHATRAIL_NATS_URL", "nats://a:secret@127.0.0.1:port", "CHATRAIL_NATS_URL: a broker is at nats://"),
        ("ANTHROPIC_BASE_URL", "http://a:secret@host", "ANTHROPIC_BASE_URL: it cannot have a user or a password"),
        ("ANTHROPIC_API_KEY", "sk-secret\n", "ANTHROPIC_API_KEY: it must be printable ASCII"),
        ("CHATRAIL_SEAL_EVERY_S", "0", "CHATRAIL_SEAL_EVERY_S is '0': Input should be greater than 0."),
        ("CHATRAIL_SEAL_KEY_FILE", "/no/such.pem", "CHATRAIL_SEAL_KEY_FILE /no/such.pem cannot be read: "),
        (
            "CHATRAIL_SEALS_FILE",
            "/nope/x",
            "CHATRAIL_SEALS_FILE /nope/x cannot be written: No such file or directory.",
        ),
        ("CHATRAIL_STREAM_BYTES_MAX", "9" * 20, f"CHATRAIL_STREAM_BYTES_MAX is '{'9' * 20}': Input should be less"),
        ("CHATRAIL_STREAM_REPLICAS", "3", "CHATRAIL_STREAM_REPLICAS=3 needs as many nodes"),
        ("CHATRAIL_STREAM_REPLICAS", "many", "CHATRAIL_STREAM_REPLICAS is 'many': Input should be a valid integer"),
        *(
            (
                f"CHATRAIL_{service}_DATABASE_URL",
                url,
                f"CHATRAIL_{service}_DATABASE_URL: a database is at postgresql://",
            )
            for service in ("LEDGER", "QUOTA")
            for url in ("mysql://user:secret@host/name", "sqlite://relative")
        ),
    ],
)
async def test_a_setting_of_any_part_that_makes_no_sense_is_told_before_anything_starts(
    tmp_path: Path, name: str, value: str, told: str
) -> None:
    said = await refusal(CHATRAIL_DATA=str(tmp_path), CHATRAIL_PORT=str(free_port()), **{name: value})
    assert said.startswith(told)
    assert "secret" not in said
    assert not (tmp_path / "supervisord.conf").exists()


async def test_a_data_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for data in (tmp_path / "file", tmp_path / "file" / "data", Path("/proc/data")):
        assert (await refusal(CHATRAIL_DATA=str(data))).startswith(f"The data folder {data} cannot be written (")


@pytest.mark.parametrize(
    ("store", "cluster", "target"), [("nats", "true", "make run,"), ("nats-1", "", "make run-cluster,")]
)
async def test_the_store_of_another_kind_of_broker_is_left_alone(
    tmp_path: Path, store: str, cluster: str, target: str
) -> None:
    (tmp_path / store).mkdir()
    said = await refusal(CHATRAIL_DATA=str(tmp_path), CHATRAIL_NATS_CLUSTER=cluster, CHATRAIL_PORT=str(free_port()))
    assert target in said
    assert "choose another: CHATRAIL_DATA=" in said


async def test_a_broker_of_ones_own_is_not_made_a_cluster(tmp_path: Path) -> None:
    url = "nats://127.0.0.1:4222"
    assert "CHATRAIL_NATS_URL" in await refusal(
        CHATRAIL_DATA=str(tmp_path), CHATRAIL_NATS_CLUSTER="1", CHATRAIL_NATS_URL=url
    )


async def test_a_plans_file_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    plans = tmp_path / "plans.toml"
    plans.write_text("default = ")
    said = await refusal(CHATRAIL_DATA=str(tmp_path), CHATRAIL_PORT=str(free_port()), CHATRAIL_PLANS=str(plans))
    assert said.startswith(f"The plans file {plans} cannot be read: ")


@pytest.mark.parametrize(
    ("python", "found"),
    [("echo Python 3.9.2", "is 3.9.2"), ("echo Python 2.7.18 >&2", "is 2.7.18"), ("exit 127", "cannot be found")],
)
def test_make_names_a_python_that_is_too_old(tmp_path: Path, python: str, found: str) -> None:
    fake = tmp_path / "python3"
    fake.write_text(f"#!/bin/sh\n{python}\n")
    fake.chmod(0o755)
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(PROJECT / name, tmp_path)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    ended = subprocess.run(
        ["make", "run"],
        cwd=tmp_path,
        env=environment(PATH=path),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode != 0
    assert ended.stderr.splitlines()[0] == (
        f"ChatRail needs Python 3.11 or newer; python3 {found}. Name another: make run PYTHON=python3.12"
    )
    assert not (tmp_path / ".venv").exists()


def test_make_says_what_it_takes_where_packages_cannot_be_had(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(PROJECT / name, tmp_path)
    ended = subprocess.run(
        ["make", "run"],
        cwd=tmp_path,
        env=environment(PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="", PIP_NO_INDEX="1"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode != 0
    assert "The packages of requirements.lock could not be installed, for the reason above." in ended.stderr
    assert "then make run again." in ended.stderr
    assert not (tmp_path / ".venv/installed-run").exists()
