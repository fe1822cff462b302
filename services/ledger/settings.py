from pydantic import Field

from shared.database import sqlite_url
from shared.server import ServiceSettings


class Settings(ServiceSettings):
    ledger_database_url: str = Field(default="", description="SQLite under the data folder when empty")

    quota_database_url: str = Field(default="", description="Quota's, which an audit reads")

    @property
    def database_url(self) -> str:
        return self.ledger_database_url or sqlite_url(self.data, "ledger.db")

    @property
    def quota_url(self) -> str:
        return self.quota_database_url or sqlite_url(self.data, "quota.db")
