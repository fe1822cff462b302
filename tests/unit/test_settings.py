"""What an operator may set, and what is told in words; a value that may hold a secret is never among them."""

import os

import pytest
from sqlalchemy import make_url

from deploy.settings import Settings as StackSettings
from services.chat.settings import Settings as ChatSettings
from services.ledger.settings import Settings as LedgerSettings
from shared.errors import Misconfigured
from shared.settings import Environment, ServiceSettings, StreamSettings
from tests.stack import PROJECT


class Read:
    """Settings as they are read where these variables are set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, settings: type[Environment], **variables: str) -> Environment:
        for name, value in variables.items():
            self._monkeypatch.setenv(name, value)
        return settings.read()

    def told(self, settings: type[Environment], **variables: str) -> str:
        with pytest.raises(Misconfigured) as problem:
            self(settings, **variables)
        said = str(problem.value)
        assert said.startswith(next(iter(variables)))
        assert "secret" not in said
        assert "\n" not in said
        return said


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    for name in os.environ:
        if name.startswith(("CHATRAIL_", "ANTHROPIC_")):
            monkeypatch.delenv(name)
    return Read(monkeypatch)


@pytest.mark.parametrize("settings", [ChatSettings, StackSettings])
@pytest.mark.parametrize(
    "url",
    [
        "https://api.anthropic.com",
        "http://127.0.0.1:9",
        "http://[::1]:8080",
        "http://claude_proxy:8080/prefix/",
        "https://xn--bcher-kva.example",
    ],
)
def test_the_provider_may_be_at_any_http_address(read: Read, settings: type[Environment], url: str) -> None:
    found = read(settings, ANTHROPIC_BASE_URL=url)
    assert found.model_dump()["anthropic_base_url"] == url


@pytest.mark.parametrize("settings", [ChatSettings, StackSettings])
@pytest.mark.parametrize(
    "url",
    [
        "notaurl",
        "ftp://host",
        "http://",
        "https:///path",
        "http://host:99999",
        "http://host:0",
        "http://host:secret",
        "http://ho st",
        "http://host\n",
        "http://[::1",
        "http://[secret]",
        "http://[::1]host",
        "http://1.2.3.999",
        "http://a..b",
        "http://a-.b",
        "http://bü.cher",
        "http://a\\b",
    ],
)
def test_an_address_at_which_no_provider_can_be_is_told(read: Read, settings: type[Environment], url: str) -> None:
    assert "must be an address as https://host" in read.told(settings, ANTHROPIC_BASE_URL=url)


@pytest.mark.parametrize("url", ["http://user:secret@host", "https://secret@host/path"])
def test_a_password_in_the_address_of_the_provider_is_told(read: Read, url: str) -> None:
    assert "cannot have a user or a password" in read.told(StackSettings, ANTHROPIC_BASE_URL=url)


@pytest.mark.parametrize("settings", [ChatSettings, StackSettings])
@pytest.mark.parametrize("url", ["http://x/?key=secret", "https://host/v?", "https://host/v#part", "http://x?q"])
def test_an_address_of_the_provider_has_nothing_behind_its_path(
    read: Read, settings: type[Environment], url: str
) -> None:
    told = read.told(settings, ANTHROPIC_BASE_URL=url)
    assert told == "ANTHROPIC_BASE_URL: it must end with its path, without a ? or #, because paths are put behind it."


def test_a_model_that_claude_cannot_have_is_told(read: Read) -> None:
    for model in ("nope", "claude-\n"):
        assert "have names such as claude-haiku-4-5" in read.told(ChatSettings, CHATRAIL_MODEL=model)
    assert "at most 128" in read.told(ChatSettings, CHATRAIL_MODEL="claude-" * 20)
    assert read(ChatSettings, CHATRAIL_MODEL="claude-next-1").model_dump()["model"] == "claude-next-1"
    elsewhere = read(ChatSettings, CHATRAIL_MODEL="eu.anthropic/one", ANTHROPIC_BASE_URL="http://gateway")
    assert elsewhere.model_dump()["model"] == "eu.anthropic/one"


@pytest.mark.parametrize("settings", [ChatSettings, StackSettings])
@pytest.mark.parametrize("key", ["sk-secret\n", "sk-\r\nsecret", "sk-secret-ü", "sk-secret\x7f"])
def test_a_key_that_no_header_can_carry_is_told(read: Read, settings: type[Environment], key: str) -> None:
    assert "must be printable ASCII" in read.told(settings, ANTHROPIC_API_KEY=key)


@pytest.mark.parametrize("key", ["secret\n", "\nsecret", "sec\x01ret", "secret ", "secret\x7f", "secret\x85"])
def test_an_operator_key_that_nobody_can_present_is_told(read: Read, key: str) -> None:
    told = read.told(ChatSettings, CHATRAIL_OPERATOR_KEY=key)
    assert told.startswith("CHATRAIL_OPERATOR_KEY: it must be printable")


@pytest.mark.parametrize("key", ["a key", "schlüssel", "~" * 500])
def test_an_operator_key_may_be_any_text(read: Read, key: str) -> None:
    assert read(ChatSettings, CHATRAIL_OPERATOR_KEY=key).model_dump()["operator_key"].get_secret_value() == key


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (ChatSettings, "CHATRAIL_CLAUDE_IDLE_S"),
        (ChatSettings, "CHATRAIL_CLAUDE_TOTAL_S"),
        (ChatSettings, "CHATRAIL_GRACE_S"),
        (LedgerSettings, "CHATRAIL_SEAL_EVERY_S"),
        (StackSettings, "CHATRAIL_STAND_IN_DELAY_MS"),
    ],
)
@pytest.mark.parametrize("endless", ["inf", "-inf", "nan", "1e999"])
def test_a_time_has_an_end(read: Read, settings: type[Environment], name: str, endless: str) -> None:
    assert f"{name} is '{endless}': Input should be" in read.told(settings, **{name: endless})


@pytest.mark.parametrize("settings", [StackSettings, ServiceSettings, StreamSettings])
@pytest.mark.parametrize(
    "url",
    [
        "nats://127.0.0.1:4222",
        "nats://user:p%40ss@host",
        "token@host:4222",
        "tls://host:4222",
        "host",
        "[::1]:4222",
        "nats://one:4222, nats://two:4222,three",
    ],
)
def test_a_broker_may_be_where_its_client_finds_it(read: Read, settings: type[Environment], url: str) -> None:
    assert read(settings, CHATRAIL_NATS_URL=url).model_dump()["nats_url"] == url


@pytest.mark.parametrize("settings", [StackSettings, ServiceSettings, StreamSettings])
@pytest.mark.parametrize(
    "url",
    [
        "nats://127.0.0.1:secret",
        "nats://user:secret/@host:4222",
        ":::",
        "http://host",
        "ws://host",
        "NATS://host",
        "nats://",
        "nats://host:0",
        "nats://[::1]host:4222",
        "nats://host:65536",
        "nats://one:4222,",
        "nats://one:4222,http://user:secret@two",
    ],
)
def test_an_address_at_which_no_broker_can_be_is_told(read: Read, settings: type[Environment], url: str) -> None:
    assert "a broker is at nats://host:port" in read.told(settings, CHATRAIL_NATS_URL=url)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///data/ledger.db",
        "sqlite:////tmp/with a space/ü.db",
        "postgresql://ledger@ledger-db/ledger",
        "postgresql+psycopg://user:p%40ss@[::1]:5432/name",
        "postgres://host",
        "postgresql:///name?host=/var/run/postgresql",
        "postgresql://user:a/b#c?d@host:5432/name?sslmode=require&options=-c%20work_mem=1MB",
    ],
)
def test_a_database_may_be_where_its_driver_finds_it(read: Read, url: str) -> None:
    assert make_url(url).get_backend_name() in ("sqlite", "postgresql", "postgres")
    assert read(LedgerSettings, CHATRAIL_LEDGER_DATABASE_URL=url).model_dump()["ledger_database_url"] == url


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "sqlite+foo:///x",
        "sqlite://relative",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "mysql://user:secret@host/name",
        "postgresql+foo://user:secret@host/name",
        "postgresql://host:/name",
        "postgresql://host:port/name",
        "postgresql://host:0/name",
        "postgresql://host:65536/name",
        "postgresql://user:p@secret@host/name",
        "postgresql://ho st/name",
        "postgresql://?user@host:secret",
        "postgresql://[::1/name",
        "postgresql://host/name\n",
    ],
)
def test_an_address_at_which_no_database_can_be_is_told(read: Read, url: str) -> None:
    assert "a database is at postgresql://" in read.told(LedgerSettings, CHATRAIL_LEDGER_DATABASE_URL=url)


@pytest.mark.parametrize(
    "origins",
    [
        "https://shop.example",
        "https://shop.example:8443, http://intranet",
        "http://[::1]:5173",
        "chrome-extension://abcdef",
        "http://shop.example:443,",
    ],
)
def test_origins_are_named_as_browsers_send_them(read: Read, origins: str) -> None:
    assert read(ChatSettings, CHATRAIL_CORS_ORIGINS=origins).model_dump()["cors_origins"] == origins


@pytest.mark.parametrize(
    "origins",
    [
        "*",
        "null",
        "notanorigin",
        "https://shop.example/",
        "https://Shop.example",
        "https://shop.example:443",
        "http://shop.example:80",
        "https://user@shop.example",
        "https://shop.example,shop.example",
        "https://shop.example:65536",
    ],
)
def test_an_origin_that_no_browser_sends_is_told(read: Read, origins: str) -> None:
    assert f"is '{origins}': each origin is" in read.told(ChatSettings, CHATRAIL_CORS_ORIGINS=origins)


@pytest.mark.parametrize(
    ("settings", "name"),
    [(StreamSettings, "CHATRAIL_STREAM_BYTES_MAX"), (ChatSettings, "CHATRAIL_OUTBOX_EVENTS_MAX")],
)
def test_a_number_that_nobody_can_count_to_is_told(read: Read, settings: type[Environment], name: str) -> None:
    read(settings, **{name: str(2**63 - 1)})
    assert "less than or equal to 9223372036854775807" in read.told(settings, **{name: str(2**63)})


def test_gibibytes_taken_for_bytes_are_told(read: Read) -> None:
    assert "greater than or equal to 16384" in read.told(StreamSettings, CHATRAIL_STREAM_BYTES_MAX="8")


def test_a_replica_needs_a_node(read: Read) -> None:
    said = read.told(StackSettings, CHATRAIL_STREAM_REPLICAS="3")
    assert "has 1. Name a cluster of your own (CHATRAIL_NATS_URL), or start one: make run-cluster." in said
    read(StackSettings, CHATRAIL_NATS_URL="nats://one,nats://two,nats://three")


def test_a_cluster_has_no_more_replicas_than_nodes(read: Read) -> None:
    read(StackSettings, CHATRAIL_NATS_CLUSTER="1", CHATRAIL_STREAM_REPLICAS="3")
    assert "has 3. Name a cluster of your own" in read.told(StackSettings, CHATRAIL_STREAM_REPLICAS="5")


def test_compose_passes_on_what_an_operator_may_set_of_chat() -> None:
    of_compose = {"host", "port", "data", "nats_url", "plans", "archive", "identity", "stand_in_url"}
    handed_on = (PROJECT / "deploy/compose.yml").read_text(encoding="utf-8").splitlines()
    for name in ChatSettings.model_fields.keys() - of_compose:
        variable = name.upper() if name.startswith("anthropic_") else f"CHATRAIL_{name.upper()}"
        assert f"      {variable}:" in handed_on
