"""The description of the API as a front-end developer sees it, on a machine that reaches no other."""

import pytest
from playwright.async_api import Page, expect

from tests.stack import Stack

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_the_description_is_shown_without_another_site(page: Page, stack: Stack) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.goto(f"{stack.url}/docs")
    await expect(page.get_by_role("heading", name="ChatRail")).to_be_visible()
    await expect(page.get_by_text("/api/chat", exact=True)).to_be_visible()
    await expect(page.get_by_role("button", name="Authorize")).to_be_visible()  # with the operator's key
    assert [url for url in asked if not url.startswith((stack.url, "data:"))] == []
