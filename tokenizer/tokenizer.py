"""The tokenizer of a Mixtral checkpoint: text to ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike

from sentencepiece import SentencePieceProcessor

from tokenizer import chat
from tokenizer.chat import ChatVersion
from tokenizer.errors import TokenizerError
from tokenizer.model_file import find_model, read_model
from tokenizer.stream import StreamDecoder
from tokenizer.vocabulary import Vocabulary, parse_model
from tokenizer.wire import WireError

PROBE = "  Zwölf\tfoxes 🦊, 12 of them:\n\n  x = 1  "


class Tokenizer:
    """A sentencepiece model, guarded on the way in and decoded by a table on the way out.

    Text is only ever text: whatever a user writes, `encode` gives no control id. With a model that keeps text
    as it is (identity normalisation, all spaces, byte fallback: Mixtral's are such), `decode` gives back what
    was encoded. The one exception is U+2581: sentencepiece itself writes a space so, and a space comes back.
    """

    def __init__(self, vocabulary: Vocabulary, processor: SentencePieceProcessor) -> None:
        self.vocabulary = vocabulary
        self._processor = processor
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        self.vocab_size = len(vocabulary.decoded)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Tokenizer:
        """Load from a checkpoint folder, or from the `tokenizer.model` itself.

        Raises:
            TokenizerError: There is no such file, or it is no sentencepiece model that this runtime can use.
        """
        file = find_model(path)
        data = read_model(file)
        try:
            vocabulary, safe_model = parse_model(data)
        except WireError as error:
            raise TokenizerError(
                f"{file}: {error}; not a sentencepiece model, or cut short: download it again"
            ) from None
        try:
            processor = SentencePieceProcessor(model_proto=safe_model)
            probe: list[int] = processor.encode(PROBE)
            expected: str = processor.decode(probe)
        except (RuntimeError, ValueError, LookupError, OSError):
            raise TokenizerError(
                f"{file}: sentencepiece refuses this model of {len(vocabulary.decoded)} pieces; "
                "download it again"
            ) from None
        tokenizer = cls(vocabulary, processor)
        if min(tokenizer.bos_id, tokenizer.eos_id) < 0:
            raise TokenizerError(
                f"{file}: names no begin or end piece (bos {tokenizer.bos_id}, eos {tokenizer.eos_id}); "
                "train it with bos_id and eos_id"
            )
        if tokenizer.decode(probe) != expected:
            raise TokenizerError(
                f"{file}: sentencepiece decodes {len(probe)} test ids otherwise than this runtime, "
                "which knows no denormaliser; train the model without one"
            )
        return tokenizer

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
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}); "
                "it stands for no character: remove it"
            ) from None
        ids: list[int] = self._processor.encode(text)
        return [self.bos_id, *ids] if bos else ids

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
        in turn, the user last. An empty system message counts as none; an empty answer is the end piece
        alone.

        Raises:
            TokenizerError: The messages are not such a conversation; their text cannot be encoded; or the
                vocabulary's chat format is later than V3.
        """
        return chat.encode_chat(self, messages)

    def encode_turn(self, content: str) -> list[int]:
        """Encode the next user message of a conversation whose ids so far end with the end piece.

        Appended to them it gives what `encode_chat` gives for the whole conversation, if the answers' ids are
        this tokenizer's own encoding of them (in V3: of them without trailing spaces). Not so in V3 with a
        system message: it moves to the newest turn there, so the conversation must be encoded whole.

        Raises:
            TokenizerError: As for `encode`, and if the vocabulary's chat format is later than V3.
        """
        return chat.encode_turn(self, content)
