/**
 * Read server-sent events as they come: yields `{ event, data }`, `event` being "message" where none is named.
 * Comments (keep-alives), `id` and `retry` are skipped; an event cut off by the end of the stream is dropped, as
 * the specification asks (https://html.spec.whatwg.org/multipage/server-sent-events.html).
 */
export async function* serverEvents(body) {
  let event = "";
  let data = [];
  for await (const line of lines(body)) {
    if (line === "") {
      if (data.length) yield { event: event || "message", data: data.join("\n") };
      event = "";
      data = [];
      continue;
    }
    const [, field, value] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
    if (field === "event") event = value ?? "";
    if (field === "data") data.push(value ?? "");
  }
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A CR at the very end may be the first half of a CRLF: it waits for the next chunk.
      const complete = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = complete.pop();
      yield* complete;
    }
  } finally {
    reader.cancel().catch(() => {}); // Already closed or aborted: nothing is left to release.
  }
}
