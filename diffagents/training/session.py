"""What surrounds a running training: callbacks, Ctrl-C, matrix precision."""

import signal
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def timed(agent: Any, callback: Any, local: dict[str, Any]) -> Iterator[None]:
    """The callback told of start and end, and the seconds between them added to the agent's."""
    started = time.perf_counter()
    if callback is not None:
        callback.on_training_start(local, globals())
    try:
        yield
    finally:
        agent.provenance["seconds"] = agent.provenance.get("seconds", 0.0) + time.perf_counter() - started
        if callback is not None:
            callback.on_training_end()


@contextmanager
def matmul_precision(agent: Any) -> Iterator[None]:
    """Let matrix products on a CUDA device round their factors to TF32 (10 bits of mantissa) while an agent trains there."""
    if agent.device.type != "cuda" or not agent.tf32:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def interrupt_between_updates() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event, so that no update is cut in the middle; a second Ctrl-C stops at once."""
    event = threading.Event()
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):  # ignored, or not Python's
        yield event
        return

    def note(number: int, frame: types.FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
