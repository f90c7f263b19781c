"""The host computes experts from host memory, on a thread of its own, while the device computes others.

The calling thread goes on launching the device's work, or computes itself where the device is the CPU. A
layer's experts are one job. It has a result of its own, so nothing that an interrupt left behind can pass for
the result of a later job.

**Interrupts.** As in `copying`, the calling thread gives orders through a queue that is C code, and waits in
C. A job whose caller was interrupted is computed and dropped. Its inputs may change meanwhile, because nobody
looks at its result.
"""

import contextlib
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.moe import OneToken
from model.quant.expert import BoundExpert, ExpertFormat, outputs_of
from model.router import Choice
from runtime.errors import RequestError
from runtime.experts.arena import current
from runtime.experts.copying import CLOSED, LIMIT, PATIENCE
from runtime.experts.store import Loan
from runtime.experts.tickets import Ticket, TransferError, describe, failed

MOST_BOUND = 1 << 12


class HostError(RequestError):
    """The host could not compute an expert. The request fails, and the next one computes it again."""


def taken() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False)
class Job:
    """Some experts of one layer, for one token."""

    loans: Sequence[Loan]
    x: Tensor  # [1, D] in host memory
    ids: list[int]  # all that the router chose
    weights: Tensor  # [1, A] of these, in host memory
    result: Tensor | None = None  # [1, D]
    error: BaseException | None = None
    done: threading.Lock = field(default_factory=taken)  # released at the end


class HostExperts:
    """Computes experts that lie in host memory. One thread at a time gives it jobs."""

    def __init__(self, form: ExpertFormat, device: torch.device | None = None) -> None:
        """`form` is the CPU's for the bytes in host memory. Some of them come from the GPU `device`."""
        self.form, self.device = form, device
        self.bound: dict[int, BoundExpert] = {}  # by address
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.closed = False
        self.started = threading.Event()
        self.thread = threading.Thread(target=self.serve, name="expert-host", daemon=True)

    def start(self) -> None:
        """Start the thread, which computes with the caller's number of threads. The thread ends when this
        object is closed or gone."""
        self.threads = torch.get_num_threads()
        self.thread.start()
        self.started.wait()

    def begin(self, loans: Sequence[Loan], x: Tensor, ids: list[int], weights: Tensor) -> Job:
        """Have the weighted sum of some of a layer's experts computed for one token, x [1, D]. Loans end with
        the job.

        `ids` and `weights` [1, A] are the router's whole choice. Everything is in host memory, and stays as
        it is until the job is done.
        """
        job = Job(loans, x, ids, weights)
        self.jobs.put(job)
        return job

    def wait(self, job: Job) -> Tensor:
        """The weighted sum [1, D]. Contributions are rounded and added as in `OneToken`.

        Raises `TransferError` if an expert did not arrive in host memory, `HostError` if it could not be
        computed, and `RequestError` if this object was closed.
        """
        while not job.done.acquire(timeout=PATIENCE):
            if self.closed:
                raise RequestError(CLOSED)
        if isinstance(job.error, TransferError):
            raise job.error
        if job.error is not None:
            raise HostError(f"the CPU could not compute an expert ({describe(job.error)}); try again")
        if job.result is None:
            raise RequestError(CLOSED)
        return job.result

    def end(self) -> None:
        """Tell the thread to end after the job under way. Takes no lock and does not wait, so a finalizer may
        call it in any thread."""
        self.closed = True
        self.jobs.put(None)

    def close(self) -> None:
        """Tell the thread to end, and wait for it."""
        self.end()
        if self.thread.ident is not None and not self.in_its_thread():
            self.thread.join(LIMIT)

    def in_its_thread(self) -> bool:
        return self.thread.ident == threading.get_ident()

    # --- the thread runs what follows

    def serve(self) -> None:
        """Compute until told to end."""
        torch.set_num_threads(self.threads)
        self.started.set()
        try:
            with torch.inference_mode(), current(self.device):
                while not self.closed:
                    if (job := self.jobs.get()) is not None:
                        try:
                            job.result = self.compute(job)
                        except BaseException as error:  # `wait` raises it in the thread that needs the result
                            job.error = error
                        finish(job)
                        del job
        finally:  # nobody waits for a thread that has ended
            self.closed = True
            with contextlib.suppress(queue.Empty):
                while True:
                    if (job := self.jobs.get_nowait()) is not None:
                        finish(job)

    def compute(self, job: Job) -> Tensor:
        sums = OneToken(job.x, Choice(job.weights, job.weights), job.ids)
        if all(loan.fill is None or loan.fill.settled for loan in job.loans):
            together = [job.loans]
        else:  # an expert that has to be read may get the berth of the one before
            together = [[loan] for loan in job.loans]
        for loans in together:
            for loan in loans:
                if loan.fill is not None:
                    self.arrive(loan.fill)
            experts = [self.bind(loan.memory) for loan in loans]
            for loan, y in zip(loans, outputs_of(self.form, experts, job.x), strict=True):
                sums.add(loan.expert, y)
                loan.end()
        return sums.total()

    def arrive(self, fill: Ticket) -> None:
        """Wait until a berth is filled. Raises `TransferError` if it will not be."""
        moved = threading.Event()
        fill.wakes.append(moved.set)
        while not (fill.settled or self.closed):
            moved.wait(PATIENCE)
            moved.clear()
        if not fill.complete:
            raise failed(fill.error or TransferError(CLOSED), "an expert did not arrive in host memory")
        if (mark := fill.marks[-1][1]) is not None:  # it comes from the device
            mark.synchronize()

    def bind(self, memory: Tensor) -> BoundExpert:
        address = memory.data_ptr()
        if (bound := self.bound.get(address)) is None:
            if len(self.bound) >= MOST_BOUND:
                self.bound.clear()
            bound = self.bound[address] = self.form.bind(memory)
        return bound


def finish(job: Job) -> None:
    for loan in job.loans:
        loan.end()
    job.done.release()
