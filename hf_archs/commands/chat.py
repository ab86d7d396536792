"""``hf-archs chat``: a conversation in the terminal, or over a pipe with a message in each line."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TextStreamer

from hf_archs.commands import sentences
from hf_archs.commands.conversation import Conversation
from hf_archs.commands.loading import load_ready

HELP = """\
/save FILE  write the conversation and its state to a file
/load FILE  go on with the conversation of a file, in place of this one
/undo       take the last turn back
/tokens     tokens read and written, each with its tokens per second, and the size of the state
/help       this list
/quit       end, as Ctrl-D does
Ctrl-C ends an answer; a second one drops the turn. A message that begins with / is written with a space before it."""


def chat(model: str, adapter: str | None, tokenizer: str | None, **options: Any) -> None:
    """Answer the lines of stdin until it ends.

    Args:
        model, adapter, tokenizer: as for `load_ready`.
        options: as for `Conversation`.
    """
    conversation = Conversation(*load_ready(model, adapter, tokenizer), **options)
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if not reply(conversation, line.rstrip("\n"), print):
                return
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its editing and history; Windows has none
    print("/help lists the commands.")
    while True:
        try:
            if not reply(conversation, input("> "), print):
                return
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n/quit ends the conversation.")
        except Exception as error:
            if not sentences.is_expected(error):
                raise
            sentences.report(error)


def reply(conversation: Conversation, line: str, say: Callable[[str], None]) -> bool:
    """Obey a line of the user: a command, or a message, whose answer is printed while it is generated.

    Returns:
        whether the conversation goes on.

    Raises:
        ValueError: for an unknown command, or one without its file.
    """
    command, _, argument = line.strip().partition(" ")
    if not line.startswith("/"):
        if line.strip():
            _answer(conversation, line.strip(), say)
    elif command in ("/save", "/load"):
        if not argument.strip():
            raise ValueError(f"{command} names no file; allowed is {command} FILE")
        (conversation.save if command == "/save" else conversation.load)(argument.strip())
        say(f"{len(conversation.turns)} turns, {len(conversation.ids):,} tokens")
    elif line.strip() == "/undo":
        say(f"taken back: {conversation.undo().message}")
    elif line.strip() == "/tokens":
        say(counts(conversation))
    elif line.strip() == "/help":
        say(HELP)
    elif line.strip() == "/quit":
        return False
    else:
        raise ValueError(f"{line.strip()!r} is no command; /help lists them")
    return True


def counts(conversation: Conversation) -> str:
    """The tokens that were read and written, in one line."""
    c = conversation.counts
    read = f"read {c.read:,} tokens ({c.read / max(c.reading, 1e-9):,.1f} a second)"
    if c.again:
        read += f", {c.again:,} of them again"
    written = f"written {c.written:,} ({c.written / max(c.writing, 1e-9):,.1f} a second)"
    return (
        f"{read}, {written}; the conversation has {len(conversation.ids):,}, its state {conversation.num_bytes:,} bytes"
    )


def _answer(conversation: Conversation, message: str, say: Callable[[str], None]) -> None:
    streamer = TextStreamer(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        with _interruptible(conversation):
            conversation.say(message, streamer)
    except KeyboardInterrupt:
        say("\nthe turn is dropped")


@contextlib.contextmanager
def _interruptible(conversation: Conversation) -> Iterator[None]:
    """Ctrl-C ends the answer after the token in computation, and a second one raises `KeyboardInterrupt`."""

    def stop(*_: Any) -> None:
        if conversation.stopping:
            raise KeyboardInterrupt
        conversation.stopping = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
