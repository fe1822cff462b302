/**
 * <chat-rail>: a metered Claude chat to put into any page.
 *
 *     <script type="module" src="https://chat.example.com/web/chat-rail.js"></script>
 *     <chat-rail api="https://chat.example.com" user-id="user_1"></chat-rail>
 *
 * Attributes
 *   api          where the chat service answers; by default the origin this module came from
 *   user-id      who is chatting; by default an id of this browser's own, kept in local storage
 *   heading      the title of the rail ("Chat")
 *   upgrade-url  where the upgrade button leads; without it, the rail says whom to ask
 *
 * Events (they bubble, also out of shadow roots)
 *   usage          a figure of the server's; `detail` is the body of `GET /api/usage`
 *   limit-reached  the plan is used up, or a message was refused; `detail` is the same body
 *   upgrade        the upgrade button was pressed; `detail` is the same body; `preventDefault()` takes it over
 *
 * Custom properties
 *   --chat-rail-accent, --chat-rail-on-accent, --chat-rail-background, --chat-rail-surface, --chat-rail-text,
 *   --chat-rail-muted, --chat-rail-border, --chat-rail-green, --chat-rail-yellow, --chat-rail-red,
 *   --chat-rail-radius, --chat-rail-font; what these do not reach, `chat-rail::part(rail)` does
 * `color-scheme: light` or `dark` on the element overrides the person's preference.
 *
 * The page's Content-Security-Policy must allow the service's origin in script-src, style-src and connect-src.
 */

import { ChatApi, Problem } from "./chat-api.js";
import { buildLayout, buildMessage } from "./layout.js";
import { ownUserId } from "./storage.js";
import { UsageFeed } from "./usage-feed.js";
import {
  estimatedTokens,
  hasMoreRoom,
  isUnlimited,
  levelOf,
  limitReason,
  limitText,
  percentLeft,
  planName,
  remainingText,
  thresholdText,
  tokensLeft,
} from "./usage.js";

const ORIGIN = new URL(import.meta.url).origin;
const STYLESHEET = new URL("./chat-rail.css", import.meta.url).href;
const BOTTOM_SLACK_PX = 48;
const LIMIT_NOTE = "The answer was cut short: there were no more tokens left for it.";
const STOP_REASON_NOTES = {
  max_tokens: "The answer was cut off: it reached its token limit.",
  model_context_window_exceeded: "The answer was cut off: the conversation is as long as Claude can read.",
  pause_turn: "Claude paused here: ask it to go on.",
  refusal: "Claude declined to go on.",
};
// Asking for these again costs tokens, and cannot help.
const LIMIT_EMPTY = "There were no more tokens left for an answer.";
const EMPTY_FOR_GOOD = {
  max_tokens: "The answer reached its token limit before its first word: ask for less at a time.",
  model_context_window_exceeded: "The conversation is as long as Claude can read.",
  refusal: "Claude declined to answer.",
};
const USAGE_MEMBERS = [
  "tier",
  "tokensUsed",
  "tokensLimit",
  "tokensRemaining",
  "usagePercentage",
  "tokensHeld",
  "period",
  "periodStart",
  "resetsAt",
  "upgradeTo",
  "costUsd",
];

export class ChatRail extends HTMLElement {
  static observedAttributes = ["api", "user-id", "heading"];

  #parts;
  #api = null;
  #feed = null;
  #userId = null;
  #usage = null;
  #alertPercents = {}; // Of each plan, by its tier.
  #refused = null; // The usage at the time the server refused a message.
  #wasLimited = false;
  #history = [];
  #turn = null; // Aborts the answer that is streaming.
  #isPinned = true;

  constructor() {
    super();
    const { nodes, parts } = buildLayout({ stylesheet: STYLESHEET });
    this.#parts = parts;
    this.attachShadow({ mode: "open" }).append(...nodes);
    this.#bind();
  }

  /** Who is chatting: the attribute, else this browser's own id. */
  get userId() {
    return this.#userId;
  }

  /** The figure that is shown, or null before the first. */
  get usage() {
    return this.#usage;
  }

  connectedCallback() {
    this.#userId = this.getAttribute("user-id") || ownUserId();
    this.#api = new ChatApi(this.getAttribute("api") || ORIGIN, this.#userId);
    this.#feed = new UsageFeed(this.#api, this.#userId, (change) => this.#onUsage(change));
    this.#feed.start();
    this.#learnPlans(this.#api);
  }

  disconnectedCallback() {
    this.#turn?.abort();
    this.#feed?.stop();
    this.#feed = null;
  }

  attributeChangedCallback(name, before, after) {
    if (name === "heading") {
      this.#parts.heading.textContent = after || "Chat";
      return;
    }
    if (!this.#feed || before === after) return;
    this.disconnectedCallback();
    this.#startOver();
    this.#usage = this.#refused = null;
    this.connectedCallback();
  }

  #bind() {
    const { stylesheet, rail, composer, input, halt, fresh, retry, upgrade, suggestions, log, latest } = this.#parts;
    stylesheet.addEventListener("load", () => (rail.hidden = false));
    stylesheet.addEventListener("error", () => (rail.hidden = false));
    composer.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    input.addEventListener("input", () => this.#onInput());
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit();
    });
    rail.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.isComposing) this.#turn?.abort();
    });
    halt.addEventListener("click", () => this.#turn?.abort());
    fresh.addEventListener("click", () => {
      this.#startOver();
      input.focus();
    });
    retry.addEventListener("click", () => this.#submit());
    upgrade.addEventListener("click", () => this.#onUpgrade());
    suggestions.addEventListener("click", ({ target }) => {
      const suggestion = target.closest("button");
      if (!suggestion) return;
      this.#type(suggestion.textContent);
      this.#submit();
    });
    log.addEventListener("scroll", () => this.#onScroll(), { passive: true });
    latest.addEventListener("click", () => this.#scrollToLatest());
    // What appears below takes its room from the conversation: its end stays in sight.
    new ResizeObserver(() => this.#isPinned && this.#hasMessages() && this.#scrollToLatest()).observe(log);
  }

  // ── Usage ──────────────────────────────────────────────────────────────────────────────────────────────────

  #onUsage({ usage, isLocal, isAssumed, problem }) {
    if (problem) {
      this.#showProblem(problem, { canRetry: false });
      if (!usage) this.#parts.line.textContent = "Usage is not available";
      return;
    }
    this.#usage = usage;
    if (this.#refused && hasMoreRoom(usage, this.#refused)) this.#refused = null;
    this.#showUsage();
    this.#showWhetherLocal(isLocal, isAssumed);
    if (!isLocal) this.#tell("usage");
  }

  #isLimited() {
    return Boolean(this.#refused) || tokensLeft(this.#usage) === 0;
  }

  #showUsage() {
    const usage = this.#usage;
    const isLimited = this.#isLimited();
    const { rail, plan, line, upgrade, percent, reason } = this.#parts;
    const canUpgrade = isLimited && Boolean(usage.upgradeTo);
    const text = isLimited ? limitText(usage) : remainingText(usage);
    rail.toggleAttribute("data-limited", isLimited);
    rail.toggleAttribute("data-unlimited", isUnlimited(usage));
    show(plan, planName(usage.tier));
    line.hidden = canUpgrade;
    line.textContent = canUpgrade ? "" : text;
    upgrade.hidden = !canUpgrade;
    upgrade.textContent = canUpgrade ? text : "";
    percent.textContent = isUnlimited(usage) ? "" : `${percentLeft(usage)}%`;
    reason.textContent = isLimited ? limitReason(usage) : thresholdText(usage, this.#alertPercents[usage.tier]);
    this.#showBar(usage, text);
    this.#showReset(usage, isLimited);
    if (isLimited && !this.#wasLimited) this.#tell("limit-reached");
    this.#wasLimited = isLimited;
  }

  #showBar(usage, text) {
    const { meter, bar, fill } = this.#parts;
    const percent = percentLeft(usage);
    meter.dataset.level = bar.dataset.level = levelOf(percent);
    bar.setAttribute("aria-valuenow", String(percent));
    bar.setAttribute("aria-valuetext", isUnlimited(usage) ? "Unlimited tokens" : `${percent}%: ${text}`);
    fill.style.width = `${percent}%`;
  }

  #showReset({ resetsAt }, isLimited) {
    const { reset, resetLabel, resetTime } = this.#parts;
    reset.hidden = !resetsAt || isUnlimited(this.#usage);
    if (reset.hidden) return;
    resetLabel.textContent = isLimited ? "New tokens come on" : "Resets on";
    resetTime.dateTime = resetsAt;
    resetTime.textContent = timeText(new Date(resetsAt));
    resetTime.title = new Date(resetsAt).toUTCString();
  }

  #showWhetherLocal(isLocal, isAssumed) {
    const assumption = isAssumed ? ` Until it answers, the ${this.#usage.tier} plan is assumed.` : "";
    show(this.#parts.local, isLocal ? `Counting locally: the server cannot be reached.${assumption}` : "");
  }

  async #learnPlans(api) {
    const { simulated, plans, default: tier } = await api.plans().catch(() => ({}));
    if (api !== this.#api) return;
    const assumed = plans?.find((plan) => plan.tier === tier);
    if (assumed) this.#feed?.assume(assumed);
    this.#parts.simulated.hidden = !simulated;
    this.#alertPercents = Object.fromEntries((plans ?? []).map((plan) => [plan.tier, plan.alertPercents]));
    if (this.#usage) this.#showUsage();
  }

  #onUpgrade() {
    if (!this.#tell("upgrade", { cancelable: true })) return;
    const url = this.getAttribute("upgrade-url");
    if (url) window.location.assign(url);
    else this.#parts.reason.textContent = `Ask whoever runs this service for the ${planName(this.#usage.upgradeTo)} plan.`;
  }

  #tell(name, { cancelable = false } = {}) {
    return this.dispatchEvent(
      new CustomEvent(name, { detail: { ...this.#usage }, bubbles: true, composed: true, cancelable }),
    );
  }

  // ── Conversation ───────────────────────────────────────────────────────────────────────────────────────────

  async #submit() {
    const typed = this.#parts.input.value;
    if (!typed.trim() || this.#turn) return;
    const history = this.#history;
    const asked = [...history, { role: "user", content: typed.trim() }];
    const bubbles = [this.#addMessage("user", typed.trim()), this.#addMessage("assistant")];
    const answer = new StreamingText(bubbles[1], () => this.#followLatest());
    this.#type("");
    this.#hideProblem();
    const turn = new AbortController();
    this.#setBusy(turn);
    const outcome = await this.#receive(asked, answer, turn.signal);
    answer.finish();
    this.#setBusy(null);
    this.#recount(outcome, asked, answer.value);
    if (this.#history !== history) return; // Started over meanwhile.
    if (answer.value.trim()) this.#history = [...asked, { role: "assistant", content: answer.value }];
    else this.#takeBack(bubbles, typed);
    this.#showOutcome(outcome, bubbles[1]);
  }

  /** Read one answer to its end, whatever that is: `{ fault, stopReason, isLimitReached, isAccepted, isSettled }`. */
  async #receive(messages, answer, signal) {
    const outcome = { fault: null, stopReason: null, isLimitReached: false, isAccepted: false, isSettled: false };
    try {
      for await (const { event, data } of this.#api.chat(messages, signal)) {
        outcome.isAccepted = true;
        if (event === "delta") answer.append(data.text);
        else if (event === "usage") {
          outcome.isSettled = true;
          this.#feed?.settle(data);
        } else if (event === "done") {
          outcome.stopReason = data.stopReason ?? "end_turn";
          outcome.isLimitReached = Boolean(data.limitReached);
        } else if (event === "error") throw new Problem(data);
      }
      if (!outcome.stopReason) throw new TypeError("The connection was lost before the end of the answer.");
    } catch (fault) {
      outcome.fault = fault;
    }
    return outcome;
  }

  #showOutcome({ fault, stopReason, isLimitReached, isAccepted }, bubble) {
    const isKept = bubble.node.isConnected;
    if (fault?.name === "AbortError") show(bubble.note, isKept ? "Stopped." : "");
    else if (fault instanceof Problem && fault.isTokenLimit) this.#onRefused(fault);
    else if (fault && isKept) show(bubble.note, brokeOffText(fault, { isAccepted }));
    else if (fault) this.#showProblem(fault, { isAccepted, canRetry: !fault.isCallersFault });
    else show(bubble.note, isLimitReached ? LIMIT_NOTE : (STOP_REASON_NOTES[stopReason] ?? ""));
    if (!fault && !isKept) this.#showEmpty(isLimitReached ? LIMIT_EMPTY : EMPTY_FOR_GOOD[stopReason]);
  }

  #showEmpty(reason) {
    this.#showProblem(new Problem({ title: reason ?? "The answer was empty." }), { canRetry: !reason });
  }

  /** At the limit: nothing was sent to Claude, so nothing of the conversation may change. */
  #onRefused({ body }) {
    const told = USAGE_MEMBERS.filter((name) => name in body).map((name) => [name, body[name]]);
    if (!this.#usage && !("tokensLimit" in body)) return; // The next figure shows it.
    this.#usage = { ...this.#usage, ...Object.fromEntries(told) };
    this.#refused = this.#usage;
    this.#showUsage();
  }

  #recount({ fault, isAccepted, isSettled }, asked, answerText) {
    if (fault instanceof Problem && fault.isTokenLimit) return; // It brought the figure.
    if (isAccepted && !isSettled) {
      this.#feed?.spend(estimatedTokens([...asked.map(({ content }) => content), answerText]));
    }
    this.#feed?.refresh();
  }

  #takeBack(bubbles, typed) {
    bubbles.forEach(({ node }) => node.remove());
    const since = this.#parts.input.value;
    this.#type(since ? `${typed}\n${since}` : typed);
    this.#showWhetherEmpty();
  }

  #startOver() {
    this.#turn?.abort();
    this.#history = [];
    this.#parts.log.querySelectorAll(".message").forEach((node) => node.remove());
    this.#hideProblem();
    this.#showWhetherEmpty();
  }

  #addMessage(role, content = "") {
    const message = buildMessage(role);
    message.text.data = content;
    this.#parts.log.append(message.node);
    this.#showWhetherEmpty();
    this.#scrollToLatest();
    return message;
  }

  #showWhetherEmpty() {
    const { welcome, fresh } = this.#parts;
    const isEmpty = !this.#hasMessages();
    welcome.hidden = !isEmpty;
    fresh.hidden = isEmpty;
    this.#onScroll();
  }

  #hasMessages() {
    return this.#parts.log.querySelector(".message") !== null;
  }

  #setBusy(turn) {
    const { rail, log, send, halt, input } = this.#parts;
    const hadFocus = this.shadowRoot.activeElement === halt || this.shadowRoot.activeElement === send;
    this.#turn = turn;
    rail.toggleAttribute("data-busy", Boolean(turn));
    log.setAttribute("aria-busy", String(Boolean(turn)));
    send.hidden = Boolean(turn);
    halt.hidden = !turn;
    if (hadFocus) input.focus(); // The button that had it is gone.
  }

  // ── Problems ───────────────────────────────────────────────────────────────────────────────────────────────

  #showProblem(fault, { isAccepted = false, canRetry }) {
    const { problem, problemTitle, problemDetail, retry } = this.#parts;
    [problemTitle.textContent, problemDetail.textContent] = faultWords(fault, { isAccepted });
    retry.hidden = !canRetry;
    problem.hidden = false;
  }

  #hideProblem() {
    this.#parts.problem.hidden = true;
  }

  // ── Typing and scrolling ───────────────────────────────────────────────────────────────────────────────────

  #type(text) {
    this.#parts.input.value = text;
    this.#onInput();
  }

  #onInput() {
    const { input, send } = this.#parts;
    send.disabled = !input.value.trim();
    if (CSS.supports("field-sizing", "content")) return;
    input.style.height = "auto";
    input.style.height = `${input.scrollHeight}px`;
  }

  #onScroll() {
    const { log, latest } = this.#parts;
    this.#isPinned = log.scrollHeight - log.scrollTop - log.clientHeight < BOTTOM_SLACK_PX;
    latest.hidden = this.#isPinned || !this.#hasMessages();
  }

  #followLatest() {
    if (this.#isPinned) this.#scrollToLatest();
    else this.#parts.latest.hidden = false;
  }

  #scrollToLatest() {
    const { log } = this.#parts;
    log.scrollTop = log.scrollHeight;
    this.#isPinned = true;
    this.#parts.latest.hidden = true;
  }
}

/** Text that grows: drawn once a frame, however many pieces arrive. */
class StreamingText {
  value = "";
  #message;
  #onDrawn;
  #undrawn = "";
  #frame = null;

  constructor(message, onDrawn) {
    this.#message = message;
    this.#onDrawn = onDrawn;
    message.node.dataset.state = "waiting";
  }

  append(text) {
    this.value += text;
    this.#undrawn += text;
    this.#frame ??= requestAnimationFrame(() => this.#draw());
  }

  finish() {
    cancelAnimationFrame(this.#frame);
    this.#draw();
    delete this.#message.node.dataset.state;
  }

  #draw() {
    this.#frame = null;
    if (!this.#undrawn) return;
    this.#message.text.appendData(this.#undrawn);
    this.#message.node.dataset.state = "streaming";
    this.#undrawn = "";
    this.#onDrawn();
  }
}

/** Title and detail for the person who chats. */
function faultWords(fault, { isAccepted }) {
  if (!(fault instanceof Problem)) {
    return isAccepted
      ? ["The connection was lost.", "You can ask again."]
      : ["The message could not be sent.", "It is kept below."];
  }
  const isSaid = fault.retryAfterS === null || /try again/i.test(fault.detail);
  const wait = isSaid ? "" : `You can try again in ${secondsText(fault.retryAfterS)}.`;
  return [sentence(fault.message), [sentence(fault.detail), wait].filter(Boolean).join(" ")];
}

function brokeOffText(fault, { isAccepted }) {
  const words = faultWords(fault, { isAccepted }).join(" ");
  return /^[^.]*broke off/.test(words) ? words : `The answer broke off. ${words}`;
}

function secondsText(seconds) {
  if (seconds >= 120) return `${Math.ceil(seconds / 60)} minutes`;
  return seconds === 1 ? "1 second" : `${seconds} seconds`;
}

function sentence(text) {
  return !text || /[.!?…]$/.test(text) ? text : `${text}.`;
}

function timeText(time) {
  // The page speaks English; of its variants, the person's own.
  const locale = navigator.languages.find((language) => language.startsWith("en")) ?? "en-GB";
  return new Intl.DateTimeFormat(locale, {
    day: "numeric",
    month: "long",
    year: "numeric",
    hour: "numeric",
    minute: "2-digit",
    timeZoneName: "short",
  }).format(time);
}

function show(node, text) {
  node.textContent = text;
  node.hidden = !text;
}

if (!customElements.get("chat-rail")) customElements.define("chat-rail", ChatRail);
