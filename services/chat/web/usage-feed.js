import { Problem } from "./chat-api.js";
import { keepUsage, keptUsage } from "./storage.js";
import { afterReset, afterSpending, untouched, USUAL_PLAN } from "./usage.js";

const RETRY_MIN_MS = 1_000;
const RETRY_MAX_MS = 30_000;
const HIDDEN_CLOSE_MS = 5_000;
const RESET_CHECK_MIN_MS = 30_000;
const TIMER_MAX_MS = 86_400_000;
const SETTLING_MS = 5_000;

/**
 * One user's usage, kept current: fetched, pushed, and counted here while the server cannot be reached.
 *
 * `onChange({ usage, isLocal, isAssumed, problem })` is called with every change. `isLocal`: the figure is our own
 * count. `isAssumed`: it starts from the default plan, because the server was never heard. `problem`: the server
 * will not tell this caller, and `usage` may be null.
 */
export class UsageFeed {
  #api;
  #userId;
  #onChange;
  #lifetime = null;
  #events = null;
  #usage = null; // The server's last figure.
  #unsettledTokens = 0; // Counted here since that figure.
  #isAssumed = false;
  #defaultPlan = USUAL_PLAN;
  #asked = 0; // Requests are numbered: an answer older than the figure we have is dropped.
  #answered = 0;
  #settled = null; // The figure that came with our own last answer, for a few seconds.
  #failures = 0;
  #timers = {};

  constructor(api, userId, onChange) {
    this.#api = api;
    this.#userId = userId;
    this.#onChange = onChange;
  }

  start() {
    this.#lifetime = new AbortController();
    const { signal } = this.#lifetime;
    window.addEventListener("online", () => this.refresh(), { signal });
    window.addEventListener("offline", () => this.refresh(), { signal });
    document.addEventListener("visibilitychange", () => this.#onVisibilityChange(), { signal });
    this.#listen();
    if (document.hidden) this.#leaveLater();
    return this.refresh();
  }

  stop() {
    this.#lifetime?.abort();
    this.#lifetime = null;
    this.#stopListening();
    this.#events = null;
    Object.values(this.#timers).forEach(clearTimeout);
  }

  /** What the server says that its default plan is. */
  assume(plan) {
    this.#defaultPlan = plan;
    if (!this.#isAssumed) return;
    this.#usage = untouched(plan, new Date());
    this.#tell({ isLocal: true });
  }

  /** Ask the server now. Never raises: what fails is told through `onChange`. */
  async refresh() {
    const request = ++this.#asked;
    const isCurrent = () => this.#lifetime && request > this.#answered;
    try {
      const usage = await this.#api.usage();
      if (!isCurrent()) return;
      this.#answered = request;
      this.#accept(usage);
    } catch (fault) {
      if (!isCurrent()) return;
      if (fault instanceof Problem && fault.isCallersFault) this.#tell({ problem: fault });
      else this.#countHere();
    }
  }

  /** The figure that came with our own answer: it includes a generation that other replicas may not know yet. */
  settle(usage) {
    this.#settled = { usage, untilMs: Date.now() + SETTLING_MS };
    this.#answered = this.#asked;
    this.#accept(usage);
  }

  /** Count an answer of which the server could not tell the cost; its next figure replaces the guess. */
  spend(tokens) {
    this.#unsettledTokens += tokens;
  }

  #listen() {
    this.#stopListening();
    this.#events = this.#api.usageEvents();
    const onUsage = ({ data }) => {
      this.#answered = this.#asked;
      this.#accept(JSON.parse(data));
    };
    this.#events.addEventListener("usage", onUsage);
    this.#events.addEventListener("message", onUsage);
    // What changed while nobody listened was pushed to nobody.
    this.#events.addEventListener("open", () => this.refresh());
    this.#events.addEventListener("error", () => this.#onEventsLost());
  }

  #onEventsLost() {
    this.refresh();
    if (this.#events.readyState !== EventSource.CLOSED) return; // The browser reconnects by itself.
    this.#later("listen", this.#retryMs(), () => this.#listen());
  }

  #stopListening() {
    clearTimeout(this.#timers.listen);
    this.#events?.close();
  }

  // Browsers give an HTTP/1.1 host six connections over all tabs: tabs that nobody looks at soon give theirs back.
  #leaveLater() {
    this.#later("hide", HIDDEN_CLOSE_MS, () => this.#stopListening());
  }

  #onVisibilityChange() {
    if (document.hidden) {
      this.#leaveLater();
      return;
    }
    clearTimeout(this.#timers.hide);
    if (this.#events.readyState === EventSource.CLOSED) this.#listen();
    this.refresh();
  }

  #accept(usage) {
    this.#failures = 0;
    clearTimeout(this.#timers.retry);
    if (this.#isBehind(usage)) {
      this.#later("retry", SETTLING_MS, () => this.refresh());
      return;
    }
    this.#usage = usage;
    this.#isAssumed = false;
    this.#unsettledTokens = 0;
    this.#keep();
    this.#watchReset(usage.resetsAt);
    this.#tell({ isLocal: false });
  }

  #isBehind(usage) {
    if (!this.#settled || Date.now() > this.#settled.untilMs) return false;
    const own = this.#settled.usage;
    return own.tier === usage.tier && own.periodStart === usage.periodStart && usage.tokensUsed < own.tokensUsed;
  }

  #countHere() {
    if (!this.#usage) this.#recall();
    else if (!this.#isAssumed) this.#keep();
    this.#tell({ isLocal: true });
    this.#later("retry", this.#retryMs(), () => this.refresh());
    this.#failures += 1;
  }

  #recall() {
    const now = new Date();
    const kept = keptUsage(this.#userId);
    this.#isAssumed = !kept;
    this.#usage = this.#isAssumed ? untouched(this.#defaultPlan, now) : afterReset(kept.usage, now);
    if (this.#usage === kept?.usage) this.#unsettledTokens += kept.unsettledTokens;
  }

  #keep() {
    keepUsage(this.#userId, { usage: this.#usage, unsettledTokens: this.#unsettledTokens });
  }

  // A new period starts by itself, and nothing is pushed for it.
  #watchReset(resetsAt) {
    if (!resetsAt) return;
    const untilResetMs = new Date(resetsAt) - Date.now() + Math.random() * 3_000;
    const waitMs = Math.min(TIMER_MAX_MS, Math.max(RESET_CHECK_MIN_MS, untilResetMs));
    this.#later("reset", waitMs, () => this.refresh());
  }

  #retryMs() {
    const backoffMs = Math.min(RETRY_MAX_MS, RETRY_MIN_MS * 2 ** this.#failures);
    return backoffMs * (0.75 + Math.random() / 2); // Spread, so that a server that comes back is not met by all at once.
  }

  #later(name, delayMs, action) {
    clearTimeout(this.#timers[name]);
    if (!this.#lifetime) return;
    this.#timers[name] = setTimeout(action, delayMs);
  }

  #tell({ isLocal = false, problem = null }) {
    const usage = this.#usage && isLocal ? afterSpending(this.#usage, this.#unsettledTokens) : this.#usage;
    this.#onChange({ usage, isLocal, isAssumed: isLocal && this.#isAssumed, problem });
  }
}
