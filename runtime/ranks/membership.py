"""One rank's place among all: what an engine has of the others."""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from model.kv_cache import KVCache
from runtime.errors import RequestError
from runtime.experts.places import Places
from runtime.planning.rank_plans import RankPlans
from runtime.ranks.follower import Follower
from runtime.ranks.held import HeldByRanks
from runtime.ranks.meeting import Meeting
from runtime.ranks.pipeline import Pipeline
from runtime.ranks.ring import Ring
from runtime.stats import Stats


@dataclass(frozen=True)
class Membership:
    """The `Company` of a rank. `role` is what it does for the others."""

    meeting: Meeting
    ring: Ring
    plans: RankPlans
    role: Pipeline | Follower

    @property
    def rank(self) -> int:
        return self.meeting.rank

    def follow(self) -> None:
        """Do what rank 0 asks for, until it ends. Raises `Lost` if a rank is gone. Any other error is told to
        the others as the reason why this rank ends."""
        assert isinstance(self.role, Follower)
        try:
            self.role.follow()
        except BaseException as error:
            self.meeting.fail(error)
            raise

    def on_loss(self, tell: Callable[[str], None]) -> None:
        """Have `tell` called from another thread, with the reason, once a rank is gone."""
        watch = self.meeting.watch
        watch.on_loss(lambda: tell(watch.cause or "a rank is gone"))

    def held(self, alone: Callable[..., Any], kv: KVCache, length: int) -> HeldByRanks:
        assert isinstance(self.role, Pipeline)
        return HeldByRanks(self.role, self.plans, alone, kv, length)

    def look(self) -> Places:
        assert isinstance(self.role, Pipeline)
        if (rows := self.role.look()) is not None:
            return Places.unpacked(rows)
        experts = self.role.model.config.experts
        others = zip(self.plans.parts[1:], self.plans.plans[1:], strict=True)
        known = (Places.alike("s" if plan.resident else "?", part.layers, experts) for part, plan in others)
        return sum(known, Places([], []))

    def count(self) -> Stats:
        """What the other ranks' experts have counted, as far as rank 0 has heard."""
        return self.role.counted if isinstance(self.role, Pipeline) else Stats()

    def in_its_thread(self) -> bool:
        threads = [self.ring.inbox.thread, self.ring.outbox.thread, self.meeting.watch.thread]
        if isinstance(self.role, Pipeline):
            threads.append(self.role.shelter.thread)
        return threading.current_thread() in threads

    def check(self) -> None:
        """Raises `Lost` if another rank is gone."""
        self.meeting.watch.check()

    def close(self) -> None:
        """Rank 0 tells the others that there is nothing more to do. Another rank that leaves before it was
        told so ends the others' requests."""
        with suppress(RequestError):  # they are gone already
            self.check()
            if isinstance(self.role, Pipeline):
                self.role.close()
            elif not self.role.ended:
                self.meeting.fail("its engine was closed")
        self.ring.close()
        self.meeting.close()
