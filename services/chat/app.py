"""Chat, put together: read from top to bottom."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from functools import partial

import structlog
from fastapi import FastAPI
from fastapi_swagger import patch_fastapi  # type: ignore[import-untyped]
from prometheus_client import Gauge

from services.chat import identity, loopback, problems
from services.chat.adjustments import Adjustments
from services.chat.claude import Claude
from services.chat.cors import Cors
from services.chat.deadline import Deadline
from services.chat.generation import Parts, Policies
from services.chat.generations import Generations
from services.chat.head import Head
from services.chat.limits import BodyLimit
from services.chat.outbox import Outbox
from services.chat.publisher import Publisher
from services.chat.push import Watchers
from services.chat.quota import Quota
from services.chat.reports import Reports
from services.chat.routes import adjustments, chat, examples, explain, page, plans, usage
from services.chat.settings import Settings
from services.chat.subscriptions import Subscriptions
from shared.broker import Connection, cancelled, close, connect_options
from shared.errors import Unavailable
from shared.guards import bus_missing, essential, watch_bus
from shared.plans import Plans
from shared.telemetry import Missing, install_probes

log = structlog.get_logger()
LAST_FLUSH_S = 5.0
OUTBOX_EVENTS = Gauge("chatrail_outbox_events", "Events in the outbox, those of generations under way included")
OUTBOX_OLDEST_S = Gauge(
    "chatrail_outbox_oldest_seconds", "How long the oldest settled event has waited for the stream"
)


def create_app(settings: Settings) -> FastAPI:
    app = FastAPI(
        title="ChatRail",
        version="1",
        summary="Metered Claude chat: every token counted once, and the person who chats sees what is left.",
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        # To where a proxy in front would not be: the address is made of what it sends on.
        redirect_slashes=False,
        responses=examples.PROBLEM,
    )
    app.state.settings = settings
    app.state.plans = Plans.load(settings.plans)
    problems.install(app)
    for routes in (chat, usage, explain, adjustments, plans, page):
        app.include_router(routes.router)
    # FastAPI's own page loads its viewer from another site; this one brings it along.
    patch_fastapi(app, redirect_from_root_to_docs=False)
    install_probes(app, partial(_missing, app))
    app.mount("/web", page.web_files)
    app.add_middleware(BodyLimit)
    app.add_middleware(
        Cors,
        allow_origins=[origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()],
        allow_origin_regex=loopback.ORIGIN if settings.identity == "open" else None,
        allow_methods=["GET", "HEAD", "POST", "PUT"],
        allow_headers=["Authorization", "Idempotency-Key"],
        # A page of another network whose origin is named may ask as one of this network may.
        allow_private_network=True,
        expose_headers=["Retry-After", "X-Next-Cursor", "RateLimit", "RateLimit-Policy"],
    )
    if settings.identity == "open":
        app.add_middleware(identity.LocalHost)
    app.add_middleware(Head)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    api_key, base_url = settings.claude
    claude = Claude(api_key=api_key, base_url=base_url, model=settings.model, idle_s=settings.claude_idle_s)
    policies = Policies(on_disconnect=settings.on_disconnect, claude_total_s=settings.claude_total_s)
    outbox = Outbox(settings.data / "outbox.db", events_max=settings.outbox_events_max)
    OUTBOX_EVENTS.set_function(lambda: outbox.events)
    OUTBOX_OLDEST_S.set_function(lambda: outbox.oldest_s)
    # Calls on one, what must not be lost on the other: neither waits behind the other, nor falls with it.
    nc, events = Connection(), Connection()
    quota = Quota(nc)
    publisher = Publisher(events, outbox, on_sent=quota.published)
    generations = Generations(Parts(claude, quota, outbox, publisher, policies))
    watchers = Watchers(nc, quota)
    app.state.nc, app.state.quota, app.state.generations, app.state.watchers = nc, quota, generations, watchers
    app.state.events, app.state.outbox, app.state.publisher = events, outbox, publisher
    app.state.reports = Reports(events, outbox, publisher, quota)
    app.state.adjustments = Adjustments(events)
    app.state.subscriptions = Subscriptions(events)

    def end_streams() -> None:
        generations.close()
        watchers.close()
        quota.waiting_room.close()
        asyncio.get_running_loop().call_later(settings.grace_s, generations.interrupt)

    app.state.end_streams = end_streams
    recovered = outbox.recover()
    for event in recovered:
        quota.remember(event)
    publisher.offer(recovered)
    if recovered:
        log.warning("outbox_recovered", events=len(recovered))
    connecting = [
        essential(asyncio.create_task(_connect(client, settings), name="the guard of the bus"))
        for client in (nc, events)
    ]
    publishing = essential(asyncio.create_task(publisher.run(), name="the publisher"))
    yield
    await generations.stop()
    await cancelled(publishing)
    await _flush(publisher, app.state.hurry)
    await publisher.close()
    await cancelled(*connecting)
    await asyncio.gather(close(nc), close(events))
    await claude.close()
    outbox.close()


async def _flush(publisher: Publisher, hurry: asyncio.Event) -> None:
    """Until the stream has everything, or for as long as we may: the outbox keeps what it does not take in time."""

    async def flush() -> None:
        while publisher.backlog and await publisher.flush():
            pass

    flushing, hurrying = asyncio.create_task(flush()), asyncio.create_task(hurry.wait())
    await asyncio.wait([flushing, hurrying], timeout=LAST_FLUSH_S, return_when=asyncio.FIRST_COMPLETED)
    await cancelled(flushing, hurrying)


async def _connect(nc: Connection, settings: Settings) -> None:
    """In the background: until the broker answers, chat says 503 and /readyz says why."""
    await nc.connect(pending_size=0, **connect_options(settings.nats_url, "chat"))
    await watch_bus(nc)


async def _missing(app: FastAPI) -> Missing:
    absent = {
        "nats": bus_missing(app.state.events),
        "quota": _missing_when(app.state.quota.usage("readiness", Deadline())),
        "outbox": _missing_when(app.state.outbox.admit()),
        "stream": _stream_missing(app.state.publisher),
    }
    reasons = await asyncio.gather(*absent.values())
    return {part: reason for part, reason in zip(absent, reasons, strict=True) if reason}


async def _stream_missing(publisher: Publisher) -> str | None:
    """A broker whose disk was full answers all but this."""
    return f"takes no events; {publisher.backlog} wait for it" if publisher.is_refused else None


async def _missing_when(asking: Awaitable[object]) -> str | None:
    try:
        await asking
    except Unavailable as error:
        return error.detail
    return None
