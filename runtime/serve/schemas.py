"""What a request may say. A field that is not here is refused by its name, and never dropped.

Each class says which of OpenAI's fields are served, and which are the server's own. Values that have to fit
the model are checked by `SamplingParams` and the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
MOST_CHOICES = 16  # texts of one request
MOST_STOPS = 16
MOST_LOGPROBS = 20
MOST_TOOLS = 128
MOST_MESSAGES = 4096
MOST_PARTS = 1024  # of a message
MOST_BIASES = 1024

Item = TypeVar("Item")
# Reading a list ends at its first mistake: a body has room for millions, which would take minutes and memory.
Several = Annotated[list[Item], Field(fail_fast=True)]


def shape(value: Any) -> str:
    """Which alternative of `Texts` or `Content` a value is."""
    return "<several>" if isinstance(value, list) else "<one>"


Texts = Annotated[
    Annotated[str, Tag("<one>")] | Annotated[Several[str], Field(max_length=MOST_STOPS), Tag("<several>")],
    Discriminator(shape),
]


Biases = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)]


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: bool = False


class Sampling(BaseModel):
    """What chats and completions have in common."""

    model_config = STRICT

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Texts | None = None
    logit_bias: Biases | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    user: str | None = None  # a label, which changes nothing

    # The server's own.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None


class TextPart(BaseModel):
    model_config = STRICT
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<one>")]
    | Annotated[Several[TextPart], Field(max_length=MOST_PARTS), Tag("<several>")],
    Discriminator(shape),
]


class SystemMessage(BaseModel):
    model_config = STRICT
    role: Literal["system", "developer"]
    content: Content


class UserMessage(BaseModel):
    model_config = STRICT
    role: Literal["user"]
    content: Content


class Called(BaseModel):
    model_config = STRICT
    name: str
    arguments: str


class ToolCall(BaseModel):
    model_config = STRICT
    id: str
    type: Literal["function"] = "function"
    function: Called
    index: int | None = None  # where clients have put a stream together


class AssistantMessage(BaseModel):
    """An earlier answer. Clients send it as they got it, with fields that say nothing."""

    model_config = STRICT
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[Several[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(BaseModel):
    """The result of a call."""

    model_config = STRICT
    role: Literal["tool"]
    content: Content
    tool_call_id: str


def role(value: Any) -> str:
    """Which alternative of `Message` a value is. A role that is none of them is refused as a user's."""
    word = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    known = {"system": "<system>", "developer": "<system>", "assistant": "<assistant>", "tool": "<tool>"}
    return known.get(word, "<user>") if isinstance(word, str) else "<user>"


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(role),
]


class Function(BaseModel):
    model_config = STRICT
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # calls that are required always fit their tool's schema


class Tool(BaseModel):
    model_config = STRICT
    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    model_config = STRICT
    name: str


class ToolChoice(BaseModel):
    """The one tool that has to be called."""

    model_config = STRICT
    type: Literal["function"]
    function: FunctionName


class SchemaFormat(BaseModel):
    """A schema, which a text always fits, `strict` or not."""

    model_config = STRICT
    name: str
    description: str | None = None
    shape: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = STRICT
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


def kind_of_choice(value: Any) -> str:
    """Which alternative of `tool_choice` a value is."""
    return "<word>" if isinstance(value, str) else "<tool>"


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[ToolChoice, Tag("<tool>")],
    Discriminator(kind_of_choice),
]


class ChatRequest(Sampling):
    """A body of `/v1/chat/completions`."""

    messages: Annotated[Several[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[Several[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None

    # Fields that ask for what is done anyway, or that only label a request.
    modalities: Several[Literal["text"]] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[str, str] | None = None


def kind_of_prompt(value: Any) -> str:
    """Which alternative of `Prompt` a value is."""
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else 0
    return "<texts>" if isinstance(first, str) else "<rows>" if isinstance(first, list) else "<ids>"


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[Several[str], Field(max_length=MOST_CHOICES), Tag("<texts>")]
    | Annotated[Several[int], Tag("<ids>")]
    | Annotated[Several[Several[int]], Field(max_length=MOST_CHOICES), Tag("<rows>")],
    Discriminator(kind_of_prompt),
]


class CompletionRequest(Sampling):
    """A body of `/v1/completions`."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    # Accepted only where they ask for nothing.
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None


class TokenizeRequest(BaseModel):
    """A body of `/tokenize`. `add_special` puts the begin-of-sequence id in front."""

    model_config = STRICT
    content: str
    add_special: bool = False
    with_pieces: bool = False


class DetokenizeRequest(BaseModel):
    """A body of `/detokenize`."""

    model_config = STRICT
    tokens: Several[int]
