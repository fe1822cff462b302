"""A real browser for the rail: Debian's Chromium, driven by playwright."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect

from tests.left_out import left_out

CHROMIUM = Path("/usr/bin/chromium")
# Without a sandbox it starts in a container; the rest keeps it from calling home.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # One process less, and what it would be told: a third of the time.
    "--in-process-gpu",
]

expect.set_options(timeout=15_000)


@pytest.fixture(scope="package")
def chromium() -> Path:
    if not CHROMIUM.exists():
        left_out(f"{CHROMIUM} is missing: install Chromium to test the rail")
    return CHROMIUM


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def browser(chromium: Path) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        await browser.close()


@asynccontextmanager
async def profile(browser: Browser) -> AsyncIterator[BrowserContext]:
    # Without motion: to draw it takes a sixth of the time, and nobody looks.
    context = await browser.new_context(locale="en-GB", timezone_id="Europe/Vienna", reduced_motion="reduce")
    yield context
    await context.close()


@pytest_asyncio.fixture(loop_scope="session")
async def context(browser: Browser) -> AsyncIterator[BrowserContext]:
    """One person's browser: its tabs share local storage."""
    async with profile(browser) as context:
        yield context


@pytest_asyncio.fixture(loop_scope="session")
async def own_page(context: BrowserContext) -> Page:
    """A tab that the test may change for good."""
    return await context.new_page()


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def kept_page(browser: Browser) -> AsyncIterator[Page]:
    async with profile(browser) as context:
        yield await context.new_page()


@pytest_asyncio.fixture(loop_scope="session")
async def page(kept_page: Page) -> AsyncIterator[Page]:
    """A tab in which nobody has been before: a new one would take as long as most tests."""
    yield kept_page
    await kept_page.unroute_all()
    await kept_page.context.set_offline(False)
    await kept_page.evaluate("localStorage.clear(); sessionStorage.clear()")
    await kept_page.goto("about:blank")


@pytest.fixture
def user_id() -> str:
    """Somebody the stack has never seen."""
    return f"user_{uuid4().hex}"
