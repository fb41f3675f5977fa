"""Context managers for a training run: callback and clock, Ctrl-C between updates, precision of matrix products."""

import signal
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from diffagents.training.state import Learner

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback


@contextmanager
def timed(learner: Learner, callback: "BaseCallback | None", local: dict[str, Any]) -> Iterator[None]:
    """Notify the callback of start and end, and add the seconds between them to the learner's provenance."""
    started = time.perf_counter()
    if callback is not None:
        callback.on_training_start(local, globals())
    try:
        yield
    finally:
        seconds = learner.state.provenance.get("seconds", 0.0)
        learner.state.provenance["seconds"] = seconds + time.perf_counter() - started
        if callback is not None:
            callback.on_training_end()


@contextmanager
def matmul_precision(learner: Learner) -> Iterator[None]:
    """With `tf32` on a CUDA device, let matrix products round their factors to TF32 (10 bits of mantissa)."""
    if learner.device.type != "cuda" or not learner.tf32:
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
    """Turn Ctrl-C into an event, so that no update is interrupted halfway; a second Ctrl-C stops at once."""
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
