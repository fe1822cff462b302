"""A real browser for the rail: Debian's Chromium, driven by playwright."""

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
from playwright.async_api import BrowserContext, Page, async_playwright, expect

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
]

expect.set_options(timeout=15_000)


@pytest.fixture
def chromium() -> Path:
    if not CHROMIUM.exists():
        left_out(f"{CHROMIUM} is missing: install Chromium to test the rail")
    return CHROMIUM


@pytest.fixture
async def context(chromium: Path) -> AsyncIterator[BrowserContext]:
    """One person's browser: its tabs share local storage."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        context = await browser.new_context(locale="en-GB", timezone_id="Europe/Vienna")
        yield context
        await browser.close()


@pytest.fixture
async def page(context: BrowserContext) -> Page:
    return await context.new_page()


@pytest.fixture
def user_id() -> str:
    """Somebody the stack has never seen."""
    return f"user_{uuid4().hex}"
