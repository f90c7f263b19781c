"""What is served under which path."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from runtime.errors import MixtralError
from runtime.serve.chat import chat
from runtime.serve.completions import complete
from runtime.serve.errors import Refusal, answer
from runtime.serve.guard import Guard, Keys
from runtime.serve.served import Served
from runtime.serve.words import detokenize, tokenize
from tokenizer import TokenizerError

REFUSED = (Refusal, ValidationError, MixtralError, TokenizerError, HTTPException, Exception)


def make_app(served: Served, keys: Keys | None = None, hosts: Collection[str] | None = None) -> ASGIApp:
    """The server's ASGI application. See `Guard` for `keys` and `hosts`."""
    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(REFUSED, answer))
    app.state.served = served
    return Guard(app, served.limits, keys, hosts)


async def health(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok"})


async def models(request: Request) -> JSONResponse:
    served: Served = request.app.state.served
    return JSONResponse({"object": "list", "data": [described(served, name) for name in served.names]})


async def one_model(request: Request) -> JSONResponse:
    served: Served = request.app.state.served
    name = request.path_params["name"]
    served.check_model(name)
    return JSONResponse(described(served, name))


def described(served: Served, name: str) -> dict[str, object]:
    """A model as OpenAI lists it, and how long a text may be."""
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "mixtral-runtime",
        "context": served.engine.plan.context,
    }
