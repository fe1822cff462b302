/**
 * What is shown for a usage figure: pure rules, without DOM, network or clock.
 * A usage figure is the body of `GET /api/usage`.
 */

const PERIOD_WORDS = { day: "daily ", month: "monthly ", none: "" };
const PERIOD_OWNERS = { day: "Today’s", month: "This month’s", none: "This plan’s" };
const UNITS = [
  [1_000_000_000, "B"],
  [1_000_000, "M"],
  [1_000, "K"],
];
const RED_PERCENT_MAX = 5;
const YELLOW_PERCENT_MAX = 20;
const BYTES_PER_TOKEN = 4;

/** Whether `value` has all that is shown of a figure, in the shape in which the server tells it. */
export function isUsage(value) {
  if (typeof value !== "object" || value === null) return false;
  const limits = [value.tokensLimit, value.tokensRemaining];
  return (
    [value.tier, value.period].every((text) => typeof text === "string") &&
    [value.periodStart, value.resetsAt].every((time) => time === null || isTime(time)) &&
    (value.upgradeTo === null || typeof value.upgradeTo === "string") &&
    Number.isFinite(value.tokensUsed) &&
    (limits.every(Number.isFinite) || limits.every((tokens) => tokens === null))
  );
}

function isTime(value) {
  return typeof value === "string" && !Number.isNaN(Date.parse(value));
}

/** "99.9K" for 99,906: cut, never rounded up, so that no more is shown than is left. */
export function tokensText(tokens) {
  const whole = Math.floor(tokens);
  const unit = UNITS.find(([size]) => whole >= size);
  if (!unit) return String(whole);
  const [size, letter] = unit;
  return `${Math.floor(whole / (size / 10)) / 10}${letter}`;
}

export function isUnlimited(usage) {
  return usage.tokensLimit === null;
}

export function tokensLeft(usage) {
  return isUnlimited(usage) ? Infinity : Math.max(0, Math.floor(usage.tokensRemaining));
}

/** Per cent left, one decimal, 0 to 100; an unlimited plan always has 100 left. */
export function percentLeft(usage) {
  if (isUnlimited(usage)) return 100;
  if (usage.tokensLimit <= 0) return 0;
  return Math.min(100, Math.round((tokensLeft(usage) / usage.tokensLimit) * 1000) / 10);
}

/** Decided on the per cent that is shown: a bar that says 5 is red. */
export function levelOf(percent) {
  if (percent <= RED_PERCENT_MAX) return "red";
  return percent <= YELLOW_PERCENT_MAX ? "yellow" : "green";
}

export function remainingText(usage) {
  if (isUnlimited(usage)) return "∞";
  const left = tokensLeft(usage);
  return `${tokensText(left)} ${PERIOD_WORDS[usage.period] ?? ""}${left === 1 ? "token" : "tokens"} remaining`;
}

export function planName(tier) {
  return tier.charAt(0).toUpperCase() + tier.slice(1);
}

export function limitText(usage) {
  return usage.upgradeTo ? `Upgrade to ${planName(usage.upgradeTo)}` : "Token limit reached";
}

/** Why nothing can be asked: none are left, or those that are left were too few for the last message. */
export function limitReason(usage) {
  const left = tokensLeft(usage);
  if (left === 0) return `${PERIOD_OWNERS[usage.period] ?? "Your"} tokens are used up.`;
  const count = left === 1 ? "Only 1 token is" : `Only ${tokensText(left)} tokens are`;
  return `${count} left, too few for this message.`;
}

/** A gentle word from the first per cent on that the plan alerts at; empty before. */
export function thresholdText(usage, alertPercents = []) {
  if (isUnlimited(usage) || usage.tokensLimit <= 0) return "";
  const percentUsed = Math.floor((usage.tokensUsed * 100) / usage.tokensLimit);
  if (percentUsed < Math.min(...alertPercents)) return "";
  return `${PERIOD_OWNERS[usage.period] ?? "Your"} tokens are ${percentUsed}% used.`;
}

/**
 * Whether `usage` leaves more room than there was when the server refused a message. Until then the refusal
 * stands even if a few tokens are left.
 */
export function hasMoreRoom(usage, refused) {
  return (
    usage.tier !== refused.tier ||
    usage.periodStart !== refused.periodStart ||
    tokensLeft(usage) > tokensLeft(refused) ||
    (usage.tokensHeld ?? 0) < (refused.tokensHeld ?? 0)
  );
}

/** A guess for when the server cannot say: about four bytes of UTF-8 a token. */
export function estimatedTokens(texts) {
  const encoder = new TextEncoder();
  const bytes = texts.reduce((sum, text) => sum + encoder.encode(text).length, 0);
  return Math.ceil(bytes / BYTES_PER_TOKEN);
}

/** `usage` as it would be with `tokens` more used. */
export function afterSpending(usage, tokens) {
  const tokensUsed = usage.tokensUsed + tokens;
  if (isUnlimited(usage)) return { ...usage, tokensUsed };
  const tokensRemaining = Math.max(0, usage.tokensRemaining - tokens);
  const usagePercentage = Math.round((100 - percentLeft({ ...usage, tokensRemaining })) * 10) / 10;
  return { ...usage, tokensUsed, tokensRemaining, usagePercentage };
}

/** What holds at `now` of a figure that was kept: after its reset, the whole limit is left again. */
export function afterReset(usage, now) {
  if (!usage.resetsAt || now < new Date(usage.resetsAt)) return usage;
  return {
    ...usage,
    tokensUsed: 0,
    tokensRemaining: usage.tokensLimit,
    usagePercentage: 0,
    tokensHeld: 0,
    periodStart: usage.resetsAt,
    resetsAt: null,
  };
}

/** The default plan where no server was ever heard to name another. */
export const USUAL_PLAN = { tier: "free", tokensLimit: 108_000, period: "month", upgradeTo: "pro" };

/** A plan, untouched: where counting starts when no figure of the server's was ever seen. Its periods are UTC's. */
export function untouched({ tier, tokensLimit, period, upgradeTo }, now) {
  const [periodStart, resetsAt] = boundsOf(period, now).map((ms) => new Date(ms).toISOString());
  return {
    tier,
    tokensUsed: 0,
    tokensLimit,
    tokensRemaining: tokensLimit,
    usagePercentage: 0,
    tokensHeld: 0,
    period,
    periodStart: periodStart ?? null,
    resetsAt: resetsAt ?? null,
    upgradeTo,
    costUsd: "0.00",
  };
}

function boundsOf(period, now) {
  const [year, month, day] = [now.getUTCFullYear(), now.getUTCMonth(), now.getUTCDate()];
  if (period === "month") return [Date.UTC(year, month, 1), Date.UTC(year, month + 1, 1)];
  if (period === "day") return [Date.UTC(year, month, day), Date.UTC(year, month, day + 1)];
  return [];
}
