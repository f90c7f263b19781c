"""Stop strings: what is shown, and when, for any text, however it is cut into pieces."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from runtime.stop import StopScanner

LETTERS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: read until a stop string is complete, and cut off the longest complete one."""
    for end in range(1, len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, ending))], True
    return text, False


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


@given(LETTERS, STOPS, st.lists(st.integers(0, 99), max_size=12))
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut_up(
    text: str, stops: list[str], places: list[int]
) -> None:
    scanner = StopScanner(stops)
    shown = "".join([scanner.push(piece) for piece in cut(text, places)])
    found = scanner.found
    assert (shown + scanner.flush(), found) == expected(text, stops)
    assert scanner.flush() == ""


@given(LETTERS, STOPS)
def test_nothing_is_held_back_that_no_further_text_could_turn_into_a_stop_string(
    text: str, stops: list[str]
) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for i, letter in enumerate(text, start=1):
        shown += scanner.push(letter)
        if scanner.found:
            break
        held = text[len(shown) : i]
        begun = [n for stop in stops for n in range(1, len(stop)) if text[:i].endswith(stop[:n])]
        assert held == text[i - max(begun, default=0) : i]


@given(st.lists(st.text()))
def test_without_stop_strings_text_passes_unchanged(pieces: list[str]) -> None:
    scanner = StopScanner([])
    assert [scanner.push(piece) for piece in pieces] == pieces
    assert scanner.flush() == "" and not scanner.found


def test_the_stop_string_that_is_whole_first_wins_over_the_one_that_began_first() -> None:
    for pieces in (["xabcdy"], ["xabc", "dy"], list("xabcdy")):
        scanner = StopScanner(["abcd", "bc"])
        assert "".join([scanner.push(piece) for piece in pieces]) == "xa"


def test_after_a_stop_string_nothing_more_is_shown() -> None:
    scanner = StopScanner(["!"])
    assert [scanner.push(piece) for piece in ("a!b", "c", "!")] == ["a", "", ""]
    assert scanner.flush() == ""


def test_a_stop_string_over_several_pieces_that_fails_late_is_given_back_whole() -> None:
    scanner = StopScanner(["<end>"])
    assert [scanner.push(piece) for piece in ("1 <", "en", "d", "? 2")] == ["1 ", "", "", "<end? 2"]
