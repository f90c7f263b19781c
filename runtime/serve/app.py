"""What is served under which path."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from runtime.errors import MixtralError
from runtime.serve.chat import chat
from runtime.serve.completions import complete
from runtime.serve.errors import Refusal, answer
from runtime.serve.experts import experts, watch
from runtime.serve.guard import OPEN, Guard, Keys
from runtime.serve.metrics import KIND
from runtime.serve.outgoing import Outgoing
from runtime.serve.served import Served
from runtime.serve.static import Page
from runtime.serve.words import detokenize, tokenize
from tokenizer import TokenizerError

REFUSED = (
    Refusal, ValidationError, MixtralError, TokenizerError, HTTPException, ClientDisconnect, Exception,
)  # fmt: skip


def make_app(
    served: Served,
    keys: Keys | None = None,
    hosts: Collection[str] | None = None,
    origins: Collection[str] = (),
) -> ASGIApp:
    """The server's ASGI application. See `Guard` for `keys` and `hosts`. Pages from `origins`
    may ask, too."""
    page = Page.read()
    routes = [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/experts", experts),
        Route("/experts/stream", watch),
        *(Route(path, page.file) for path in sorted(page.paths)),
    ]
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(REFUSED, answer))
    app.router.redirect_slashes = False  # a path with one more slash is no other name for a path
    app.state.served = served
    guarded: ASGIApp = Guard(app, served.limits, keys, hosts, OPEN | page.paths)
    if origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client sends some of its own
            expose_headers=["retry-after", "x-should-retry"],
        )
    return Outgoing(guarded, served.metrics)


async def health(request: Request) -> JSONResponse:
    """Whether the server takes requests. Takes no key, and says nothing else."""
    served: Served = request.app.state.served
    if served.stopping.is_set():
        return JSONResponse({"status": "stopping"}, 503)
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    served: Served = request.app.state.served
    return Response(served.metrics.text(), headers={"content-type": KIND})


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
