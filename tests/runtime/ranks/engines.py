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


def over_ranks(folder: Path, layers: Sequence[int], ask: Callable[[Engine], Any], **options: Any) -> Any:
    """What `ask` returns of rank 0's engine. Ranks have so many `layers`. Raises what any rank raises."""
    store, results = HashStore(), dict[int, Any]()
    its = EngineOptions(distributed=True, rank_layers=",".join(map(str, layers)), rank_timeout=20, **options)

    def run(rank: int) -> None:
        try:
            meeting = Meeting(store, rank, len(layers), its.rank_timeout)
            with Engine(*start_rank(folder, its, None, None, None, None, meeting)) as engine:
                results[rank] = engine.follow() if rank else ask(engine)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    errors = [result for result in results.values() if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, Lost)):  # what others heard of, last
        raise error
    return results[0]
