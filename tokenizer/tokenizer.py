"""The tokenizer of a Mixtral checkpoint: text to ids and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from tokenizer import chat, conversation, tool_messages
from tokenizer.chat import ChatVersion
from tokenizer.conversation import Turn, check_conversation
from tokenizer.encoder import Encoder
from tokenizer.errors import TokenizerError
from tokenizer.guard import Given, render_guarded
from tokenizer.model_file import find_model, read_model
from tokenizer.settings import Settings, Template, read_settings
from tokenizer.specials import Specials, extend, place, sort_tokens
from tokenizer.stream import StreamDecoder
from tokenizer.template import reads_tools, render, turn_end
from tokenizer.tokenizer_json import turn
from tokenizer.tool_messages import check_tools
from tokenizer.tools import OPENINGS
from tokenizer.vocabulary import Vocabulary, parse_model
from tokenizer.wire import WireError

PROBE = "  Zwölf\tfoxes 🦊, 12 of them:\n\n  x = 1  "


class Tokenizer:
    """A sentencepiece model with a checkpoint's added tokens.

    Text stays text: `encode` and `encode_chat` give no control id for anything that a user writes. `decode`
    gives back what was encoded, if the model keeps text unchanged, as Mixtral's models do (by identity
    normalization, all spaces and byte fallback). The one exception is U+2581, with which sentencepiece writes
    a space. It comes back as a space.

    bos_id, eos_id  of the sentencepiece model
    ends            the ids that end a text, by all files of the checkpoint
    takes_tools     whether conversations may have tools
    vocab_size      how many ids have a meaning
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: Encoder,
        specials: Specials,
        template: Template | None = None,
        vocab: int | None = None,
    ) -> None:
        """Without a `template`, conversations have Mistral's own format. `vocab` is the number of the model's
        ids. They can all be decoded, even those without a meaning."""
        self._encoder = encoder
        self.bos_id, self.eos_id = encoder.bos_id, encoder.eos_id
        self.vocab_size = len(vocabulary.decoded)
        self.vocabulary = vocabulary.padded(vocab or 0)
        self.specials = specials
        self.template = template
        self.ends = specials.ends
        self.takes_tools = reads_tools(template) if template else chat.takes_tools(vocabulary.control)
        if template is not None and (end := turn_end(self._written)) is not None:
            self.ends |= {end}

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        chat_template: str | PathLike[str] | None = None,
        vocab: int | None = None,
    ) -> Tokenizer:
        """Load from a checkpoint folder, or from the `tokenizer.model` or `tokenizer.json` itself.

        In a folder, the files beside it count too (see `tokenizer.settings`). The template in
        the file `chat_template`, or else the folder's own, writes conversations. If there is none, or the
        folder's is Mistral's, they have the format of Mistral's reference encoder. `vocab` is the number of
        the model's ids.

        Raises `TokenizerError` if there is no such file, or if this runtime cannot use it.
        """
        file = find_model(path)
        folder = file.parent if Path(path) != file else None
        settings = read_settings(folder, Path(chat_template) if chat_template is not None else None)
        data = read_model(file)
        if file.suffix == ".json":
            data, settings = turn(file, data, settings)
        vocabulary, encoder = load_model(file, data, settings)
        tokens = place(settings, encoder.piece_id, len(vocabulary.decoded), vocab)
        specials = sort_tokens(settings, tokens, vocabulary, encoder)
        template = settings.template
        if chat_template is None and template is not None and is_mistrals(template, specials):
            template = None
        return cls(extend(vocabulary, tokens), encoder, specials, template, vocab)

    @property
    def chat_version(self) -> ChatVersion:
        """The chat format, which the control pieces tell. It is V1 if `[INST]` is not among them.

        Raises `TokenizerError` if the vocabulary's chat format is later than V3.
        """
        return chat.chat_version(self.vocabulary.control)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Return the ids of a text, with the begin piece before them if `bos`.

        Raises `TokenizerError` if `text` is not a str, or if it holds half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"text must be a str, got {type(text).__name__}")
        check_text(text)
        ids = self._encoder.encode(self.specials.words.split(text))
        return [self.bos_id, *ids] if bos else ids

    def control_in(self, text: str) -> list[str]:
        """Return the control tokens that `text` spells. To `encode` they are text like any other."""
        return self.specials.control.found(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Control pieces vanish. Each byte of broken UTF-8 becomes U+FFFD.

        Raises `TokenizerError` if an id is not in the vocabulary.
        """
        stream = self.stream()
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def stream(self, prefix: Iterable[int] = ()) -> StreamDecoder:
        """Return a decoder of ids as they come. They continue the ids of `prefix` (see `StreamDecoder`).

        Raises `TokenizerError` if an id of `prefix` is not in the vocabulary.
        """
        return StreamDecoder(self.vocabulary, prefix)

    def encode_chat(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] | None = None
    ) -> list[int]:
        """Return the ids of a conversation, up to and with the message that waits for an answer.

        `messages` are dicts of "role" and "content". A system message may come first. Then user and assistant
        take turns, and the user comes last. Content is a str, or a list of {"type": "text", "text": str}.

        With tools, messages and `tools` have the form of OpenAI's API (see `tokenizer.tool_messages`). An
        assistant's message may have "tool_calls", and one of the role "tool" with the "tool_call_id" follows
        for each call. The last of these may end the conversation.

        Raises `TokenizerError` if the messages are not such a conversation, if their text cannot be encoded,
        if there are tools and the format takes none, if the chat template does not write the conversation,
        or if there is no template and the chat format is later than V3.
        """
        turns, listed = check_conversation(messages), check_tools(tools)
        if not self.takes_tools and (listed or any(turn.calls for turn in turns)):
            raise TokenizerError(
                "this model's chat format has no tools; leave out tools and messages about them, or give a "
                "template that writes them with --chat-template FILE"
            )
        if self.template is None:
            encode = partial(self.encode, bos=False)
            return chat.encode_chat(turns, listed, encode, self.vocabulary.control, self.bos_id, self.eos_id)
        words = (word for part in self._written(turns, listed) for word in self._with_words(part))
        return self._encoder.encode(words)

    @property
    def tool_calls_id(self) -> int | None:
        """The control token with which an answer begins that calls tools. None if the format has none."""
        written = self.template.text + (self.template.tools or "") if self.template else chat.CALLS
        known = self.specials.control.tokens
        found = [known[name].id for name in OPENINGS if name in known and name in written]
        return found[0] if self.takes_tools and found else None

    def answer_stream(self, conversation: Sequence[int]) -> StreamDecoder:
        """Return a decoder of the answer to a conversation, of which `encode_chat` gave the ids.

        After Mistral's own format and after a control token, the answer is a text of its own, and its leading
        space is the encoder's. Otherwise it continues the template's text.
        """
        ends_in_text = conversation and conversation[-1] not in self.vocabulary.control.values()
        return self.stream(conversation if self.template is not None and ends_in_text else ())

    def _written(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> list[str | int]:
        """Return a conversation as the template writes it: texts, and ids of control tokens."""
        assert self.template is not None
        names = {"bos_token": self._encoder.piece(self.bos_id), "eos_token": self._encoder.piece(self.eos_id)}
        write = partial(render, self.template, names={**names, **self.specials.names})

        def give(change: Callable[[str], str]) -> Given:
            return conversation.for_template(turns, change), tool_messages.for_template(tools, change)

        give(check_text)
        taken = [self.template.text, self.template.tools or ""]
        return render_guarded(write, give, self.specials.control, taken)

    def _with_words(self, part: str | int) -> Iterable[str | int]:
        return [part] if isinstance(part, int) else self.specials.words.split(part)


def load_model(file: Path, data: bytes, settings: Settings) -> tuple[Vocabulary, Encoder]:
    """Make an encoder of a sentencepiece model. `file` is where it comes from. Raises `TokenizerError` if
    it cannot be used."""
    special = {token.content for token in (*settings.added, *settings.special) if token.special}
    try:
        vocabulary, safe_model = parse_model(data, special)
    except WireError as error:
        raise TokenizerError(
            f"{file}: {error}; not a sentencepiece model, or cut short: download it again"
        ) from None
    try:
        encoder = Encoder(safe_model, settings.prefix)
        probe = encoder.encode([PROBE])
        expected = encoder.decode(probe)
    except (RuntimeError, ValueError, LookupError, OSError):
        raise TokenizerError(
            f"{file}: sentencepiece refuses this model of {len(vocabulary.decoded)} pieces; download it again"
        ) from None
    if min(encoder.bos_id, encoder.eos_id) < 0:
        raise TokenizerError(
            f"{file}: names no begin or end piece (bos {encoder.bos_id}, eos {encoder.eos_id}); "
            "train it with bos_id and eos_id"
        )
    stream = StreamDecoder(vocabulary)
    if "".join([stream.push(i) for i in probe]) + stream.flush() != expected:
        raise TokenizerError(
            f"{file}: sentencepiece decodes {len(probe)} test ids differently from this runtime, "
            "which knows no denormalizer; train the model without one"
        )
    return vocabulary, encoder


def is_mistrals(template: Template, specials: Specials) -> bool:
    """Tell whether a folder's template approximates the format that `tokenizer.chat` writes exactly.

    Such a template has Mistral's tags and not Llama's system tags, and there are no added tokens.
    """
    return not specials.added and chat.BEGIN in template.text and "<<SYS>>" not in template.text


def check_text(text: str) -> str:
    """Return a text that UTF-8 can write. Raises `TokenizerError` if it holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}); "
            "it stands for no character; remove it"
        ) from None
    return text
