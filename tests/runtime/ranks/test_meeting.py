from typing import Any

from runtime.ranks.lost import Lost
from runtime.ranks.meeting import Meeting
from tests.runtime.ranks.together import succeed, together


def test_values_are_shared_in_the_order_of_ranks() -> None:
    def work(meeting: Meeting) -> Any:
        assert meeting.size == 3 and len(set(meeting.hosts)) == 1 and meeting.host == meeting.hosts[0]
        return [meeting.share(f"topic {i}", {"rank": meeting.rank, "i": (i, None, "ä\n")}) for i in range(20)]

    for shared in succeed(3, work):
        assert shared == [[{"rank": r, "i": [i, None, "ä\n"]} for r in range(3)] for i in range(20)]


def test_one_rank_alone_shares_with_itself() -> None:
    assert succeed(1, lambda meeting: meeting.share("x", 1)) == [[1]]


def test_a_failure_is_told_to_all_in_its_own_words() -> None:
    def work(meeting: Meeting) -> Any:
        if meeting.rank == 1:
            meeting.fail("/x: no such\nfolder")
        return meeting.share("x", 1)

    for error in together(3, work):
        assert isinstance(error, Lost) and str(error) == "rank 1: /x: no such folder"


def test_a_rank_that_closes_before_it_shares_is_named() -> None:
    def work(meeting: Meeting) -> Any:
        if meeting.rank != 1:
            return meeting.share("offer", 1)

    for error in together(3, work)[::2]:
        assert (
            isinstance(error, Lost)
            and "rank 1" in str(error)
            and "closed before it told its offer" in str(error)
        )


def test_a_rank_that_shares_and_closes_is_heard() -> None:
    for _ in range(20):
        assert succeed(2, lambda meeting: meeting.share("x", meeting.rank)) == [[0, 1], [0, 1]]
