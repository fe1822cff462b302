"""Run the stand-in: `python -m deploy.claude --port 8010`."""

from argparse import ArgumentParser
from pathlib import Path

import uvicorn

from deploy.claude.app import ClaudeStandIn
from deploy.claude.given import Given


def main() -> None:
    parser = ArgumentParser(prog="python -m deploy.claude", description="A stand-in for Claude's Messages API.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--delay-ms", type=float, default=0.0, help="before each delta, unless told otherwise")
    parser.add_argument("--data", type=Path, help="a folder that keeps what was given across restarts")
    arguments = parser.parse_args()
    given = Given(arguments.data / "given.ndjson" if arguments.data else None)
    uvicorn.run(
        ClaudeStandIn(given, delay_s=arguments.delay_ms / 1000),
        host=arguments.host,
        port=arguments.port,
        lifespan="off",
        proxy_headers=False,
        access_log=False,
        log_level="warning",
        server_header=False,
        # Longer than any client keeps an idle connection, so that none is closed while it is being taken up again.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
    )


if __name__ == "__main__":
    main()
