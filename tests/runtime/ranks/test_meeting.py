import socket
import time
from typing import Any

import pytest
from torch.distributed import HashStore

from runtime.errors import DeviceError
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


def test_ranks_that_do_not_come_are_named() -> None:
    line = "of 3 ranks, 0 and 2 have not come in time; look at their output"
    with pytest.raises(DeviceError, match=line):
        Meeting(HashStore(), 1, 3, 1.0, patience=0.1)


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    return monkeypatch


def test_nobody_at_the_meeting_place(
    variables: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line, soon, and no stack of PyTorch's."""
    started = time.monotonic()
    with pytest.raises(DeviceError, match=r"cannot meet at 127.0.0.1:\d+ .*refused; is rank 0 up"):
        Meeting.join(1.0, patience=0.2)
    assert time.monotonic() - started < 15
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("RANK", None, "ranks find each other by the variables RANK, .* and RANK is not set; start"),
        ("WORLD_SIZE", "x", "WORLD_SIZE='x' is not a whole number from 1 to 65536"),
        ("RANK", "2", "RANK='2' is not a whole number from 0 to 1"),
        ("MASTER_PORT", "70000", "MASTER_PORT='70000' is not a whole number from 1 to 65535"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK='-1' is not a whole number from 0 to 1"),
        ("MASTER_ADDR", "no.such.host.invalid", "cannot meet at no.such.host.invalid:"),
    ],
)
def test_variables_that_make_no_sense(
    variables: pytest.MonkeyPatch, name: str, value: str | None, line: str
) -> None:
    if value is None:
        variables.delenv(name)
    else:
        variables.setenv(name, value)
    with pytest.raises(DeviceError, match=line) as raised:
        Meeting.join(1.0, patience=0.1)
    assert "\n" not in str(raised.value)


def test_an_interface_that_is_not_there(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("RANK", "0")
    variables.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    with pytest.raises(DeviceError, match="GLOO_SOCKET_IFNAME='nosuch0': no interface of that name"):
        Meeting.join(1.0, patience=60)


def test_a_port_that_is_taken(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("RANK", "0")
    with socket.create_server(("", 0)) as server:
        variables.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(DeviceError, match=r"in use.*; take another port"):
            Meeting.join(1.0, patience=0.1)


def test_a_store_whose_host_gives_up_first_is_one_line() -> None:
    class Gone(HashStore):
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection reset by peer\nException raised from recvBytes")

    with pytest.raises(DeviceError, match=r"^the ranks' store has ended before all had met; .* rank 0"):
        Meeting(Gone(), 0, 2, 1)
