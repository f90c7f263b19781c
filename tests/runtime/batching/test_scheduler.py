"""The scheduler, without a model: random arrivals, prompts and lengths against what it promises."""

import random

import pytest

from runtime.batching.scheduler import QueueFull, Scheduler


class Job:
    def __init__(self, name: int, prompt: int, tokens: int) -> None:
        self.name, self.left, self.tokens, self.waited, self.turns = name, prompt, tokens, 0, 0


@pytest.mark.parametrize("seed", range(60))
def test_random_traffic(seed: int) -> None:
    """Everyone is served, in places and queue that are never exceeded. A text waits for at most one chunk
    between two tokens, and each prompt moves at least in every (2 * places)-th turn of prompts."""
    r = random.Random(seed)
    places, queue = r.randint(1, 5), r.randint(0, 4)
    scheduler: Scheduler[Job] = Scheduler(places, queue, lambda job: job.left)
    done, refused, given_up, made, order = [], 0, 0, 0, list[int]()
    for _ in range(3000):
        while made < 60 and r.random() < 0.3:
            job = Job(made, r.randint(1, 9), r.randint(1, 6))
            made += 1
            room = places - scheduler.served + queue - len(scheduler.waiting)
            if room <= 0:
                with pytest.raises(
                    QueueFull, match=rf"{scheduler.served} request.* {len(scheduler.waiting)} wait"
                ):
                    scheduler.add(job)
                refused += 1
            else:
                scheduler.add(job)
        everyone = [*scheduler.waiting, *scheduler.prompts, *scheduler.writing]
        if everyone and r.random() < 0.05:
            scheduler.remove(r.choice(everyone))
            given_up += 1
        order += [job.name for job in scheduler.admit()]
        assert scheduler.served <= places and (scheduler.served == places or not scheduler.waiting)
        if not scheduler.served:
            if made == 60:
                break
            continue
        job, group = scheduler.next_turn()
        if job:
            for other in scheduler.prompts:
                other.waited += 1
            job.left, job.waited = job.left - 1, 0
            for other in scheduler.writing:
                other.turns += 1
                assert other.turns <= 1
            assert all(other.waited <= 2 * places * 9 for other in scheduler.prompts)
            if not job.left:
                scheduler.begin_writing(job)
        else:
            assert group and not scheduler.writing
            scheduler.come_back(group)
            assert scheduler.writing == group
            for job in group:
                job.tokens, job.turns = job.tokens - 1, 0
                if not job.tokens:
                    scheduler.remove(job)
                    done.append(job)
    assert len(done) + refused + given_up == made == 60
    assert order == sorted(order)  # places go to those that have waited longest


@pytest.mark.parametrize("seed", range(40))
def test_several_turns_under_way(seed: int) -> None:
    """A text is in one turn at a time, and waits for at most one chunk between two of its tokens. Without
    prompts, no group is larger than an even share."""
    r = random.Random(seed)
    depth, places = r.randint(2, 4), r.randint(1, 9)
    scheduler: Scheduler[Job] = Scheduler(places, 99, lambda job: job.left, depth)
    turns: list[tuple[Job | None, list[Job]]] = []
    for name in range(30):
        scheduler.add(Job(name, r.randint(1, 9), r.randint(1, 6)))
    ended: list[Job] = []
    while scheduler.served or scheduler.waiting:
        scheduler.admit()
        while len(turns) < depth:
            due = [job for job in scheduler.prompts if job.left]
            prompt, group = scheduler.next_turn()
            if prompt is None and not group:
                break
            assert not any(job in other for job in group for _, other in turns)
            if prompt is None:
                texts = len(group) + len(scheduler.writing) + len(scheduler.away) - len(group)
                assert len(group) <= (texts if due else -(-texts // depth)) and len(set(group)) == len(group)
                for job in group:
                    assert job.turns <= 1
                    job.turns = 0
            else:
                prompt.left -= 1
                for job in scheduler.writing:
                    job.turns += 1
            turns.append((prompt, group))
        assert turns, "there is always something to do"
        prompt, group = turns.pop(0)
        if prompt is not None and not prompt.left and not any(prompt is other for other, _ in turns):
            scheduler.begin_writing(prompt)
        scheduler.come_back(group)
        for job in group:
            job.tokens -= 1
            if not job.tokens:
                scheduler.remove(job)
                ended.append(job)
    assert len(ended) == 30 and not scheduler.away


def test_a_short_prompt_does_not_wait_for_long_ones() -> None:
    scheduler: Scheduler[Job] = Scheduler(4, 0, lambda job: job.left)
    jobs = [Job(0, 50, 1), Job(1, 40, 1), Job(2, 30, 1), Job(3, 1, 1)]
    for job in jobs:
        scheduler.add(job)
    scheduler.admit()
    assert jobs[3] in (scheduler.next_turn()[0], scheduler.next_turn()[0])


def test_a_long_prompt_does_not_wait_for_ever() -> None:
    scheduler: Scheduler[Job] = Scheduler(2, 0, lambda job: job.left)
    long, turns = Job(0, 20, 1), 0
    scheduler.add(long)
    while long.left:
        if scheduler.served + len(scheduler.waiting) < 2:
            scheduler.add(Job(1, 1, 1))  # short ones keep coming
        scheduler.admit()
        job, _ = scheduler.next_turn()
        assert job
        job.left -= 1
        turns += 1
        if not job.left:
            scheduler.remove(job)
    assert turns <= 41
