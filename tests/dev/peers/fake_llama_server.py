"""Stands in for the program `llama-server`: it takes its time for each token, and can fail."""

import argparse
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MS_PER_TOKEN = 2.0
REFUSED = 13  # this many tokens are a bad request


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer(200, {"status": "ok"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = asked["n_predict"]
        if tokens == REFUSED or asked["temperature"] != 1 or not all(3 <= i < 2048 for i in asked["prompt"]):
            return self.answer(400, {"error": "refused"})
        time.sleep(tokens * MS_PER_TOKEN / 1e3)
        timings = {"predicted_n": min(tokens, 40), "predicted_ms": (tokens - 1) * MS_PER_TOKEN}
        self.answer(200, {"timings": timings})

    def answer(self, status: int, found: dict[str, object]) -> None:
        body = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", action="store_true")
    for name in ("model", "host", "port", "threads", "parallel", "ctx-size", "cache-ram", "home"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--no-kv-unified", action="store_true")
    args = parser.parse_args()
    if args.version:
        sys.exit("version: 0 (fake)")
    if args.threads == "7":
        sys.exit("no such model")
    ThreadingHTTPServer((args.host, int(args.port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
