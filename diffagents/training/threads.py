"""How many CPU threads a stage runs with: `threads` of the agent, or the faster of one and all.

The threads of one operation wait for each other, some hundred times in an update. Where other processes use the cores, a wait
can last until the operating system next runs the thread that is missing: two threads then took three times as long as one
(`python zoo/benchmarks/threads.py`).
"""

import numbers
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from diffagents.training.state import Learner

MOST_THREADS = 1024
ROUNDS, SHARE, LONGEST = 4, 0.03, 1.0
"""How long a call is timed with each number of threads: at least so many times, the first of which is a warm-up, and for this
share of the time that training will take, but at most for so many seconds. A few calls may fall between two waits."""
HOPELESS, WORTH = 2.0, 0.9
"""How many times as long as with one thread a call takes if it is not timed any further; and the share of the time with one
thread that several must not exceed to be chosen: a wrong choice of several costs far more than one of one thread."""


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


def time_with(counts: Sequence[int], call: Callable[[], Any], times: float = 0.0) -> dict[int, float]:
    """Seconds of a call with each number of threads: the mean of interleaved repetitions.

    It is the mean and not the median, because the waits of several threads on a busy machine are rare and long. Timing ends
    early if the last number is slower, at once if it is hopeless, because it could take minutes.

    Args:
        counts: The numbers of threads.
        call: What is timed.
        times: How often training will call it.
    """
    few, many = counts[0], counts[-1]
    warm_up, total = ({count: seconds_of(call, count) for count in counts} for _ in range(2))
    if min(warm_up[many], total[many]) > HOPELESS * max(warm_up[few], total[few]):
        return total
    rounds = 1
    while rounds < ROUNDS - 1 or (faster(total) == many and rounds < SHARE * times and total[few] < LONGEST):
        for count in counts:
            total[count] += seconds_of(call, count)
        rounds += 1
    return {count: seconds / rounds for count, seconds in total.items()}


def faster(seconds: dict[int, float]) -> int:
    """The number of threads to take: the largest if it saves enough, or else the smallest."""
    few, many = min(seconds), max(seconds)
    return many if seconds[many] <= WORTH * seconds[few] else few
