"""python -m services.chat serve"""

import gc

# What is imported stays. Looked through meanwhile, again and again, it takes half as long again to start.
gc.disable()

import typer

from services.chat.app import create_app
from services.chat.settings import Settings
from shared.server import serve as run

gc.enable()

cli = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


@cli.callback()
def commands() -> None:
    """Chat's commands: serve."""


@cli.command()
def serve() -> None:
    """Answer the HTTP API and the page until told to stop."""
    run("chat", Settings.read, create_app)


if __name__ == "__main__":
    cli()
