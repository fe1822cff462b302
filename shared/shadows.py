"""Where tables are built anew, and how they change places with those in use: what both kinds of database can do."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from sqlalchemy import Connection, Table

Result = TypeVar("Result")
# SQL's name of a table that was in use, once another has taken its place.
Old = Callable[[str], str]
Adopt = Callable[[Connection, Old], None]

AT_IT = "Another replay of this database is at work."


class Lock(Protocol):
    """Nobody else writes to the tables. Committed at the end of its context, or nothing has happened."""

    # How long that was, in seconds, once it is over.
    held_s: float

    def exchange(self, add: Callable[[Connection], Result], adopt: Adopt) -> Result:
        """Put the new tables in place, with what `add` adds and `adopt` takes over from the old ones."""
        ...


class Shadow(Protocol):
    """Tables under construction. In each of its transactions the names of tables are theirs."""

    # What qualifies the tables in use.
    live: str
    # Whether to put the tables in place every row is written a second time.
    is_copied: bool

    def begin(self) -> AbstractContextManager[Connection]: ...

    def snapshot(self) -> AbstractContextManager[Connection]:
        """The same, and the tables in use as they were at its beginning."""
        ...

    def index(self, names: Sequence[str]) -> None:
        """To be called once everything is loaded: `names` are those that are needed from now on."""
        ...

    def write_live(self, work: Callable[[Connection], None]) -> None:
        """Beside the replay, in the database that is in use."""
        ...

    async def publish(self, tables: Sequence[Table]) -> None:
        """Bring what these tables have got since the last time to where it can be put in place."""
        ...

    def locked(self) -> AbstractContextManager[Lock]: ...

    async def clean(self) -> None:
        """Take away what was replaced, or left by a replay that died."""
        ...
