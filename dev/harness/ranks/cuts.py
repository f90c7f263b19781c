"""A case: ranks start, and at a random moment something befalls one of them or all; or they disagree."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random

from dev.harness.outcome import Verdict, Wrong
from dev.harness.ranks.acts import NOTHING, STOP, do, draw
from dev.harness.ranks.asked import Asked, Ordinary
from dev.harness.ranks.disagreeing import Checkpoints, disagreement
from dev.harness.ranks.ends import check, check_refused, go_on, wait_for_others
from dev.harness.ranks.launching import WAYS, Ranks, Way
from dev.harness.ranks.left import check_left
from dev.harness.ranks.moments import IDLE, MOMENTS, STARTING, Pace, Scene, Terminal
from dev.harness.ranks.namespaces import Machines, machines
from dev.harness.ranks.record import Record

SIZES, SIZES_WEIGHTS = (2, 3, 4), (6, 4, 1)
TORCHRUN_END = 15.0  # seconds that torchrun may take after its ranks have ended


@dataclass(frozen=True)
class Limits:
    """Seconds after which it counts as a hang if ranks have not ended."""

    met: float  # for those that have met
    meeting: float  # for those that have not
    leaving: float = 3.0  # for what they have started


@dataclass
class Cuts:
    """Cases, and their record. `text` and `chat` are what ranks are asked. `checkpoints` are what one of them
    may have in place of its own; None draws no disagreements."""

    text: Asked
    chat: Asked | None
    checkpoints: Checkpoints | None
    limits: Limits
    work: Path
    ways: Sequence[Way] = WAYS
    pace: Pace = field(default_factory=Pace)
    ordinary: Ordinary = field(default_factory=Ordinary)
    record: Record = field(default_factory=Record)

    def __call__(self, chance: Random) -> Verdict:
        way = chance.choice(self.ways)
        size = chance.choices(SIZES, SIZES_WEIGHTS)[0]
        if self.checkpoints and chance.random() < 0.2:
            return self.disagree(way, size, chance)
        return self.cut(way, size, chance)

    def figures(self) -> list[str]:
        return self.record.figures()

    def learn(self, size: int = 2) -> None:
        """Run ranks that nothing befalls, to know what they print, and when. Raises `Wrong` if they fail."""
        for asked, terminal in [(self.text, False), (self.chat, True)]:
            if asked:
                with self.playing(asked, Way("by hand"), size, terminal, shown=False) as scene:
                    self.watch(scene)
                    for rank in range(size):
                        self.ordinary.learn(scene.ranks.err(rank))

    def watch(self, scene: Scene) -> None:
        moments = [time.monotonic()]
        for done in (scene.opened, scene.planned, lambda: bool(scene.text())):
            if not scene.terminal:
                scene.until(done)
                moments.append(time.monotonic())
        if not scene.terminal:
            steps = [later - sooner for sooner, later in pairwise(moments)]
            self.pace.starting, self.pace.loading, self.pace.reading = steps
        scene.finish()
        if not scene.ranks.launched_end(self.limits.met) or any(
            map(scene.ranks.status, range(scene.ranks.size))
        ):
            raise Wrong(f"nothing befalls them, and they do not end well: {scene.told()}")
        if not scene.whole():
            raise Wrong(f"nothing befalls them, and the text is wrong: {scene.told()}")

    def cut(
        self, way: Way, size: int, chance: Random, moment: str | None = None, act: str | None = None
    ) -> Verdict:
        """Ranks that something befalls. The moment and what it is are drawn, unless they are given."""
        chatting = self.chat is not None and chance.random() < 0.3
        asked = self.chat if chatting and self.chat else self.text
        moment = moment or chance.choice((*MOMENTS[:-1], IDLE, IDLE, IDLE) if chatting else MOMENTS)
        with self.playing(asked, way, size, chatting, shown=chance.random() < 0.5) as scene:
            scene.come_to(moment, chance)
            moment = scene.now()
            befallen = do(act or draw(scene.ranks, chance), scene.ranks, chance)
            if befallen.act == NOTHING:
                scene.finish()
            limit = self.limits.meeting if moment == STARTING else self.limits.met
            try:
                seconds = wait_for_others(scene, befallen, limit)
                if befallen.act == STOP:
                    go_on(scene, befallen, limit)
                self.end_launchers(scene.ranks)
                verdict = Verdict.ACCEPTED if scene.whole() else Verdict.REFUSED
                lines = check(scene, befallen, self.ordinary)
            except Wrong as wrong:
                raise Wrong(f"{befallen}, {moment}, {way.name}: {wrong}") from None
        self.record.count(started=way.name, ranks=str(size))
        if befallen.landed:
            self.record.count(moments=moment)
            self.record.took(befallen.act if moment != STARTING else f"{befallen.act}, {STARTING}", seconds)
        self.record.lines += lines
        return verdict

    def disagree(self, way: Way, size: int, chance: Random) -> Verdict:
        assert self.checkpoints
        found = disagreement(self.text.command, size, chance, self.checkpoints)
        with self.playing(self.text, way, size, False, False, found.commands) as scene:
            there = [rank for rank in range(size) if found.commands[rank] is not None]
            if not scene.ranks.wait(
                lambda: all(scene.ranks.status(rank) is not None for rank in there), self.limits.meeting
            ):
                raise Wrong(f"{found.name}, {way.name}: it is not refused\n{scene.told()}")
            began = max(scene.ranks.when("pid", rank) for rank in there)
            seconds = max(scene.ranks.when("status", rank) for rank in there) - began
            self.end_launchers(scene.ranks, absent=len(there) < size)
            try:
                lines = check_refused(scene.ranks, self.ordinary, there, scene.told())
            except Wrong as wrong:
                raise Wrong(f"{found.name}, {way.name}: {wrong}") from None
        for line in lines:
            if not any(word in line for word in found.words):
                raise Wrong(f"{found.name}: it does not name the difference: {line}")
        self.record.count(started=way.name, ranks=str(size))
        self.record.took(f"refused: {found.name}", seconds)
        self.record.lines += lines
        return Verdict.REFUSED

    def end_launchers(self, ranks: Ranks, absent: bool = False) -> None:
        """Wait until torchrun has noticed. Where it does not, that is its own affair, and counted."""
        if not ranks.launched_end(TORCHRUN_END if not absent else 1.0):
            self.record.count(**{"torchrun did not end": ranks.way.name})

    @contextmanager
    def playing(
        self,
        asked: Asked,
        way: Way,
        size: int,
        chatting: bool,
        shown: bool,
        commands: Sequence[list[str] | None] | None = None,
    ) -> Iterator[Scene]:
        """Ranks that run inside. Raises `Leaked` if something is left of them after."""
        shutil.rmtree(self.work, ignore_errors=True)
        with ExitStack() as stack:
            apart: Machines | None = stack.enter_context(machines(size)) if way.apart else None
            terminal = Terminal() if chatting else None
            if terminal:
                stack.callback(terminal.close)
            path = terminal.path if terminal else None
            ranks = Ranks(commands or [asked.command] * size, way, self.work, apart, path, shown)
            stack.callback(ranks.end)
            yield Scene(ranks, asked, self.pace, terminal, shown)
            ranks.end()
        check_left(self.work / "tmp", self.limits.leaving)
