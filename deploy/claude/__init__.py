"""A stand-in for Claude's Messages API: a process of its own that the anthropic SDK cannot tell from the real one.

    python -m deploy.claude --host 127.0.0.1 --port 8010 [--delay-ms 15] [--data DIR]

The same request always gets the same answer and the same counts. A caller steers its own request, and no other, with
directives anywhere in the last user message:

    [slow 50ms]                      wait before each delta (ms or s)
    [first-byte 2s]                  wait before anything is answered
    [deltas 200]                     the number of text deltas
    [usage input=5282 output=2812]   the counts to report, either or both; output still ends at max_tokens
    [cache creation=100 read=200]    cached input to report, on top of the input tokens
    [stop refusal]                   the stop reason to report
    [repeat-delta-usage]             several cumulative message_delta events instead of one
    [together]                       all deltas written at once: cheapest, for a bench that measures something else
    [split]                          bytes in odd pieces, through lines and through UTF-8 characters
    [tag invoice-7]                  a name to find this request by, among the records of /given
    [fail 529]                       refuse with 400, 401, 402, 403, 404, 413, 429, 500, 503, 504 or 529
    [hang before]                    nothing is answered until the caller leaves; nothing is given
    [no message_delta]               leave out the last counts, or with [no message_stop] the last word
    [fail middle]                    an SSE error event after half of the deltas (529 when not streamed)
    [cut middle]                     the connection is dropped after half of the deltas
    [hang middle]                    silence after half of the deltas, until the caller leaves
    [ping middle]                    nothing but pings after half of the deltas, twenty a second
    [garbage middle]                 bytes that are no event after half of the deltas

A directive that cannot be read is a 400 that quotes it, so that a test's typing error is not taken for a question.

`GET /given` tells what was really given, to hold a ledger against: input tokens from the moment message_start was
sent, output tokens of the deltas that were sent. A request refused before that was given nothing.
"""
