"""`/tokenize` and `/detokenize`, in llama.cpp's form."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from runtime.serve.logprobs import piece
from runtime.serve.schemas import DetokenizeRequest, TokenizeRequest
from runtime.serve.served import Served


async def tokenize(request: Request) -> JSONResponse:
    """The ids of a text."""
    served: Served = request.app.state.served
    asked = TokenizeRequest.model_validate_json(await request.body())
    tokenizer = served.engine.tokenizer
    ids = await served.aside(partial(tokenizer.encode, asked.content, bos=asked.add_special))
    tokens: list[Any] = ids
    if asked.with_pieces:
        tokens = [{"id": id, "piece": piece(tokenizer, id)[0]} for id in ids]
    return JSONResponse({"tokens": tokens})


async def detokenize(request: Request) -> JSONResponse:
    """The text of ids."""
    served: Served = request.app.state.served
    asked = DetokenizeRequest.model_validate_json(await request.body())
    return JSONResponse(
        {"content": await served.aside(partial(served.engine.tokenizer.decode, asked.tokens))}
    )
