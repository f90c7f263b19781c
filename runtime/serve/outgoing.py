"""What every response has: headers that keep browsers from guessing, and a place in the counters."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serve.metrics import Metrics

HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}


@dataclass(frozen=True)
class Outgoing:
    """Stands around everything else that answers."""

    app: ASGIApp
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                names = {name.lower() for name, _ in given}
                missing = [(name, value) for name, value in HEADERS.items() if name not in names]
                message = {**message, "headers": given + missing}
                self.metrics.count_response(scope["path"], message["status"])
            await send(message)

        await self.app(scope, receive, sending if scope["type"] == "http" else send)
