"""The one way to each database, where the stores do not already show it."""

from sqlalchemy import Connection, make_url, select

from shared.database import Database
from tests.fixtures import Postgres


def one(db: Connection) -> int:
    return int(db.execute(select(1)).scalar_one())


async def test_connections_that_the_server_closed_cost_nobody_an_error(postgres: Postgres) -> None:
    with postgres.new_database() as url:
        database = Database(url)
        assert (await database.read(one), await database.write(one)) == (1, 1)
        name = make_url(url).database
        postgres.execute(
            f"DO $$ BEGIN PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'; END $$"
        )
        assert (await database.read(one), await database.write(one)) == (1, 1)
        await database.close()
