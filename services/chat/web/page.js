/** The page around the rail: who is chatting, the plans, and how to embed. */

import { h } from "./layout.js";
import { planName, tokensText } from "./usage.js";

const PERIODS = { day: "a day", month: "a month", none: "in all" };
const ESCAPES = { "&": "&amp;", '"': "&quot;", "<": "&lt;", ">": "&gt;" };

const rail = document.querySelector("chat-rail");
const cards = new Map();

const userId = new URLSearchParams(location.search).get("userId");
if (userId) rail.setAttribute("user-id", userId);

customElements.whenDefined("chat-rail").then(() => {
  document.querySelector("#user").textContent = rail.userId;
  document.querySelector("#embed").textContent = embedCode();
});

rail.addEventListener("usage", ({ detail }) => markPlan(detail.tier));
rail.addEventListener("upgrade", ({ detail }) => showPlan(detail.upgradeTo));
showPlans();

function embedCode() {
  return [
    `<script type="module" src="${location.origin}/web/chat-rail.js"></script>`,
    `<chat-rail user-id="${escaped(rail.userId)}"></chat-rail>`,
  ].join("\n");
}

function escaped(text) {
  return text.replace(/[&"<>]/g, (character) => ESCAPES[character]);
}

async function showPlans() {
  const response = await fetch("/api/plans").catch(() => null);
  const section = document.querySelector("#plans").closest("section");
  section.hidden = !response?.ok;
  if (section.hidden) return;
  const { plans } = await response.json();
  for (const plan of plans) cards.set(plan.tier, planCard(plan));
  document.querySelector("#plans").replaceChildren(...cards.values());
  if (rail.usage) markPlan(rail.usage.tier);
}

function planCard({ tier, tokensLimit, period, pricePer1kTokensUsd }) {
  return h("li", { class: "plan", tabindex: "-1" }, [
    h("h3", {}, [planName(tier)]),
    h("p", { class: "amount" }, [tokensLimit === null ? "Unlimited" : tokensText(tokensLimit)]),
    h("p", { class: "unit" }, [tokensLimit === null ? "tokens" : `tokens ${PERIODS[period] ?? ""}`]),
    h("p", { class: "price" }, [priceText(pricePer1kTokensUsd)]),
  ]);
}

function priceText(usd) {
  if (usd === null) return "Priced by contract";
  return Number(usd) === 0 ? "Free of charge" : `$${usd} per 1,000 tokens`;
}

function markPlan(tier) {
  for (const [name, card] of cards) {
    if (name === tier) card.setAttribute("aria-current", "true");
    else card.removeAttribute("aria-current");
  }
}

function showPlan(tier) {
  const card = cards.get(tier);
  card?.scrollIntoView({ block: "center", behavior: "smooth" });
  card?.focus({ preventScroll: true });
}
