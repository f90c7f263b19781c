"""Text to token ids and back, for Mixtral's sentencepiece models: plain text, streams and conversations."""

from tokenizer.chat import ChatVersion
from tokenizer.conversation import Message
from tokenizer.errors import TokenizerError
from tokenizer.stream import StreamDecoder
from tokenizer.tokenizer import Tokenizer
from tokenizer.tools import Call, new_call_id, parse_calls

__all__ = [
    "Call",
    "ChatVersion",
    "Message",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerError",
    "new_call_id",
    "parse_calls",
]
