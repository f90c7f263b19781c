"""Engines over ranks that are threads of this process."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import HashStore

from runtime import Engine, EngineOptions
from runtime.ranks.lost import Lost
from runtime.ranks.meeting import Meeting
from runtime.ranks.starting import start_rank


def options_for(layers: Sequence[int], **options: Any) -> EngineOptions:
    """Those of ranks that have so many layers."""
    given = ",".join(map(str, layers))
    return EngineOptions(distributed=True, rank_layers=given, rank_timeout=20, **options)


def over_ranks(folder: Path, layers: Sequence[int], ask: Callable[[Engine], Any], **options: Any) -> Any:
    """What `ask` returns of rank 0's engine. Ranks have so many `layers`. Raises what any rank raises."""
    its = options_for(layers, **options)

    def work(meeting: Meeting) -> Any:
        with Engine(*start_rank(folder, its, None, None, None, None, meeting)) as engine:
            return engine.follow() if engine.rank else ask(engine)

    return on_ranks(len(layers), work)[0]


def on_ranks(count: int, work: Callable[[Meeting], Any]) -> dict[int, Any]:
    """What `work` returns on each of so many ranks. Raises what any rank raises."""
    store, results = HashStore(), dict[int, Any]()

    def run(rank: int) -> None:
        try:
            results[rank] = work(Meeting(store, rank, count, 20))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    errors = [result for result in results.values() if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, Lost)):  # what others heard of, last
        raise error
    return results
