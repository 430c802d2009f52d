"""Whatever way the bytes are cut, what is shown is valid, joins to the text, and never shows a stop string."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gptscale.generate.text import TextStream


def shown(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(stop)
    out = [stream.push(piece) for piece in pieces]
    return [*out, stream.finish()], stream


@given(st.text(), st.lists(st.integers(0, 200)))
def test_any_text_cut_anywhere_comes_out_whole(text: str, cuts: list[int]) -> None:
    data = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    out, stream = shown(pieces)
    assert "".join(out) == stream.text == data.decode()


def test_an_unfinished_character_is_held_back() -> None:
    snowman = "☃".encode()
    assert shown([b"a" + snowman[:1], snowman[1:2], snowman[2:] + b"b"])[0] == ["a", "", "☃b", ""]
    assert shown([b"a" + snowman[:2]])[0] == ["a", ""]
    assert shown([b"a\xff", b"b"])[0] == ["a\ufffd", "b", ""]


def test_what_may_begin_a_stop_is_held_back() -> None:
    assert shown([b"on", b"e S", b"T", b"OP two"], ("STOP",))[0] == ["on", "e ", "", "", ""]
    assert shown([b"one ST", b"ART"], ("STOP",))[0] == ["one ", "START", ""]
    assert shown([b"one ST"], ("STOP",))[0] == ["one ", "ST"]
    out, stream = shown([b"x\n", b"\ny"], ("\n\n",))
    assert (stream.text, stream.stopped, "".join(out)) == ("x", True, "x")
    assert stream.push(b"more") == stream.finish() == ""


@given(st.text("ab\n", max_size=40), st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stops_cut_where_the_first_to_be_complete_begins(text: str, stops: list[str]) -> None:
    out, stream = shown([c.encode() for c in text], tuple(stops))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first_end = min((end for end, _ in ends), default=None)
    expected = text if first_end is None else text[: min(start for end, start in ends if end == first_end)]
    assert "".join(out) == stream.text == expected
    assert stream.stopped == bool(ends)
    assert not any(stop in stream.text for stop in stops)
