"""Server-sent events as the network brings them: in pieces of any size, with any of three line endings."""

from codecs import BOM_UTF8
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.chat.sse import SseParser, frame

LINE_ENDINGS = [b"\r\n", b"\n", b"\r"]
# Unicode's other line ends (U+0085, U+2028) end no line here.
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=20).map(str.encode)
NAME = LINE.filter(lambda name: not name.startswith(b" "))
# What the standard has a reader ignore.
NOISE = st.lists(
    st.one_of(LINE.map(lambda text: b":" + text), st.sampled_from([b"id: 7", b"retry: 3000", b"no colon"]))
)


class Sent(NamedTuple):
    event: bytes
    data: list[bytes]
    noise: list[bytes]

    @property
    def lines(self) -> list[bytes]:
        return [b"event: " + self.event, *self.noise, *(b"data: " + line for line in self.data), b""]


SENT = st.lists(st.builds(Sent, NAME, st.lists(LINE, min_size=1, max_size=3), NOISE), max_size=4)


def parsed(*chunks: bytes) -> list[tuple[bytes, bytes]]:
    parser = SseParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


@st.composite
def streams(draw: st.DrawFn, sent: list[Sent]) -> bytes:
    """The events on the wire, each line with an ending of its own."""
    stream = b""
    for line in (line for event in sent for line in event.lines):
        # LF after CR ends the same line, not an empty one.
        endings = [b"\r\n", b"\r"] if not line and stream.endswith(b"\r") else LINE_ENDINGS
        stream += line + draw(st.sampled_from(endings))
    return stream + b":"


@given(SENT, st.data())
def test_events_are_the_same_wherever_bytes_are_cut_and_however_lines_end(
    sent: list[Sent], data: st.DataObject
) -> None:
    stream = data.draw(streams(sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    assert parsed(*pieces) == [(event.event, b"\n".join(event.data)) for event in sent]


@pytest.mark.parametrize("end", LINE_ENDINGS)
def test_bytes_that_come_one_at_a_time_are_understood(end: bytes) -> None:
    stream = end.join([b"event: delta", "data: 🛤 naïve".encode(), b"", b"data: two", b"data: lines", b"", b":"])
    assert parsed(*(bytes([byte]) for byte in stream)) == [(b"delta", "🛤 naïve".encode()), (b"", b"two\nlines")]


def test_an_event_is_given_as_soon_as_it_is_whole() -> None:
    parser = SseParser()
    assert list(parser.feed(b"data: 1\n")) == []
    assert list(parser.feed(b"\ndata: 2")) == [(b"", b"1")]
    assert list(parser.feed(b"\n\n")) == [(b"", b"2")]


def test_an_event_that_was_cut_off_is_none() -> None:
    assert parsed(b"event: delta\ndata: half of") == []


def test_a_mark_of_the_byte_order_at_the_beginning_is_passed_over() -> None:
    parser = SseParser()
    stream = BOM_UTF8 + b"event: one\ndata: 1\n\nevent: two\ndata: 2\n\n"
    found = [event for byte in stream for event in parser.feed(bytes([byte]))]
    assert found == list(SseParser().feed(stream)) == [(b"one", b"1"), (b"two", b"2")]


def test_what_carries_no_data_is_no_event() -> None:
    assert parsed(b": keep-alive\n\n", b"event: delta\n\n", b"\n\n\n") == []


def test_one_space_after_the_colon_is_no_part_of_the_value() -> None:
    assert parsed(b"data:none\n\ndata: one\n\ndata:  two\n\ndata:\n\n") == [
        (b"", b"none"),
        (b"", b"one"),
        (b"", b" two"),
        (b"", b""),
    ]


@given(NAME, LINE)
def test_a_frame_is_read_as_it_was_written(event: bytes, data: bytes) -> None:
    assert parsed(frame(event, data)) == [(event, data)]
