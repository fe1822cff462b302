"""What an operator sets, read from the environment, and said in one sentence where it makes no sense."""

import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import Misconfigured
from shared.plans import PLANS_FILE

PREFIX = "CHATRAIL_"


class Environment(BaseSettings):
    """Variables CHATRAIL_…; an empty one counts as absent. A field that is not to be shown has `repr=False`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, env_ignore_empty=True)

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


class ServiceSettings(Environment):
    """Where this process listens, and where its data, its broker and the plans are."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    data: Path = Path("data")
    nats_url: str = Field(default="nats://127.0.0.1:4222", repr=False)
    plans: Path = PLANS_FILE
    archive: Path | None = None

    @property
    def archive_folder(self) -> Path:
        """Where what was archived is, or would be."""
        return (self.archive or self.data / "archive").absolute()


class StreamSettings(Environment):
    """What the stream is made with."""

    nats_url: str = Field(default="nats://127.0.0.1:4222", repr=False)
    stream_bytes_max: int = Field(default=8 * 1024**3, ge=1)
    stream_replicas: int = Field(default=1, ge=1, le=5)


def _database(url: str) -> str:
    if url and not re.match(r"(sqlite|postgres(ql)?)(\+\w+)?://", url):
        raise ValueError("a database is at postgresql://… or sqlite:///…, and no other can be used")
    return url


# It may hold a password.
DatabaseUrl = Annotated[str, AfterValidator(_database), Field(repr=False)]


def sqlite_url(data: Path, name: str) -> str:
    return f"sqlite:///{data.absolute() / name}"
