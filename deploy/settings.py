"""What an operator sets for the local stack."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from shared.settings import Environment, HeaderSecret, HttpUrl, NatsUrl

LOOPBACK = "127.0.0.1"


class Settings(Environment):
    """Everything else is the services' own."""

    host: str = LOOPBACK
    port: int = Field(default=8000, ge=1, le=65535)
    data: Path = Path("data")
    plans: Path | None = None
    archive: Path | None = None
    nats_url: NatsUrl | None = Field(default=None, repr=False)
    # Three nodes with replicated streams, instead of one.
    nats_cluster: bool = False
    stream_replicas: int = Field(default=1, ge=1, le=5)
    # Before each delta of the stand-in's: about the pace of a provider.
    stand_in_delay_ms: float = Field(default=15.0, ge=0)
    anthropic_api_key: HeaderSecret | None = Field(default=None, validation_alias="ANTHROPIC_API_KEY")
    anthropic_base_url: HttpUrl | None = Field(default=None, validation_alias="ANTHROPIC_BASE_URL", repr=False)

    @model_validator(mode="after")
    def _one_broker(self) -> Self:
        if self.nats_url and self.nats_cluster:
            raise ValueError("CHATRAIL_NATS_URL names a broker of your own, which make run-cluster does not start")
        return self

    @model_validator(mode="after")
    def _a_replica_a_node(self) -> Self:
        if self.nodes and self.stream_replicas > self.nodes:
            way_out = "Name a cluster of your own (CHATRAIL_NATS_URL)"
            if self.nodes == 1:
                way_out += ", or start one: make run-cluster"
            raise ValueError(
                f"CHATRAIL_STREAM_REPLICAS={self.stream_replicas} needs as many nodes, and the broker that is "
                f"started here has {self.nodes}. {way_out}"
            )
        return self

    @property
    def nodes(self) -> int:
        """Of the broker that is started here."""
        return 0 if self.nats_url else 3 if self.nats_cluster else 1

    @property
    def simulated(self) -> bool:
        """A base URL that is named is used as it is, with a key or without."""
        return not (self.anthropic_api_key or self.anthropic_base_url)

    @property
    def url(self) -> str:
        """Where a browser on this machine finds chat, also when it listens on every address."""
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.host, self.host)  # noqa: S104 - compared, never bound
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
