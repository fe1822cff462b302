"""What an operator sets, read from the environment, and said in one sentence where it makes no sense."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import Misconfigured
from shared.plans import PLANS_FILE

PREFIX = "CHATRAIL_"
# What brokers and databases count with.
INT64_MAX = 2**63 - 1


class Environment(BaseSettings):
    """Variables CHATRAIL_…; an empty one counts as absent. A field that is not to be shown has `repr=False`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, env_ignore_empty=True, allow_inf_nan=False)

    @classmethod
    def read(cls) -> Self:
        """Raises Misconfigured, which names each variable that makes no sense, and why."""
        try:
            return cls()
        except ValidationError as error:
            raise Misconfigured(" ".join(cls._told(problem) for problem in error.errors())) from None

    @classmethod
    def _told(cls, problem: Any) -> str:
        what = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            return f"{what}."
        field = str(problem["loc"][0])
        name = field if field.isupper() else f"{PREFIX}{field.upper()}"
        known = cls.model_fields.get(field)
        shown = f" is {problem['input']!r}" if known and known.repr else ""
        return f"{name}{shown}: {what}."


def _parts(url: str) -> SplitResult | None:
    """None where no program could connect to it. The parser's own words are not told: they repeat passwords."""
    try:
        parts = urlsplit(url)
        place = _PLACE.fullmatch(parts.netloc.rpartition("@")[2])
        usable = url.isprintable() and " " not in url and place and parts.port != 0 and _is_host(parts.hostname or "")
    except ValueError:
        return None
    return parts if usable else None


# Of [::1]host:port the parser says that it is ::1.
_PLACE = re.compile(r"(\[[^][]+\]|[^][:]+)(:[0-9]*)?")
# In other letters a name is written xn--…: not all programs agree on how to write it for you.
_NAME = re.compile(r"(\w([\w-]*\w)?(\.|$))+", re.ASCII)


def _is_host(host: str) -> bool:
    """A name or an address; raises ValueError or says False where it is neither."""
    if ":" in host or host.rpartition(".")[2].isdecimal():
        return bool(ipaddress.ip_address(host))
    return bool(_NAME.fullmatch(host) and host.encode("idna").decode("idna"))


def _brokers(urls: str) -> str:
    for url in urls.split(","):
        node = url.strip() if "://" in url else f"nats://{url.strip()}"
        if not (_parts(node) and node.startswith(("nats://", "tls://"))):
            raise ValueError(
                "a broker is at nats://host:port or tls://host:port, and a cluster at several, comma-separated"
            )
    return urls


def _http(url: str) -> str:
    parts = _parts(url)
    if not parts or parts.scheme not in ("http", "https"):
        raise ValueError("it must be an address as https://host or http://host:port/path")
    if "@" in parts.netloc:
        raise ValueError("it cannot have a user or a password in it, because the key is what is presented")
    if "?" in url or "#" in url:
        raise ValueError("it must end with its path, without a ? or #, because paths are put behind it")
    return url


def _header(secret: SecretStr) -> SecretStr:
    value = secret.get_secret_value()
    if not (value.isascii() and value.isprintable()):
        raise ValueError("it must be printable ASCII, without line breaks, because it is sent in a header")
    return secret


def _database(url: str) -> str:
    postgres = _POSTGRES.fullmatch(url)
    is_postgres = postgres and 1 <= int(postgres["port"] or 5432) <= 65535
    if url and not (is_postgres or _SQLITE.fullmatch(url)):
        raise ValueError(
            "a database is at postgresql://user:password@host:port/name, with %40 for an @ in the password, "
            "or at sqlite:///file, and no other can be used"
        )
    return url


# As SQLAlchemy reads them, which is too much to load for this.
_SQLITE = re.compile(r"sqlite(\+pysqlite)?:///(?!:memory:)[^?\0-\x1f][^\0-\x1f]*")
_POSTGRES = re.compile(
    r"""postgres(ql)?(\+psycopg)?://
        (?>([^:/@\0-\x1f]*(:[^@\0-\x1f]*)?@)?)
        (\[[\w:.%]+\]|[^][:/?@\s]+)?(:(?P<port>[0-9]{1,5}))?
        (/[^?\s]*(\?\S*)?|\?[^@\s]*)?""",
    re.VERBOSE,
)

# They may hold passwords: a field of such a type has `repr=False`.
DatabaseUrl = Annotated[str, AfterValidator(_database), Field(repr=False)]
NatsUrl = Annotated[str, AfterValidator(_brokers)]
HttpUrl = Annotated[str, AfterValidator(_http)]
HeaderSecret = Annotated[SecretStr, AfterValidator(_header)]


class ServiceSettings(Environment):
    """Where this process listens, and where its data, its broker and the plans are."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    data: Path = Path("data")
    nats_url: NatsUrl = Field(default="nats://127.0.0.1:4222", repr=False)
    plans: Path = PLANS_FILE
    archive: Path | None = None

    @property
    def archive_folder(self) -> Path:
        """Where what was archived is, or would be."""
        return (self.archive or self.data / "archive").absolute()


class StreamSettings(Environment):
    """What the stream is made with."""

    nats_url: NatsUrl = Field(default="nats://127.0.0.1:4222", repr=False)
    stream_bytes_max: int = Field(default=8 * 1024**3, ge=16 * 1024, le=INT64_MAX)
    stream_replicas: int = Field(default=1, ge=1, le=5)


def sqlite_url(data: Path, name: str) -> str:
    return f"sqlite:///{data.absolute() / name}"
