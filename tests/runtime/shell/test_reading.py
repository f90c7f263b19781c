"""Messages typed at a terminal: editing, history, several lines, and what Ctrl-C and Ctrl-D do."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.runtime.shell.terminal import CTRL_C, CTRL_D, LEFT, UP, Terminal, pasted

# Says what it read, without an editor if it is told so. Torch is not imported, so it starts in no time.
READER = """
import signal, sys
from runtime.errors import RequestError
from runtime.shell import reading
if "plain" in sys.argv:
    reading.line_editor = lambda: None
reader = reading.MessageReader()
def more(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, more)
message = ""
while message is not None:
    try:
        message = reader.read()
        print(f"<{message!r}>", flush=True)
    except KeyboardInterrupt:
        print("<interrupted>", flush=True)
    except RequestError as error:
        print(f"<{error}>", flush=True)
print("torch" in sys.modules)
"""


@pytest.fixture(params=["edited", "plain"])
def either(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    """A reader with an editor, and one without."""
    with Terminal("-c", READER, request.param) as terminal:
        terminal.until("> ")
        yield terminal


@pytest.fixture
def edited() -> Iterator[Terminal]:
    with Terminal("-c", READER) as terminal:
        terminal.until("> ")
        yield terminal


def read(terminal: Terminal, *keys: str | bytes) -> str:
    """What the program has read after these keys. Then it asks again."""
    for each in keys:
        if each == CTRL_C:
            terminal.interrupt()
        else:
            terminal.type(each)
    terminal.until("<")
    message = terminal.until(">\n")[:-2]
    terminal.until("> ")
    return message


def test_messages(either: Terminal) -> None:
    assert read(either, "Hello é🦊\r") == "'Hello é🦊'"
    assert read(either, "\r") == "''"
    assert read(either, "/stats\r") == "'/stats'"
    either.type(CTRL_D)
    assert either.rest().endswith("<None>\nFalse\n")
    assert either.process.wait(60) == 0


def test_a_backslash_at_the_end_begins_another_line(either: Terminal) -> None:
    either.type("one\\\r")
    either.until("... ")
    either.type("\\\r")
    either.until("... ")
    assert read(either, "two\r") == r"'one\n\ntwo'"
    assert read(either, "a \\\\\r") == r"'a \\\\'"  # LaTeX's end of a line
    either.type("one\\\r")
    either.until("... ")
    assert read(either, CTRL_D) == "'one'"


def test_lines_that_arrive_together_are_one_message(either: Terminal) -> None:
    """As a terminal pastes them that puts no brackets around them. Backslashes in them stay."""
    assert read(either, "#define f \\\r\tg(x)\rdone\r") == r"'#define f \\\n\tg(x)\ndone'"
    assert read(either, "/help me\r") == "'/help me'"


def test_a_command_is_one_line_even_if_more_was_typed_ahead(either: Terminal) -> None:
    either.type("/stats\rHello\r")
    either.until("<'/stats'>")
    either.until("<'Hello'>")


def test_ctrl_c_drops_what_is_typed_and_interrupts_an_empty_prompt(edited: Terminal) -> None:
    assert read(edited, CTRL_C) == "interrupted"
    edited.type("half a mess")
    edited.until("mess")
    assert read(edited, CTRL_C) == "''"
    assert read(edited, CTRL_C) == "interrupted"
    edited.type("one\\\r")
    edited.until("... ")
    assert read(edited, CTRL_C) == "''"
    assert read(edited, "after\r") == "'after'"


def test_ctrl_c_without_an_editor() -> None:
    with Terminal("-c", READER, "plain") as terminal:
        terminal.until("> ")
        assert read(terminal, CTRL_C) == "interrupted"
        terminal.type("one\\\r")
        terminal.until("... ")
        assert read(terminal, CTRL_C) == "''"
        assert read(terminal, "after\r") == "'after'"


def test_lines_are_edited(edited: Terminal) -> None:
    assert read(edited, "ello", LEFT * 4, "H", "\x05!\r") == "'Hello!'"
    assert read(edited, "one two", "\x17", "three\r") == "'one three'"


def test_pasted_lines_are_one_message_and_one_entry_of_the_history(edited: Terminal) -> None:
    text = "def f():\n\treturn 1\n\n/reset\n"
    edited.type(pasted(text))
    edited.until("/reset")
    assert read(edited, "\r") == repr(text.removesuffix("\n"))
    assert read(edited, pasted("a\rb"), " c\r") == r"'a\nb c'"
    assert read(edited, UP, UP, "\r") == repr(text.removesuffix("\n"))


def test_history_has_whole_messages_once(edited: Terminal) -> None:
    edited.type("one\\\r")
    edited.until("... ")
    first = read(edited, "two\r")
    for words in ("again\r", "again\r", "  \r"):
        read(edited, words)
    assert read(edited, UP, "\r") == "'again'"
    assert read(edited, UP, UP, "\r") == first == r"'one\ntwo'"


def test_what_is_not_utf8_is_said(either: Terminal) -> None:
    assert read(either, b"a\xffb\r") == "the message is not UTF-8: byte 0xff at offset 1; save it as UTF-8"
    assert read(either, "fine\r") == "'fine'"


def test_the_prompt_goes_to_stderr_where_stdout_is_no_terminal() -> None:
    with Terminal("-c", READER, stdout=subprocess.PIPE) as terminal:
        assert terminal.until("> ") == "> "
        terminal.type("Hello\r")
        assert terminal.process.stdout.readline() == b"<'Hello'>\n"
        terminal.process.stdout.close()


def test_an_ignored_interrupt_stays_ignored() -> None:
    program = READER.replace("signal.SIGINT, more", "signal.SIGINT, signal.SIG_IGN")
    with Terminal("-c", program) as terminal:
        terminal.until("> ")
        terminal.type("He")
        terminal.until("He")
        assert read(terminal, CTRL_C, "llo\r") == "'Hello'"
