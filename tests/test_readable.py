"""The reading budget: whoever wants to understand one update opens at most 7 of our files, with the fast preset 8."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from small_agents import NAMES, STEPS, small
from stable_baselines3.common.callbacks import BaseCallback
from toy import line_data

import diffagents

PACKAGE = Path(diffagents.__file__).parent
MAX_FILES = {None: 7, "fast": 8}
"""By preset: the fast one adds the network around a clone."""


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
        caller = frame.f_back.f_code.co_filename if frame.f_back is not None else ""
        if "stable_baselines3" in caller:  # what the callback itself reads is no part of the update
            return
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


@pytest.mark.parametrize("preset", MAX_FILES)
@pytest.mark.parametrize("name", NAMES)
def test_one_update_fits_in_the_head(name: str, preset: str | None) -> None:
    """In each stage: the functions of ours, as (file, name), that run between one call of the callback and the next."""
    agent, recorder = small(name, preset=preset), Recorder()
    with recorder.watching():
        agent.learn(line_data(), callback=recorder, log_interval=STEPS)
    assert len(recorder.updates) == len(agent.STAGE_SHARES) * STEPS
    for stage in range(len(agent.STAGE_SHARES)):
        middle = recorder.updates[stage * STEPS + 2 : (stage + 1) * STEPS - 1]
        functions = set().union(*middle)  # with what is due only now and then
        files = sorted({file for file, _ in functions})
        assert str(Path("agents", agent.presets_name() + ".py")) in files
        assert "data/sampler.py" in files  # drawing the batch belongs to it
        assert len(files) <= MAX_FILES[preset], "\n".join(f"{file}: {name}" for file, name in sorted(functions))
