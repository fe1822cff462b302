from pathlib import Path

from pydantic import Field

from shared.settings import DatabaseUrl, ServiceSettings, sqlite_url


class Settings(ServiceSettings):
    ledger_database_url: DatabaseUrl = Field(default="", description="SQLite under the data folder when empty")

    quota_database_url: DatabaseUrl = Field(default="", description="Quota's, which an audit reads")

    seal_every_s: float = Field(default=60.0, gt=0, description="Between two seals, while there is something new")
    seal_key_file: Path | None = Field(default=None, description="PEM: an Ed25519 key that signs, and earlier ones")
    seals_file: Path | None = Field(default=None, description="Where each seal is written down, too")

    @property
    def database_url(self) -> str:
        return self.ledger_database_url or sqlite_url(self.data, "ledger.db")

    @property
    def quota_url(self) -> str:
        return self.quota_database_url or sqlite_url(self.data, "quota.db")
