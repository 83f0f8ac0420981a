"""Whatever the pieces, the text given out ends before the first stop string, and nothing leaks early."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.ingress.stop_strings import StopStrings

texts = st.text(alphabet="abc", max_size=30)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def up_to_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: read character by character until the text ends in a stop; the longest such one is cut off."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@given(st.lists(texts, max_size=8), stop_lists)
def test_pieces_join_to_the_text_before_the_first_stop(pieces: list[str], stops: list[str]):
    cutter = StopStrings(stops)
    expected, found = up_to_first_stop("".join(pieces), stops)
    given_out, read = "", ""
    for piece in pieces:
        given_out += cutter.push(piece)
        read += piece
        assert expected.startswith(given_out)
        if not cutter.found:  # held back is only what may still become a stop
            held = read[len(given_out) :]
            assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
    given_out += cutter.finish()
    assert (given_out, cutter.found) == (expected, found)


def test_a_stop_across_pieces_is_cut_and_the_rest_is_dropped():
    cutter = StopStrings(["<|end|>"])
    assert [cutter.push(p) for p in ("some ", "text <", "|e", "nd|> more", "even more")] == [
        "some ",
        "text ",
        "",
        "",
        "",
    ]
    assert cutter.found


def test_a_beginning_that_goes_on_otherwise_is_given_out_late():
    cutter = StopStrings(["aab"])
    assert [cutter.push(p) for p in ("a", "a", "a", "c")] == ["", "", "a", "aac"]
    assert cutter.finish() == "" and not cutter.found


def test_the_stop_that_completes_first_wins_and_of_equals_the_longest():
    assert StopStrings(["abcd", "bc"]).push("xabcd") == "xa"
    assert StopStrings(["bc", "abc"]).push("xabcd") == "x"
