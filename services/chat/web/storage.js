/** What is kept in this browser. Storage may be forbidden or full: then nothing is kept, and nothing fails. */

import { isUsage } from "./usage.js";

const USER_ID_KEY = "chatrail.userId";
const USAGE_KEY = "chatrail.usage";
const ANONYMOUS = "anonymous";

/** The id of a person who is not signed in: the same at every visit, `anonymous` without storage. */
export function ownUserId() {
  try {
    const kept = localStorage.getItem(USER_ID_KEY);
    if (kept) return kept;
    const made = `guest_${randomId()}`;
    localStorage.setItem(USER_ID_KEY, made);
    return made;
  } catch {
    return ANONYMOUS;
  }
}

/** Keep `{ usage, unsettledTokens }`: the server's last figure, and what was counted here since. */
export function keepUsage(userId, known) {
  try {
    localStorage.setItem(`${USAGE_KEY}.${userId}`, JSON.stringify(known));
  } catch {
    // Only the next visit without a server would have used it.
  }
}

/** What was kept, or null: also where it has another shape, which anybody on this origin can give it. */
export function keptUsage(userId) {
  try {
    const known = JSON.parse(localStorage.getItem(`${USAGE_KEY}.${userId}`));
    return isUsage(known?.usage) && Number.isFinite(known.unsettledTokens) ? known : null;
  } catch {
    return null;
  }
}

function randomId() {
  if (crypto.randomUUID) return crypto.randomUUID(); // Only pages served securely have it.
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
