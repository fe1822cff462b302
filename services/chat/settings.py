from typing import Literal

from pydantic import Field, SecretStr

from shared.server import ServiceSettings


class Settings(ServiceSettings):
    identity: Literal["open"] = Field(default="open", description="open: the caller's userId is believed")
    operator_key: SecretStr | None = Field(default=None, description="what back ends and operators present")
    anthropic_api_key: SecretStr = Field(default=SecretStr(""), validation_alias="ANTHROPIC_API_KEY")
    anthropic_base_url: str = Field(default="https://api.anthropic.com", validation_alias="ANTHROPIC_BASE_URL")
    simulated: bool = Field(default=False, description="the answers come from the stand-in, and the page says so")
    model: str = Field(default="claude-haiku-4-5", description="for callers that name none")
    tokens_max: int = Field(default=4096, ge=1, le=128_000, description="output of callers that name no maxTokens")
    on_disconnect: Literal["stop", "drain"] = Field(
        default="stop", description="what a closed browser does to Claude"
    )
    cors_origins: str = Field(default="", description="origins, comma-separated, that may embed the rail")
