"""How many CPU threads a stage runs with: `threads` of the agent, or the faster of one and all.

The threads of one operation wait for each other, some hundred times in an update. Where other processes use the cores, a wait
can last until the operating system next runs the thread that is missing, so that two threads may be eight times as slow as one
(`python zoo/benchmarks/threads.py`).
"""

import numbers
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from diffagents.training.state import Learner

MOST_THREADS = 1024
ROUNDS = 4
"""How often a call is timed with each number of threads; the first time is a warm-up."""
HOPELESS, NEAR_TIE = 2.0, 1.1
"""How many times as long as with one thread a call takes if it is not timed any further, and if one thread is preferred."""


def check_threads(threads: Any) -> int | str:
    """Check the argument `threads` of the constructor. Raises ValueError unless it is "auto" or a number of threads."""
    if threads == "auto":
        return "auto"
    whole = isinstance(threads, numbers.Integral) and not isinstance(threads, bool)
    if not whole or not 1 <= threads <= MOST_THREADS:
        raise ValueError(f'threads={str(threads)[:40]} must be "auto" or a whole number from 1 to {MOST_THREADS}')
    return int(threads)


def n_threads(learner: Learner, chosen: int | None = None) -> int:
    """The number of threads that a learner trains with.

    Args:
        learner: The agent; `threads` takes precedence if it is a number.
        chosen: The number that a plan has chosen, of which at most those of the process are used. Default: all of them.
    """
    if isinstance(learner.threads, int):
        return learner.threads
    every = torch.get_num_threads()
    return every if chosen is None else min(chosen, every)


def may_choose(learner: Learner) -> bool:
    """Whether threads="auto" has a choice: on a CPU, in a process with several threads."""
    return learner.threads == "auto" and learner.device.type == "cpu" and torch.get_num_threads() > 1


@contextmanager
def threads_restored() -> Iterator[None]:
    """Restore torch's number of threads at the end."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_of(call: Callable[[], Any], count: int) -> float:
    """How long a call takes with `count` threads."""
    with threads_restored():
        torch.set_num_threads(count)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def time_with(counts: Sequence[int], call: Callable[[], Any]) -> dict[int, float]:
    """Seconds of a call with each number of threads: the median of interleaved repetitions.

    Timing ends early if the last number is hopeless, because it could take minutes.
    """
    times: dict[int, list[float]] = {count: [] for count in counts}
    for k in range(ROUNDS):
        for count, found in times.items():
            found.append(seconds_of(call, count))
        if k > 0 and min(times[counts[-1]]) > HOPELESS * max(times[counts[0]]):
            break
    return {count: statistics.median(found[1:]) for count, found in times.items()}
