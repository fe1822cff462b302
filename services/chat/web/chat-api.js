import { serverEvents } from "./event-stream.js";

const USAGE_TIMEOUT_MS = 10_000;
const LIMIT_TITLE = "Token limit exceeded";
const CALLERS_FAULTS = [400, 401, 403, 413, 422];

/** An answer that is a refusal (RFC 9457), in words for the person who chats. Anything else that fails is the network. */
export class Problem extends Error {
  constructor(body, { status = body.status, retryAfterS = null } = {}) {
    super(body.title ?? `The server answered with status ${status}.`);
    this.name = "Problem";
    this.body = body;
    this.status = status;
    this.detail = body.detail ?? "";
    this.retryAfterS = retryAfterS;
  }

  get isTokenLimit() {
    return this.status === 429 && this.body.title === LIMIT_TITLE && !this.#isTooLarge;
  }

  /** Asking the same again cannot help. */
  get isCallersFault() {
    return CALLERS_FAULTS.includes(this.status) || this.#isTooLarge;
  }

  /** For the whole plan: only then is there no time at which it makes sense to ask again. */
  get #isTooLarge() {
    return this.status === 429 && this.retryAfterS === null;
  }
}

/** The chat service's HTTP API, for one user. */
export class ChatApi {
  #root;
  #userId;

  constructor(root, userId) {
    this.#root = root.replace(/\/+$/, "");
    this.#userId = userId;
  }

  async usage() {
    const response = await fetch(this.#url("/api/usage", { userId: this.#userId }), {
      headers: { Accept: "application/json" },
      cache: "no-store",
      signal: AbortSignal.timeout(USAGE_TIMEOUT_MS),
    });
    return accepted(response).then((answer) => answer.json());
  }

  async plans() {
    const response = await fetch(this.#url("/api/plans"), { headers: { Accept: "application/json" } });
    return accepted(response).then((answer) => answer.json());
  }

  /** Yields `{ event, data }`, data decoded, as the answer is generated. Raises Problem before the first event. */
  async *chat(messages, signal) {
    const response = await fetch(this.#url("/api/chat"), {
      method: "POST",
      headers: { Accept: "text/event-stream", "Content-Type": "application/json" },
      body: JSON.stringify({ userId: this.#userId, messages }),
      signal,
    });
    await accepted(response);
    for await (const { event, data } of serverEvents(response.body)) yield { event, data: JSON.parse(data) };
  }

  usageEvents() {
    return new EventSource(this.#url("/api/usage/events", { userId: this.#userId }));
  }

  #url(path, query = {}) {
    const search = new URLSearchParams(query).toString();
    return this.#root + path + (search && `?${search}`);
  }
}

async function accepted(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const seconds = Number.parseInt(response.headers.get("Retry-After"), 10);
  throw new Problem(body, { status: response.status, retryAfterS: Number.isNaN(seconds) ? null : seconds });
}
