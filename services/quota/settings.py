from pydantic import Field

from shared.settings import DatabaseUrl, ServiceSettings, sqlite_url


class Settings(ServiceSettings):
    quota_database_url: DatabaseUrl = Field(default="", description="SQLite under the data folder when empty")

    @property
    def database_url(self) -> str:
        return self.quota_database_url or sqlite_url(self.data, "quota.db")
