"""The tokenizer of a Mixtral checkpoint: text to ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path

from tokenizer import chat
from tokenizer.chat import ChatVersion
from tokenizer.conversation import check_conversation
from tokenizer.encoder import Encoder
from tokenizer.errors import TokenizerError
from tokenizer.guard import render_guarded
from tokenizer.model_file import find_model, read_model
from tokenizer.settings import Settings, Template, read_settings
from tokenizer.specials import Specials, extend, place, sort_tokens
from tokenizer.stream import StreamDecoder
from tokenizer.template import render, turn_end
from tokenizer.vocabulary import Vocabulary, parse_model
from tokenizer.wire import WireError

PROBE = "  Zwölf\tfoxes 🦊, 12 of them:\n\n  x = 1  "


class Tokenizer:
    """A sentencepiece model with a checkpoint's added tokens, guarded on the way in and decoded by a table on
    the way out.

    Text is only ever text: whatever a user writes, `encode` and `encode_chat` give no control id for it. With
    a model that keeps text as it is (identity normalisation, all spaces, byte fallback: Mixtral's are such),
    `decode` gives back what was encoded. The one exception is U+2581: sentencepiece itself writes a space so,
    and a space comes back.

    bos_id, eos_id  of the sentencepiece model
    ends            the ids that end a text, by all that the checkpoint's files say
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
        """`template` writes conversations, where Mistral's own format does not. Decoding takes the ids of a
        model with `vocab` of them, also those that have no meaning."""
        self._encoder = encoder
        self.bos_id, self.eos_id = encoder.bos_id, encoder.eos_id
        self.vocab_size = len(vocabulary.decoded)
        self.vocabulary = vocabulary.padded(vocab or 0)
        self.specials = specials
        self.template = template
        self.ends = specials.ends
        if template is not None and (end := turn_end(self._written)) is not None:
            self.ends |= {end}

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        chat_template: str | PathLike[str] | None = None,
        vocab: int | None = None,
    ) -> Tokenizer:
        """Load from a checkpoint folder, or from the `tokenizer.model` itself.

        Of a folder, the files beside `tokenizer.model` count too (see `tokenizer.settings`). Conversations
        are written by the template in the file `chat_template`, else by the folder's own, or, where that is
        none or Mistral's, as the reference encoder of Mistral does. `vocab` is the number of the model's ids.

        Raises:
            TokenizerError: There is no such file, or it is none that this runtime can use.
        """
        file = find_model(path)
        folder = file.parent if Path(path) != file else None
        settings = read_settings(folder, Path(chat_template) if chat_template is not None else None)
        vocabulary, encoder = load_model(file, settings)
        tokens = place(settings, encoder.piece_id, len(vocabulary.decoded), vocab)
        specials = sort_tokens(settings, tokens, vocabulary, encoder)
        template = settings.template
        if chat_template is None and template is not None and is_mistrals(template, specials):
            template = None
        return cls(extend(vocabulary, tokens), encoder, specials, template, vocab)

    @property
    def chat_version(self) -> ChatVersion:
        """The chat format, told from the control pieces. A vocabulary without `[INST]` among them speaks V1.

        Raises:
            TokenizerError: The vocabulary's chat format is later than V3.
        """
        return chat.chat_version(self.vocabulary.control)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Encode text, with the begin piece in front if `bos`.

        Raises:
            TokenizerError: `text` is not a str, or holds half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"text must be a str, got {type(text).__name__}")
        check_text(text)
        ids = self._encoder.encode(self.specials.words.split(text))
        return [self.bos_id, *ids] if bos else ids

    def control_in(self, text: str) -> list[str]:
        """The control tokens that `text` spells, which `encode` takes for text like any other."""
        return self.specials.control.found(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids. Control pieces vanish; broken UTF-8 from byte pieces becomes U+FFFD, one for each byte.

        Raises:
            TokenizerError: An id is not in the vocabulary.
        """
        stream = self.stream()
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def stream(self, prefix: Iterable[int] = ()) -> StreamDecoder:
        """Decode ids as they come; `prefix` holds those that they continue (see `StreamDecoder`).

        To show an answer in a chat give no prefix: the answer is a text of its own, and its leading space the
        encoder's.

        Raises:
            TokenizerError: An id of `prefix` is not in the vocabulary.
        """
        return StreamDecoder(self.vocabulary, prefix)

    def encode_chat(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """Encode a conversation, up to and including the user message that is to be answered.

        `messages` are dicts of "role" and "content": a system message first if any, then user and assistant
        in turn, the user last.

        Raises:
            TokenizerError: The messages are not such a conversation; their text cannot be encoded; the
                checkpoint's chat template does not write it; or, without one, the vocabulary's chat format is
                later than V3.
        """
        if self.template is None:
            return chat.encode_chat(
                messages, partial(self.encode, bos=False), self.vocabulary.control, self.bos_id, self.eos_id
            )
        checked = check_conversation(messages)
        for message in checked:
            check_text(message["content"])
        parts = self._written([{"role": m["role"], "content": m["content"]} for m in checked])
        words = (word for part in parts for word in self._with_words(part))
        return self._encoder.encode(words)

    def answer_stream(self, conversation: Sequence[int]) -> StreamDecoder:
        """Decode the answer to a conversation, the ids of `encode_chat`, as it comes.

        After Mistral's own format, and after a control token, an answer is a text of its own, and its leading
        space the encoder's. Otherwise it goes on where the template's text ends.
        """
        ends_in_text = conversation and conversation[-1] not in self.vocabulary.control.values()
        return self.stream(conversation if self.template is not None and ends_in_text else ())

    def _written(self, messages: Sequence[Mapping[str, str]]) -> list[str | int]:
        """A conversation as the template writes it: texts, and ids of control tokens."""
        assert self.template is not None
        names = {"bos_token": self._encoder.piece(self.bos_id), "eos_token": self._encoder.piece(self.eos_id)}
        write = partial(render, self.template, names={**names, **self.specials.names})
        return render_guarded(write, messages, self.specials.control, [self.template.text])

    def _with_words(self, part: str | int) -> Iterable[str | int]:
        return [part] if isinstance(part, int) else self.specials.words.split(part)


def load_model(file: Path, settings: Settings) -> tuple[Vocabulary, Encoder]:
    """The sentencepiece model in a file. Raises `TokenizerError`."""
    data = read_model(file)
    special = {token.content for token in (*settings.added, *settings.special) if token.special}
    try:
        vocabulary, safe_model = parse_model(data, special)
    except WireError as error:
        raise TokenizerError(
            f"{file}: {error}; not a sentencepiece model, or cut short: download it again"
        ) from None
    try:
        encoder = Encoder(safe_model, settings.legacy)
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
            f"{file}: sentencepiece decodes {len(probe)} test ids otherwise than this runtime, "
            "which knows no denormaliser; train the model without one"
        )
    return vocabulary, encoder


def is_mistrals(template: Template, specials: Specials) -> bool:
    """Whether a folder's template is an approximation of the format that `tokenizer.chat` writes exactly: it
    has Mistral's tags, not Llama's system tags, and there are no added tokens."""
    return not specials.added and chat.BEGIN in template.text and "<<SYS>>" not in template.text


def check_text(text: str) -> None:
    """Raises `TokenizerError` for half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}); "
            "it stands for no character: remove it"
        ) from None
