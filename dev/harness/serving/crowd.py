"""All who ask the server, and what becomes of them."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random

from dev.harness.outcome import Leaked, Verdict, Wrong
from dev.harness.serving.alone import check_texts
from dev.harness.serving.asking import Asked, draw, draw_long, draw_short
from dev.harness.serving.broken import Broken, check_full, check_refused, draw_broken
from dev.harness.serving.figures import told
from dev.harness.serving.process import Held, Server
from dev.harness.serving.reading import check_watched, first_text, read_texts
from dev.harness.serving.wire import Manners, Reply, ask, head, post
from runtime import Engine

PLACES, QUEUE = 4, 8  # of the server
SIZES = (1, 4, 8, 12, 16, 24)  # of bursts
WARM = 12  # cases before what the server holds counts
GROWTH = 24 << 20  # bytes that its memory may grow afterwards
CUT = 0.45  # the share of clients that go away, if the answer is not there by then
REFUSED = 0.2  # the share of requests that are to be refused
WATCHING = 0.05  # the share of those who watch the experts
MEASURED = 0.1  # the share of cases that measure


@dataclass(frozen=True)
class Client:
    """One request, and how it is sent."""

    asked: Asked | Broken | None  # None watches the experts
    request: bytes
    manners: Manners


class Crowd:
    """A case of the harness: a burst of clients, or a measurement."""

    def __init__(self, server: Server, engine: Engine) -> None:
        """`engine` has the same model for itself."""
        self.server, self.engine = server, engine
        self.counts: Counter[str] = Counter()
        self.held: list[Held] = []  # after each case
        self.waits: dict[str, list[float]] = {"alone": [], "beside long prompts": []}  # seconds

    def __call__(self, chance: Random) -> Verdict:
        if self.server.gone():
            raise RuntimeError(f"the server has ended: {self.server.said()[-3000:]}")
        verdict = self.measure(chance) if chance.random() < MEASURED else self.burst(chance)
        self.server.settle()
        self.check_held()
        return verdict

    def burst(self, chance: Random) -> Verdict:
        """Several requests at about the same time. Accepted if any text came to its end."""
        clients, before = [self.draw(chance) for _ in range(chance.choice(SIZES))], self.counts["whole"]
        texts = sum(len(client.asked.wants) for client in clients if isinstance(client.asked, Asked))
        self.serve(clients, crowded=texts > PLACES + QUEUE)
        return Verdict.ACCEPTED if self.counts["whole"] > before else Verdict.REFUSED

    def draw(self, chance: Random) -> Client:
        manners = Manners(late=chance.uniform(0, 0.3), drip=chance.choice((0, 0, 0, 0.05)))
        if chance.random() < WATCHING:
            request = head("GET", "/experts/stream", self.server.key, {"host": "127.0.0.1"})
            return Client(None, request, replace(manners, patience=2 * chance.random()))
        manners = replace(manners, stays=chance.random() < 0.2)
        if chance.random() < REFUSED:
            broken = draw_broken(chance, self.server.key)
            return Client(broken, broken.request, manners)
        client = self.polite(draw(chance), replace(manners, sip=chance.choice((0, 0, 0, 0.01))))
        if chance.random() < CUT:
            client = replace(client, manners=leaving(client.manners, chance, len(client.request)))
        return client

    def polite(self, asked: Asked, manners: Manners = Manners()) -> Client:  # noqa: B008
        return Client(asked, post(asked.path, asked.body, self.server.key), manners)

    def serve(self, clients: list[Client], crowded: bool = False) -> list[Reply]:
        """Have all ask, and check what they get. `crowded` says that the queue may be full."""
        with ThreadPoolExecutor(len(clients), "client") as pool:
            replies = list(pool.map(self.ask, clients))
        self.check_all(clients, replies, crowded)
        return replies

    def ask(self, client: Client) -> Reply:
        return ask(self.server.port, client.request, client.manners)

    def check_all(self, clients: list[Client], replies: list[Reply], crowded: bool) -> None:
        """Raises the first mistake, after all have been looked at."""
        mistakes = []
        for client, reply in zip(clients, replies, strict=True):
            self.counts["asked"] += 1
            try:
                self.counts[self.outcome(client, reply, crowded)] += 1
            except Wrong as error:
                mistakes.append(error)
        if mistakes:
            raise mistakes[0]

    def outcome(self, client: Client, reply: Reply, crowded: bool) -> str:
        """What became of a request, in a word. Raises `Wrong` unless it is right."""
        asked, leaves = client.asked, client.manners.goes_away
        if asked is None:
            check_watched(reply)
            return "watched"
        if isinstance(asked, Broken):
            check_refused(asked, reply)
            return "refused"
        if reply.status == 429 and crowded:
            if reply.whole:
                check_full(reply)
            return "full"
        if reply.status == 200:
            got = read_texts(reply)
            check_texts(self.engine, asked, got)
            if not got.done and not leaves:
                raise Wrong(f"a response ended early, after {reply.body[-200:]!r}: {asked}")
            return "whole" if got.done else "cut in a text" if any(got.texts.values()) else "cut before"
        if reply.status or not leaves:
            raise Wrong(f"status {reply.status}, {reply.body[:300]!r}: {asked}")
        return "cut before"

    def measure(self, chance: Random) -> Verdict:
        """How long a short request waits for its first token, alone and beside long prompts."""
        short = self.polite(draw_short(chance), Manners(late=0.05))
        beside = [self.polite(draw_long(chance, tokens=8)) for _ in range(PLACES - 1)]
        for name, others in zip(self.waits, ([], beside), strict=True):
            self.waits[name].append(first_text(self.serve([*others, short])[-1]))
        return Verdict.ACCEPTED

    def check_held(self) -> None:
        """Raises `Leaked` if the server holds more than after the first cases."""
        now, warm = self.server.held(), self.held[:WARM]
        self.held.append(now)
        if len(warm) < WARM:
            return
        for name, number in (("threads", now.threads), ("handles", now.handles)):
            if number > (most := max(getattr(held, name) for held in warm)):
                raise Leaked(f"the server has {number} {name}, and had {most}")
        if now.memory > warm[-1].memory + GROWTH:
            raise Leaked(f"the server has {now.memory >> 20} MiB, and had {warm[-1].memory >> 20}")

    def finish(self) -> None:
        """Tell the server to stop while it writes. Raises `Wrong` unless texts come to their ends, and the
        server to its own."""
        clients = [self.polite(draw_long(Random(0), tokens=40))] * PLACES
        with ThreadPoolExecutor(PLACES, "client") as pool:
            sent = [pool.submit(self.ask, client) for client in clients]
            while self.server.metrics()["requests_running"] < PLACES:
                pass
            self.server.terminate()
            self.check_all(clients, [each.result() for each in sent], crowded=False)
        self.server.check_ended()

    def figures(self) -> list[str]:
        """What the report says of all cases."""
        return told(self.counts, self.server.metrics(), self.held, WARM, self.waits)


def leaving(manners: Manners, chance: Random, size: int) -> Manners:
    """The same of a client that goes away: while it sends, after some time, or in the middle of an answer."""
    manners = replace(manners, rude=chance.random() < 0.5)
    match chance.choices(("sending", "waiting", "reading"), (1, 3, 4))[0]:
        case "sending":
            return replace(manners, unsent=chance.randrange(size))
        case "waiting":
            return replace(manners, patience=chance.choice((0.0, 0.1, 0.5, 1.5)) * chance.random())
    return replace(manners, taken=chance.randint(1, 4000))
