import re
from typing import Literal, Self

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator

from services.chat.loopback import is_loopback
from shared.events import OnDisconnect
from shared.settings import INT64_MAX, HeaderSecret, HttpUrl, ServiceSettings

CLAUDE_URL = "https://api.anthropic.com"
_ORIGIN = re.compile(
    r"(?!http://[^/]*:80$|https://[^/]*:443$)"
    r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:(?P<port>[1-9]\d{0,4}))?"
)


def _is_origin(text: str) -> bool:
    origin = _ORIGIN.fullmatch(text)
    return origin is not None and int(origin["port"] or 443) <= 65535


class Settings(ServiceSettings):
    identity: Literal["open"] = Field(default="open", description="open: the caller's userId is believed")
    operator_key: SecretStr | None = Field(
        default=None, repr=False, description="what back ends and operators present"
    )
    anthropic_api_key: HeaderSecret | None = Field(default=None, validation_alias="ANTHROPIC_API_KEY")
    anthropic_base_url: HttpUrl | None = Field(default=None, validation_alias="ANTHROPIC_BASE_URL", repr=False)
    stand_in_url: HttpUrl | None = Field(
        default=None, repr=False, description="answers where there is neither key nor base URL"
    )
    model: str = Field(default="claude-haiku-4-5", max_length=128, description="for callers that name none")
    tokens_max: int = Field(default=4096, ge=1, le=128_000, description="output of callers that name no maxTokens")
    on_disconnect: OnDisconnect = Field(default="stop", description="what a closed browser does to Claude")
    claude_idle_s: float = Field(default=60, gt=0, description="how long Claude may be silent")
    # Shorter than quota's holds live (15 minutes): no generation outlives its hold.
    claude_total_s: float = Field(default=600, gt=0, le=840, description="how long Claude may take for an answer")
    grace_s: float = Field(default=5, ge=0, le=10, description="for answers under way when told to stop")
    outbox_events_max: int = Field(
        default=20_000, ge=1, le=INT64_MAX, description="beyond which what is new is refused"
    )
    cors_origins: str = Field(default="", description="origins, comma-separated, that may embed the rail")

    @field_validator("operator_key")
    @classmethod
    def _can_be_presented(cls, key: SecretStr | None) -> SecretStr | None:
        value = key.get_secret_value() if key else ""
        if not value.isprintable() or value != value.strip():
            raise ValueError(
                "it must be printable, with no line breaks and no spaces around it, because it is sent in a header"
            )
        return key

    @field_validator("model")
    @classmethod
    def _can_be_asked(cls, model: str, read: ValidationInfo) -> str:
        # Whether there is such a model only the provider knows; another than Claude's own may name them as it likes.
        is_at_claudes_own = read.data.get("anthropic_base_url", "") is None
        if not model.isprintable() or (is_at_claudes_own and not model.startswith("claude-")):
            raise ValueError("Claude's models have names such as claude-haiku-4-5")
        return model

    @field_validator("cors_origins")
    @classmethod
    def _as_browsers_send_them(cls, origins: str) -> str:
        # Compared with the header Origin, byte by byte. Not "*": any page would spend anybody's tokens.
        for origin in origins.split(","):
            if origin.strip() and not _is_origin(origin.strip()):
                raise ValueError(
                    "each origin is scheme://host or scheme://host:port, in small letters, without a path and "
                    "without the scheme's own port"
                )
        return origins

    @model_validator(mode="after")
    def _open_mode_is_for_this_machine(self) -> Self:
        # Anybody on the network could spend anybody's tokens.
        if self.identity == "open" and not is_loopback(self.host):
            raise ValueError(
                f"CHATRAIL_IDENTITY=open believes every caller, so chat does not listen on {self.host}. "
                "Set CHATRAIL_HOST=127.0.0.1"
            )
        return self

    @property
    def is_simulated(self) -> bool:
        """The answers come from the stand-in, and the page says so. A base URL that is named is used as it is."""
        return bool(self.stand_in_url) and not (self.anthropic_api_key or self.anthropic_base_url)

    @property
    def claude(self) -> tuple[str, str]:
        """(key, base URL) of the provider."""
        key = self.anthropic_api_key.get_secret_value() if self.anthropic_api_key else "simulated"
        return key, self.anthropic_base_url or (self.stand_in_url if self.is_simulated else None) or CLAUDE_URL
