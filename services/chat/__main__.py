"""python -m services.chat serve"""

import typer

from services.chat.app import create_app
from services.chat.settings import Settings
from shared.server import serve as run

cli = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


@cli.callback()
def commands() -> None:
    """Chat's commands: serve."""


@cli.command()
def serve() -> None:
    """Answer the HTTP API and the page until told to stop."""
    run("chat", Settings, create_app)


if __name__ == "__main__":
    cli()
