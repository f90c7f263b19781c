"""The page at `/`: files of this package, which load nothing from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Page:
    """The page's files, by path. They are read once, and no path leads out of them."""

    files: dict[str, Response]

    @classmethod
    def read(cls, folder: Path = FOLDER) -> Page:
        files = {
            f"/{file.name}": Response(
                file.read_bytes(),
                headers={
                    "content-type": KINDS[file.suffix],
                    "content-security-policy": POLICY,
                    "cache-control": "no-cache",
                    "referrer-policy": "no-referrer",
                },
            )
            for file in sorted(folder.glob("*"))
            if file.suffix in KINDS
        }
        if "/index.html" in files:
            files["/"] = files["/index.html"]
        return cls(files)

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(self.files)

    async def file(self, request: Request) -> Response:
        """The file of the request's path, which is one of `paths`."""
        return self.files[request.url.path]
