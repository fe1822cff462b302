/** The rail's elements: `buildLayout()` gives the tree and its named parts. */

const SUGGESTIONS = [
  "Explain what a token is, in two sentences",
  "Plan a quiet weekend in Lisbon",
  "Write a haiku about a night train",
];

export function buildLayout({ stylesheet }) {
  const parts = {};
  const named = (name, node) => (parts[name] = node);

  const head = h("header", { class: "head" }, [
    named("heading", h("h2", { class: "heading" }, ["Chat"])),
    named("plan", h("span", { class: "plan", hidden: true })),
    named("fresh", h("button", { class: "quiet fresh", type: "button", hidden: true }, ["New chat"])),
  ]);

  const simulated = named(
    "simulated",
    h("p", { class: "notice", role: "note", hidden: true }, ["Answers are simulated: no ANTHROPIC_API_KEY is set."]),
  );

  const welcome = named(
    "welcome",
    h("div", { class: "welcome" }, [
      h("h3", {}, ["What is on your mind?"]),
      h("p", {}, ["Ask anything. What an answer costs is shown below, as it is counted."]),
      named(
        "suggestions",
        h("ul", { class: "suggestions", "aria-label": "Suggestions" }, SUGGESTIONS.map((text) =>
          h("li", {}, [h("button", { type: "button", class: "suggestion" }, [text])]),
        )),
      ),
    ]),
  );

  const conversation = h("div", { class: "conversation" }, [
    named(
      "log",
      h("div", { class: "log", role: "log", "aria-live": "polite", "aria-label": "Conversation", tabindex: "0" }, [welcome]),
    ),
    named("latest", h("button", { class: "latest", type: "button", hidden: true }, ["Latest ↓"])),
  ]);

  const problem = named(
    "problem",
    h("div", { class: "notice problem", role: "alert", hidden: true }, [
      h("p", {}, [named("problemTitle", h("strong")), " ", named("problemDetail", h("span"))]),
      named("retry", h("button", { class: "quiet", type: "button" }, ["Try again"])),
    ]),
  );

  const meter = named(
    "meter",
    h("div", { class: "meter" }, [
      h("div", { class: "figures" }, [
        named("line", h("p", { class: "line" }, ["Counting…"])),
        named("upgrade", h("button", { class: "upgrade", type: "button", hidden: true })),
        named("percent", h("span", { class: "percent", "aria-hidden": "true" })),
      ]),
      named(
        "bar",
        h("div", {
          class: "bar",
          role: "progressbar",
          "aria-label": "Tokens remaining",
          "aria-valuemin": "0",
          "aria-valuemax": "100",
        }, [named("fill", h("div", { class: "fill" }))]),
      ),
      h("p", { class: "small", role: "status" }, [
        named("reason", h("span")),
        " ",
        named("reset", h("span", { hidden: true }, [named("resetLabel", h("span")), " ", named("resetTime", h("time"))])),
      ]),
      named("local", h("p", { class: "notice local", role: "status", hidden: true })),
    ]),
  );

  const composer = named(
    "composer",
    h("form", { class: "composer" }, [
      problem,
      meter,
      h("div", { class: "box" }, [
        named(
          "input",
          h("textarea", { "aria-label": "Message", placeholder: "Write a message", rows: "1", enterkeyhint: "send" }),
        ),
        named("send", h("button", { class: "primary", type: "submit", disabled: true }, ["Send"])),
        named("halt", h("button", { class: "primary halt", type: "button", hidden: true }, ["Stop"])),
      ]),
      h("p", { class: "small keys" }, ["Enter to submit, Shift+Enter for a new line"]),
    ]),
  );

  parts.stylesheet = h("link", { rel: "stylesheet", href: stylesheet });
  // Shown when its style is there: a page must not flash bare controls.
  parts.rail = h("section", { class: "rail", part: "rail", "aria-label": "Chat", hidden: true }, [head, simulated, conversation, composer]);
  return { nodes: [parts.stylesheet, parts.rail], parts };
}

/** One message of the conversation, with the node its text grows in. */
export function buildMessage(role) {
  const text = document.createTextNode("");
  const note = h("p", { class: "message-note", hidden: true });
  const node = h("article", { class: "message", "data-role": role }, [
    h("span", { class: "visually-hidden" }, [role === "user" ? "You:" : "Claude:"]),
    h("p", { class: "text" }, [text]),
    note,
  ]);
  return { node, text, note };
}

export function h(tag, attributes = {}, children = []) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
