"""Processes killed at random moments while they save: something whole can always be loaded, and nothing is left for ever.

    pytest -m slow -s tests/storage/test_kills.py

The number of kills of each kind is KILLS (environment variable, default 30).
"""

import contextlib
import io
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from small_agents import small

import diffagents
from diffagents.data.cache import cached
from diffagents.data.load import load_dataset
from diffagents.data.replay_buffer import Replay
from diffagents.data.transitions import Transitions
from diffagents.experiments import grid
from diffagents.storage import artifact
from diffagents.types import Spec

KILLS = int(os.environ.get("KILLS", "30"))
SPEC = Spec.from_spaces(gym.spaces.Box(-9, 9, (20,)), gym.spaces.Box(-1, 1, (5,)))
BIG = {"w": torch.ones(300_000)}
Job = tuple[Callable[[int], None], Callable[[], None]]
"""Saves the nth version; loads what is there, and raises if it is not whole."""


def an_artifact(place: Path, folder: bool) -> Job:
    def save(n: int) -> None:
        tensors = {"model": {**BIG, "n": torch.tensor([float(n)])}, "learner": BIG}
        artifact.write(place, {"algorithm": "IQL", "n": n}, tensors, {"n": n}, folder=folder)

    def load() -> None:
        source = artifact.read(place)
        state = source.trainer_state()
        assert state is not None and source.config["n"] == int(source.tensors("model")["n"][0]) == state["n"]
        source.tensors("learner")

    return save, load


def a_buffer(root: Path) -> Job:
    replay = Replay(20, 5, 20_000, "cpu")
    for _ in range(10):
        zeros = torch.zeros(500)
        replay.add(torch.ones(500, 20), torch.zeros(500, 5), zeros, zeros, torch.zeros(500, 20), np.zeros(500, bool))
    place = root / "buffer"
    return lambda n: replay.save(place, {}) and None, lambda: Replay.load(place, SPEC, torch.device("cpu"), {}) and None


def an_agent_with_its_buffer(root: Path) -> Job:
    agent = small("TD3BC", env="Pendulum-v1")
    agent.learn_online(12, learning_starts=8)

    def save(n: int) -> None:
        agent.state.n_updates = n  # another moment
        agent.save(root / "run.zip", replay_buffer=root / "buffer")

    def load() -> None:
        diffagents.load(root / "run.zip", device="cpu", verbose=0).load_replay_buffer(root / "buffer")

    return save, load


def a_cached_dataset(root: Path) -> Job:
    os.environ["DIFFAGENTS_CACHE"] = str(root)
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(20_000, 20)),
        "actions": rng.uniform(-1, 1, (20_000, 5)),
        "rewards": rng.normal(size=20_000),
        "terminations": np.arange(20_000) % 10 == 9,
        "truncations": np.zeros(20_000, bool),
    }
    data = load_dataset(arrays)

    def load() -> None:
        for file in root.glob("*.safetensors"):
            Transitions.load(file)

    return lambda n: cached("x", {"k": 1}, {"stamp": n}, lambda: data) and None, load


def a_collected_dataset(root: Path) -> Job:
    os.environ["MINARI_DATASETS_PATH"] = str(root)

    def save(n: int) -> None:
        diffagents.collect(lambda _: np.zeros(1, np.float32), "Pendulum-v1", 400, f"me/p/x{os.getpid()}-{n}-v0")

    def load() -> None:
        for place in root.glob("me/p/*-v0"):
            assert len(load_dataset(f"me/p/{place.name}", download=False, cache=False)) == 400

    return save, load


JOBS: dict[str, Callable[[Path], Job]] = {
    "zip": lambda root: an_artifact(root / "a.zip", folder=False),
    "folder": lambda root: an_artifact(root / "a", folder=True),
    "replay buffer": a_buffer,
    "agent with its buffer": an_agent_with_its_buffer,
    "cached dataset": a_cached_dataset,
    "collected dataset": a_collected_dataset,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", JOBS)
def test_kills(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)  # a fork has one
    for name in ("DIFFAGENTS_CACHE", "MINARI_DATASETS_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    rng = random.Random(0)
    save, load = JOBS[kind](tmp_path)
    save(0)
    started = time.monotonic()
    save(1)
    took = time.monotonic() - started
    load()
    most = 0
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            try:
                for n in itertools.count(2):
                    save(n)
            finally:  # it must not go on as a second pytest
                os._exit(1)
        time.sleep(rng.uniform(0.2, 3.0) * took)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL  # no save has failed
        load()
        most = max(most, len(left_in(tmp_path)))
    save(10**6)
    left = left_in(tmp_path)
    with capsys.disabled():
        print(f"\n{kind}: {KILLS} kills, always whole; at most {most} leftovers at a time, {len(left)} after the next save")
    assert not left


def left_in(root: Path) -> list[Path]:
    """Temporary files and folders, and what only they hold."""
    marks: tuple[Any, ...] = (".tmp", ".old", ".part", ".previous.safetensors")
    return [path for path in root.rglob("*") if path.name.endswith(marks)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_kills_in_a_run_of_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is taken up again where it was last saved, and ends as an uncut one does."""
    torch.set_num_threads(1)
    monkeypatch.setenv("DIFFAGENTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path(__file__).resolve().parents[2] / "examples" / "data"))
    monkeypatch.setattr(grid, "SAVE_EVERY", 0.0)
    rng = random.Random(0)
    settings = {"preset": None, "policy_kwargs": {"net_arch": [8]}, "batch_size": 16, "compile": "eager"}
    spec = grid.RunSpec("TD3BC", "diffagents/reacher/replay-v0", 0, settings, steps=400, episodes=1, points=1, point_episodes=1)
    started = time.monotonic()
    whole = grid.run_one(spec, tmp_path / "whole", device="cpu")
    took = time.monotonic() - started
    kills = 0
    while kills < KILLS and grid.status(spec, tmp_path / "cut")["state"] != "done":
        child = os.fork()
        if child == 0:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    grid.run_one(spec, tmp_path / "cut", device="cpu")
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.05, 0.5) * took)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        assert grid.status(spec, tmp_path / "cut")["state"] in ("waiting", "interrupted", "done")
    cut = grid.run_one(spec, tmp_path / "cut", device="cpu")
    left = left_in(tmp_path / "cut")
    with capsys.disabled():
        print(f"\nrun of a grid: {kills} kills, then finished as an uncut one; {len(left)} leftovers")
    assert cut["last"]["returns"] == whole["last"]["returns"] and kills > 0 and not left
