"""The chat rail as the person who chats sees it: in a browser, on the real stack."""

import json
import re
from typing import Any, Protocol
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from playwright.async_api import BrowserContext, Locator, Page, Request, Route, expect

# One browser serves all tests; it lives in one event loop.
pytestmark = pytest.mark.asyncio(loop_scope="session")

LOCAL_NOTICE = "Counting locally: the server cannot be reached."
USAGE_CALLS = "**/api/usage**"
PUSH_CALLS = "**/api/usage/events?*"
CHAT_CALLS = "**/api/chat"
HIDDEN_MS = 5_000
SHOWN_MEMBERS = (
    "tier",
    "tokensUsed",
    "tokensLimit",
    "tokensRemaining",
    "period",
    "periodStart",
    "resetsAt",
    "upgradeTo",
)
SPENT = re.compile(r"^10[0-7](\.\d)?K monthly tokens remaining$")


class Stack(Protocol):
    url: str

    async def report(self, user_id: str, tokens: int) -> None: ...

    async def usage_reaches(self, user_id: str, tokens_used: int) -> None: ...


async def open_rail(page: Page, stack: Stack, user_id: str) -> None:
    await page.goto(f"{stack.url}/?userId={user_id}")


async def use(stack: Stack, user_id: str, tokens: int) -> None:
    if tokens:
        await stack.report(user_id, tokens)
        await stack.usage_reaches(user_id, tokens)


async def subscribe(page: Page, stack: Stack, user_id: str, tier: str) -> None:
    response = await page.request.put(f"{stack.url}/api/subscriptions/{user_id}", data={"tier": tier})
    assert response.ok, await response.text()


async def send(page: Page, text: str) -> None:
    await page.get_by_role("textbox").fill(text)
    await page.get_by_role("button", name="Send").click()


def bar(page: Page) -> Locator:
    return page.get_by_role("progressbar")


def line(page: Page) -> Locator:
    return page.locator("chat-rail .line")


def messages(page: Page, role: str) -> Locator:
    return page.get_by_role("log").locator(f"[data-role={role}] .text")


def is_push(request: Request) -> bool:
    return urlsplit(request.url).path == "/api/usage/events"


def server_events(*events: tuple[str, dict[str, Any]]) -> str:
    return "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)


async def compose(page: Page, text: str) -> None:
    """What an input method has so far of a word; nothing ends it."""
    session = await page.context.new_cdp_session(page)
    await page.get_by_role("textbox").focus()
    caret = {"selectionStart": len(text), "selectionEnd": len(text)}
    await session.send("Input.imeSetComposition", {"text": text, **caret})
    await session.detach()


async def turn_to(page: Page, *, is_seen: bool) -> None:
    """Bring the tab to the front, or another one: without a window, the browser never says so itself."""
    await page.evaluate(
        """(isSeen) => {
            Object.defineProperty(document, "hidden", { configurable: true, value: !isSeen });
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        is_seen,
    )


async def unreachable(route: Route) -> None:
    await route.abort("connectionrefused")


@pytest.mark.parametrize(
    ("tokens_used", "text", "percent_left", "level"),
    [
        (0, "108K monthly tokens remaining", "100", "green"),
        (8_094, "99.9K monthly tokens remaining", "92.5", "green"),
        (14_594, "93.4K monthly tokens remaining", "86.5", "green"),
        (90_000, "18K monthly tokens remaining", "16.7", "yellow"),
        (102_600, "5.4K monthly tokens remaining", "5", "red"),
        (107_001, "999 monthly tokens remaining", "0.9", "red"),
        (107_999, "1 monthly token remaining", "0", "red"),
    ],
)
async def test_the_rail_shows_what_is_left(
    page: Page, stack: Stack, user_id: str, *, tokens_used: int, text: str, percent_left: str, level: str
) -> None:
    await use(stack, user_id, tokens_used)
    await open_rail(page, stack, user_id)

    await expect(page.get_by_text(text, exact=True)).to_be_visible()
    await expect(bar(page)).to_have_attribute("aria-valuenow", percent_left)
    await expect(bar(page)).to_have_attribute("aria-valuemin", "0")
    await expect(bar(page)).to_have_attribute("aria-valuemax", "100")
    await expect(bar(page)).to_have_attribute("data-level", level)


@pytest.mark.parametrize(("tokens_used", "is_told"), [(86_399, False), (86_400, True), (90_000, True)])
async def test_from_the_first_alert_on_a_gentle_line_says_how_much_is_used(
    page: Page, stack: Stack, user_id: str, *, tokens_used: int, is_told: bool
) -> None:
    await use(stack, user_id, tokens_used)
    async with page.expect_response("**/api/plans"):
        await open_rail(page, stack, user_id)
    await expect(bar(page)).to_have_attribute(
        "aria-valuenow", str(round(100 - tokens_used / 1080, 1)).removesuffix(".0")
    )
    told = page.get_by_text(f"tokens are {tokens_used * 100 // 108_000}% used.")
    await expect(told).to_have_count(int(is_told))


async def test_at_the_limit_the_way_out_and_the_reset_are_shown(page: Page, stack: Stack, user_id: str) -> None:
    await use(stack, user_id, 108_000)
    await open_rail(page, stack, user_id)

    await expect(page.get_by_text("Upgrade to Pro")).to_be_visible()
    await expect(page.get_by_text("tokens remaining")).to_have_count(0)
    await expect(bar(page)).to_have_attribute("aria-valuenow", "0")
    await expect(bar(page)).to_have_attribute("data-level", "red")
    usage = await (await page.request.get(f"{stack.url}/api/usage?userId={user_id}")).json()
    await expect(page.locator("chat-rail time")).to_have_attribute("datetime", usage["resetsAt"])
    await expect(page.locator("chat-rail time")).to_have_text(re.compile(r"^1 \w+ 20\d\d"))


async def test_an_unlimited_plan_shows_infinity_and_a_full_bar(page: Page, stack: Stack, user_id: str) -> None:
    await open_rail(page, stack, user_id)
    await subscribe(page, stack, user_id, "enterprise")

    await expect(page.get_by_text("∞", exact=True)).to_be_visible()
    await expect(bar(page)).to_have_attribute("aria-valuenow", "100")
    await expect(bar(page)).to_have_attribute("data-level", "green")


async def test_a_message_streams_an_answer_and_moves_the_bar(page: Page, stack: Stack, user_id: str) -> None:
    await open_rail(page, stack, user_id)
    await expect(line(page)).to_have_text("108K monthly tokens remaining")
    question = "Tell me about rails. " * 200

    await send(page, question)

    await expect(messages(page, "user")).to_have_text(question.strip())
    await expect(messages(page, "assistant")).not_to_be_empty()
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    await expect(page.get_by_role("textbox")).to_have_value("")
    await expect(line(page)).to_have_text(SPENT)
    await expect(bar(page)).not_to_have_attribute("aria-valuenow", "100")


async def test_the_next_message_carries_the_conversation(page: Page, stack: Stack, user_id: str) -> None:
    await open_rail(page, stack, user_id)
    await send(page, "First")
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    answer = await messages(page, "assistant").text_content()

    async with page.expect_request(CHAT_CALLS) as request:
        await send(page, "Second")

    assert (await request.value).post_data_json == {
        "userId": user_id,
        "messages": [
            {"role": "user", "content": "First"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "Second"},
        ],
    }


async def test_enter_sends_and_shift_enter_starts_a_line(page: Page, stack: Stack, user_id: str) -> None:
    await open_rail(page, stack, user_id)
    box = page.get_by_role("textbox")
    await box.press_sequentially("one")
    await box.press("Shift+Enter")
    await box.press_sequentially("two")
    await expect(box).to_have_value("one\ntwo")

    await box.press("Enter")

    await expect(messages(page, "user")).to_have_text("one\ntwo")


async def test_an_answer_that_the_plan_cut_short_says_so(page: Page, stack: Stack, user_id: str) -> None:
    await use(stack, user_id, 107_500)
    await open_rail(page, stack, user_id)
    await send(page, "Go on. [usage input=20 output=4000]")
    await expect(page.get_by_text("The answer was cut short: there were no more tokens left for it.")).to_be_visible()


async def test_at_the_limit_the_input_is_kept_and_comes_alive_again(page: Page, stack: Stack, user_id: str) -> None:
    await use(stack, user_id, 108_000)
    await open_rail(page, stack, user_id)
    await expect(page.get_by_text("Upgrade to Pro")).to_be_visible()

    async with page.expect_response(CHAT_CALLS) as response:
        await send(page, "  Is anything left? ")

    assert (await response.value).status == 429
    await expect(page.get_by_role("textbox")).to_have_value("  Is anything left? ")
    await expect(page.get_by_text("Upgrade to Pro")).to_be_visible()
    await expect(messages(page, "user")).to_have_count(0)

    await subscribe(page, stack, user_id, "pro")

    await expect(line(page)).to_have_text("392K monthly tokens remaining")
    await expect(page.get_by_role("textbox")).to_have_value("  Is anything left? ")
    await page.get_by_role("button", name="Send").click()
    await expect(messages(page, "assistant")).not_to_be_empty()


async def test_usage_is_pushed_to_every_open_tab(context: BrowserContext, stack: Stack, user_id: str) -> None:
    tabs = [await context.new_page() for _ in range(2)]
    for tab in tabs:
        await open_rail(tab, stack, user_id)
        await expect(line(tab)).to_have_text("108K monthly tokens remaining")

    await stack.report(user_id, 8_094)
    for tab in tabs:
        await expect(line(tab)).to_have_text("99.9K monthly tokens remaining")

    await send(tabs[0], "Rails, please. " * 50)
    await expect(line(tabs[1])).not_to_have_text("99.9K monthly tokens remaining")


async def test_a_tab_out_of_sight_soon_gives_its_connection_back_and_asks_when_it_is_seen(
    own_page: Page, stack: Stack, user_id: str
) -> None:
    await own_page.clock.install()
    await own_page.add_init_script("Object.defineProperty(document, 'hidden', { configurable: true, value: true })")
    await open_rail(own_page, stack, user_id)
    await expect(line(own_page)).to_have_text("108K monthly tokens remaining")

    async with own_page.expect_event("requestfailed", is_push, timeout=15_000):  # Opened where nobody saw it.
        await own_page.clock.fast_forward(HIDDEN_MS)
    async with own_page.expect_response(PUSH_CALLS):
        await turn_to(own_page, is_seen=True)
    async with own_page.expect_event("requestfailed", is_push, timeout=15_000):
        await turn_to(own_page, is_seen=False)
        await own_page.clock.fast_forward(HIDDEN_MS)

    await use(stack, user_id, 8_094)
    await turn_to(own_page, is_seen=True)
    await expect(line(own_page)).to_have_text("99.9K monthly tokens remaining")


async def test_without_a_server_the_rail_counts_locally_and_takes_its_figure_back(
    page: Page, stack: Stack, user_id: str
) -> None:
    await open_rail(page, stack, user_id)
    await expect(line(page)).to_have_text("108K monthly tokens remaining")
    started = ("start", {"generationId": "g", "model": "claude-haiku-4-5"})
    cut_off = server_events(started, ("delta", {"text": "a" * 40_000}))
    await page.route(USAGE_CALLS, unreachable)
    await page.route(CHAT_CALLS, lambda route: route.fulfill(content_type="text/event-stream", body=cut_off))

    await send(page, "Hello")

    await expect(page.get_by_text(LOCAL_NOTICE)).to_be_visible()
    await expect(line(page)).to_have_text("97.9K monthly tokens remaining")

    await page.unroute(USAGE_CALLS)

    await expect(page.get_by_text(LOCAL_NOTICE)).to_be_hidden()
    await expect(line(page)).to_have_text("108K monthly tokens remaining")


async def test_an_offline_browser_keeps_the_message_and_recovers(page: Page, stack: Stack, user_id: str) -> None:
    await use(stack, user_id, 14_594)
    await open_rail(page, stack, user_id)
    await expect(line(page)).to_have_text("93.4K monthly tokens remaining")

    await page.context.set_offline(True)
    await send(page, "Are you there?")

    await expect(page.get_by_text(LOCAL_NOTICE)).to_be_visible()
    await expect(page.get_by_role("textbox")).to_have_value("Are you there?")
    await expect(line(page)).to_have_text("93.4K monthly tokens remaining")

    await page.context.set_offline(False)

    await expect(page.get_by_text(LOCAL_NOTICE)).to_be_hidden()
    await page.get_by_role("button", name="Try again").click()
    await expect(messages(page, "assistant")).not_to_be_empty()


async def test_the_last_known_figure_is_kept_for_a_visit_without_a_server(
    page: Page, stack: Stack, user_id: str
) -> None:
    await use(stack, user_id, 90_000)
    await open_rail(page, stack, user_id)
    await expect(line(page)).to_have_text("18K monthly tokens remaining")

    await page.route(USAGE_CALLS, unreachable)
    await page.reload()

    await expect(page.get_by_text(LOCAL_NOTICE, exact=True)).to_be_visible()
    await expect(line(page)).to_have_text("18K monthly tokens remaining")


@pytest.mark.parametrize("kept", [None, '{"usage":{}}'])
async def test_a_server_never_heard_is_said_to_be_assumed(
    page: Page, stack: Stack, user_id: str, *, kept: str | None
) -> None:
    await page.route(USAGE_CALLS, unreachable)
    if kept is not None:
        await page.goto(f"{stack.url}/web/icon.svg")
        await page.evaluate("([name, kept]) => localStorage.setItem(name, kept)", [f"chatrail.usage.{user_id}", kept])
    await open_rail(page, stack, user_id)

    await expect(page.get_by_text(f"{LOCAL_NOTICE} Until it answers, the free plan is assumed.")).to_be_visible()
    await expect(line(page)).to_have_text("108K monthly tokens remaining")


async def test_what_is_assumed_is_the_plan_that_an_operator_made_the_default(
    page: Page, stack: Stack, user_id: str
) -> None:
    basic = {"tier": "basic", "tokensLimit": 10_000, "period": "day", "upgradeTo": None, "alertPercents": [80, 100]}
    plans = {"plans": [{**basic, "pricePer1kTokensUsd": "0"}], "default": "basic", "simulated": True}
    await page.route("**/api/plans", lambda route: route.fulfill(json=plans))
    await page.route(USAGE_CALLS, unreachable)
    await open_rail(page, stack, user_id)

    await expect(page.get_by_text(f"{LOCAL_NOTICE} Until it answers, the basic plan is assumed.")).to_be_visible()
    await expect(line(page)).to_have_text("10K daily tokens remaining")


async def test_a_busy_server_is_told_in_words_and_can_be_tried_again(page: Page, stack: Stack, user_id: str) -> None:
    await open_rail(page, stack, user_id)
    busy = {"title": "Usage cannot be checked", "status": 503, "detail": "Nothing was spent"}
    await page.route(
        CHAT_CALLS,
        lambda route: route.fulfill(
            status=503,
            content_type="application/problem+json",
            headers={"Retry-After": "2"},
            body=json.dumps(busy),
        ),
    )

    await send(page, "Hello")

    words = "Usage cannot be checked. Nothing was spent. You can try again in 2 seconds."
    await expect(page.get_by_role("alert")).to_contain_text(words)
    await expect(page.get_by_role("textbox")).to_have_value("Hello")

    await page.unroute(CHAT_CALLS)
    await page.get_by_role("button", name="Try again").click()

    await expect(messages(page, "assistant")).not_to_be_empty()
    await expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize(
    ("directive", "words"),
    [
        ("[fail 529]", "Claude is overloaded. Try again in 5 seconds."),
        ("[fail 429]", "Claude is limiting our rate. Try again in 2 seconds."),
    ],
)
async def test_when_to_try_again_is_said_once(
    page: Page, stack: Stack, user_id: str, *, directive: str, words: str
) -> None:
    await open_rail(page, stack, user_id)

    await send(page, f"Hello {directive}")

    await expect(page.get_by_role("alert").locator("p")).to_have_text(words)
    await expect(page.get_by_role("button", name="Try again")).to_be_visible()


@pytest.mark.parametrize(
    ("stop_reason", "note"),
    [
        ("end_turn", None),
        ("max_tokens", "The answer was cut off: it reached its token limit."),
        ("model_context_window_exceeded", "The answer was cut off: the conversation is as long as Claude can read."),
        ("pause_turn", "Claude paused here: ask it to go on."),
        ("refusal", "Claude declined to go on."),
    ],
)
async def test_an_answer_that_is_not_whole_has_a_note(
    page: Page, stack: Stack, user_id: str, *, stop_reason: str, note: str | None
) -> None:
    await open_rail(page, stack, user_id)

    await send(page, f"Hello [stop {stop_reason}]")

    await expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")
    await expect(messages(page, "assistant")).not_to_be_empty()
    if note:
        await expect(page.get_by_text(note)).to_be_visible()
    else:
        await expect(page.get_by_role("log").locator(".message-note:visible")).to_have_count(0)


@pytest.mark.parametrize(
    ("text", "done", "words", "can_retry"),
    [
        ("", {"stopReason": "end_turn"}, "The answer was empty.", True),
        ("\n\n", {"stopReason": "end_turn"}, "The answer was empty.", True),
        ("", {"stopReason": "refusal"}, "Claude declined to answer.", False),
        ("", {"stopReason": "model_context_window_exceeded"}, "is as long as Claude can read.", False),
        (" ", {"stopReason": "max_tokens"}, "its token limit before its first word: ask for less at a time.", False),
        (
            "",
            {"stopReason": "max_tokens", "limitReached": True},
            "There were no more tokens left for an answer.",
            False,
        ),
    ],
)
async def test_an_empty_answer_is_asked_for_again_only_where_that_can_help(
    page: Page, stack: Stack, user_id: str, *, text: str, done: dict[str, Any], words: str, can_retry: bool
) -> None:
    await open_rail(page, stack, user_id)
    started = ("start", {"generationId": "g", "model": "claude-haiku-4-5"})
    empty = server_events(started, ("delta", {"text": text}), ("done", done))
    await page.route(CHAT_CALLS, lambda route: route.fulfill(content_type="text/event-stream", body=empty))

    await send(page, "Hello")

    await expect(page.get_by_role("alert")).to_contain_text(words)
    await expect(page.get_by_role("button", name="Try again")).to_be_visible(visible=can_retry)
    await expect(page.get_by_role("textbox")).to_have_value("Hello")
    await expect(page.get_by_role("log").locator(".message")).to_have_count(0)


async def test_a_question_too_large_for_the_whole_plan_is_no_reached_limit(
    page: Page, stack: Stack, user_id: str
) -> None:
    await open_rail(page, stack, user_id)
    await page.get_by_role("textbox").fill("several words of a question that is long " * 20_000)
    async with page.expect_response(CHAT_CALLS) as response:
        await page.get_by_role("button", name="Send").click()

    assert (await response.value).status == 429
    words = "Token limit exceeded. Upgrade to Pro, or shorten the conversation"
    await expect(page.get_by_role("alert")).to_contain_text(words)
    await expect(page.get_by_role("button", name="Try again")).to_be_hidden()
    await expect(line(page)).to_have_text("108K monthly tokens remaining")
    await page.get_by_role("textbox").fill("Hello")
    await page.get_by_role("button", name="Send").click()
    await expect(messages(page, "assistant")).not_to_be_empty()


async def test_an_answer_that_breaks_off_is_kept_with_the_reason(page: Page, stack: Stack, user_id: str) -> None:
    await open_rail(page, stack, user_id)
    broken = server_events(
        ("start", {"generationId": "g", "model": "claude-haiku-4-5"}),
        ("delta", {"text": "Half an"}),
        ("error", {"title": "Claude stopped answering", "status": 502}),
    )
    await page.route(CHAT_CALLS, lambda route: route.fulfill(content_type="text/event-stream", body=broken))

    await send(page, "Hello")

    await expect(messages(page, "assistant")).to_have_text("Half an")
    await expect(page.get_by_text("The answer broke off. Claude stopped answering.")).to_be_visible()
    await expect(page.get_by_role("textbox")).to_have_value("")


async def test_that_an_answer_broke_off_is_said_once(page: Page, stack: Stack, user_id: str) -> None:
    await open_rail(page, stack, user_id)

    await send(page, "Hello [cut middle]")

    words = "Claude's answer broke off. The connection ended. What was answered so far is counted; try again."
    await expect(page.get_by_text(words, exact=True)).to_be_visible()


async def test_stopped_before_the_first_word_the_message_is_given_back(
    page: Page, stack: Stack, user_id: str
) -> None:
    await open_rail(page, stack, user_id)
    await page.route(CHAT_CALLS, lambda _: None)  # Never answered.
    await send(page, "Hello")
    await expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")

    await compose(page, "に")
    await page.keyboard.press("Escape")  # Ends the composition, not the answer.
    await expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")
    await compose(page, "")
    await page.keyboard.press("Escape")

    await expect(page.get_by_role("textbox")).to_have_value("Hello")
    await expect(messages(page, "user")).to_have_count(0)
    await expect(page.get_by_role("alert")).to_be_hidden()
    await expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")


async def test_hostile_text_is_shown_as_text(page: Page, stack: Stack, user_id: str) -> None:
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    body = server_events(("delta", {"text": hostile}), ("done", {"stopReason": "end_turn"}))
    await page.route(CHAT_CALLS, lambda route: route.fulfill(content_type="text/event-stream", body=body))
    await open_rail(page, stack, quote(f'{user_id}"<b>&amp;'))
    await expect(page.locator("#embed")).to_contain_text(f'user-id="{user_id}&quot;&lt;b&gt;&amp;amp;">')

    await send(page, hostile)

    await expect(messages(page, "user")).to_have_text(hostile)
    await expect(messages(page, "assistant")).to_have_text(hostile)
    await expect(page.get_by_role("log").locator("img, script")).to_have_count(0)
    await expect(page).to_have_title("ChatRail")


async def test_a_person_not_signed_in_has_an_id_of_their_own(page: Page, stack: Stack) -> None:
    async with page.expect_request(USAGE_CALLS) as first:
        await page.goto(stack.url)
    kept = await page.evaluate("localStorage.getItem('chatrail.userId')")
    async with page.expect_request(USAGE_CALLS) as second:
        await page.reload()

    assert len(kept) > 30
    for request in (await first.value, await second.value):
        assert parse_qs(urlsplit(request.url).query)["userId"] == [kept]


async def test_without_storage_the_id_is_anonymous(own_page: Page, stack: Stack) -> None:
    await own_page.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError') } })"
    )
    async with own_page.expect_request(USAGE_CALLS) as request:
        await own_page.goto(stack.url)

    assert parse_qs(urlsplit((await request.value).url).query)["userId"] == ["anonymous"]
    await expect(line(own_page)).to_have_text(re.compile("tokens remaining$"))


async def test_the_page_says_whether_answers_are_simulated(page: Page, stack: Stack, user_id: str) -> None:
    plans = await (await page.request.get(f"{stack.url}/api/plans")).json()
    await open_rail(page, stack, user_id)
    await expect(page.locator("#plans li")).to_have_count(len(plans["plans"]))

    notice = page.get_by_text("Answers are simulated: no ANTHROPIC_API_KEY is set.")
    await expect(notice).to_be_visible(visible=plans["simulated"])


async def test_embedders_hear_of_usage_of_the_limit_and_of_the_upgrade(
    own_page: Page, stack: Stack, user_id: str
) -> None:
    await use(stack, user_id, 108_000)
    await own_page.add_init_script(
        "window.heard = {};"
        "for (const name of ['usage', 'limit-reached', 'upgrade'])"
        "  addEventListener(name, (event) => { heard[name] = event.detail; event.preventDefault() })"
    )
    await open_rail(own_page, stack, user_id)
    await own_page.get_by_text("Upgrade to Pro").click()

    heard = await own_page.evaluate("heard")

    assert {name: usage["tokensUsed"] for name, usage in heard.items()} == {
        "usage": 108_000,
        "limit-reached": 108_000,
        "upgrade": 108_000,
    }


async def test_numbers_are_cut_and_never_show_more_than_is_left(page: Page, stack: Stack) -> None:
    texts = {
        0: "0",
        999: "999",
        1_000: "1K",
        18_000: "18K",
        93_406: "93.4K",
        99_906: "99.9K",
        99_999: "99.9K",
        108_000: "108K",
        999_999: "999.9K",
        1_000_000: "1M",
        1_599_999: "1.5M",
    }
    await page.goto(stack.url)
    shown = await page.evaluate(
        "async (tokens) => tokens.map((await import('/web/usage.js')).tokensText)", list(texts)
    )
    assert dict(zip(texts, shown, strict=True)) == texts


async def test_only_a_whole_figure_is_one(page: Page, stack: Stack, user_id: str) -> None:
    await page.goto(stack.url)
    usage = await (await page.request.get(f"{stack.url}/api/usage?userId={user_id}")).json()
    unlimited = {**usage, "tokensLimit": None, "tokensRemaining": None, "resetsAt": None, "upgradeTo": None}
    odd = [{**usage, name: {}} for name in SHOWN_MEMBERS]
    lacking = [{name: usage[name] for name in usage if name != lost} for lost in SHOWN_MEMBERS]
    others: list[Any] = [None, 5, "text", [], {**usage, "tokensRemaining": None}, {**usage, "resetsAt": "soon"}]
    shown = await page.evaluate(
        "async (figures) => figures.map((await import('/web/usage.js')).isUsage)",
        [usage, unlimited, *odd, *lacking, *others],
    )
    assert shown == [True, True] + [False] * len([*odd, *lacking, *others])


async def test_the_word_for_the_period_comes_from_the_plan(page: Page, stack: Stack) -> None:
    usages = [
        {"period": period, "tokensLimit": 108_000, "tokensRemaining": 18_000} for period in ("day", "month", "none")
    ]
    await page.goto(stack.url)
    shown = await page.evaluate("async (usages) => usages.map((await import('/web/usage.js')).remainingText)", usages)
    assert shown == [
        "18K daily tokens remaining",
        "18K monthly tokens remaining",
        "18K tokens remaining",
    ]


async def test_the_bar_is_yellow_from_twenty_per_cent_and_red_from_five(page: Page, stack: Stack) -> None:
    levels = {100: "green", 20.1: "green", 20: "yellow", 16.7: "yellow", 5.1: "yellow", 5: "red", 0: "red"}
    await page.goto(stack.url)
    shown = await page.evaluate("async (left) => left.map((await import('/web/usage.js')).levelOf)", list(levels))
    assert dict(zip(levels, shown, strict=True)) == levels


async def test_events_are_read_however_the_network_cuts_them(page: Page, stack: Stack) -> None:
    text = ": keep-alive\r\n\r\nevent: delta\r\ndata: é\r\ndata:second\r\n\r\ndata: plain\n\nevent: cut\ndata: off\n"
    await page.goto(stack.url)
    events = await page.evaluate(
        """async ({ bytes }) => {
            const { serverEvents } = await import('/web/event-stream.js');
            const body = new ReadableStream({
                start(controller) {
                    for (const byte of bytes) controller.enqueue(new Uint8Array([byte]));
                    controller.close();
                },
            });
            return Array.fromAsync(serverEvents(body));
        }""",
        {"bytes": list(text.encode())},
    )
    assert events == [{"event": "delta", "data": "é\nsecond"}, {"event": "message", "data": "plain"}]
