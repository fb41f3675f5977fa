"""The reading budget: whoever wants to understand one update opens at most 7 of our files."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback

import diffagents
from diffagents import SRPO

PACKAGE = Path(diffagents.__file__).parent
MAX_FILES = 7
STEPS = 4  # per stage; the third is looked at: the first may set things up, the last reports


class Recorder(BaseCallback):
    """Sorts the functions of ours that run into one set per update: a new one begins at every call of the callback."""

    def __init__(self) -> None:
        super().__init__()
        self.current: set[tuple[str, str]] = set()
        self.updates: list[set[tuple[str, str]]] = []

    def _on_step(self) -> bool:
        self.updates.append(self.current)
        self.current = set()
        return True

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(PACKAGE)):
            self.current.add((str(Path(path).relative_to(PACKAGE)), frame.f_code.co_qualname))

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.getprofile()
        sys.setprofile(self.profile)
        try:
            yield
        finally:
            sys.setprofile(before)


@pytest.fixture(scope="module")
def updates() -> list[set[tuple[str, str]]]:
    """The functions of ours, as (file, name), that ran between one call of the callback and the next."""
    random = np.random.default_rng(0)
    n = 60
    data = {
        "observations": random.normal(size=(n, 3)).astype(np.float32),
        "actions": random.uniform(-1, 1, (n, 2)).astype(np.float32),
        "rewards": random.normal(size=n).astype(np.float32),
        "terminations": np.arange(n) % 20 == 19,
        "truncations": np.zeros(n, bool),
    }
    lengths: dict[str, Any] = {"critic_steps": STEPS, "behavior_steps": STEPS, "policy_steps": STEPS}
    agent = SRPO(seed=0, verbose=0, behavior_batch_size=8, batch_size=8, **lengths)
    recorder = Recorder()
    with recorder.watching():
        agent.learn(data, callback=recorder, log_interval=STEPS)
    return recorder.updates


@pytest.mark.parametrize("stage", range(3), ids=["critic", "behavior", "policy"])
def test_one_update_fits_in_the_head(updates: list[set[tuple[str, str]]], stage: int) -> None:
    assert len(updates) == 3 * STEPS
    functions = updates[stage * STEPS + 2]
    files = sorted({file for file, _ in functions})
    assert str(Path("agents", "srpo.py")) in files
    assert "transitions.py" in files  # drawing the batch belongs to it
    assert len(files) <= MAX_FILES, "\n".join(f"{file}: {name}" for file, name in sorted(functions))
