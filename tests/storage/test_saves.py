"""Saves that are cut off, that meet each other, or that are read meanwhile."""

import collections
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_agents import small
from write_format_fixture import toy_data

import diffagents
from diffagents import files
from diffagents.data.load import load_dataset
from diffagents.storage import artifact

CHILD = """
import os, signal, sys, torch
from diffagents import files
from diffagents.storage import artifact
KIND, PLACE, DIE = sys.argv[1:4]
def save(n): artifact.write(PLACE, {"algorithm": "IQL", "n": n}, {"model": {"w": torch.full((3,), float(n))}}, folder=True)
save(1)
if KIND == "exchange":
    function, name = files._exchange, "_exchange"
else:
    files._exchange = lambda *_: False
    function, name = os.replace, "replace"
calls = []
def dying(*paths):
    calls.append(paths)
    if len(calls) == abs(int(DIE)) and int(DIE) < 0: os.kill(os.getpid(), signal.SIGKILL)
    result = function(*paths)
    if len(calls) == int(DIE): os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(files if KIND == "exchange" else os, name, dying)
save(2)
"""


def save(place: Path, n: int, folder: bool = True) -> None:
    artifact.write(place, {"algorithm": "IQL", "n": n}, {"model": {"w": torch.full((3,), float(n))}}, folder=folder)


def content(place: Path) -> tuple[int, int]:
    source = artifact.read(place)
    return source.config["n"], int(source.tensors("model")["w"][0])


@pytest.mark.parametrize(
    ("kind", "die", "kept"),
    [("exchange", -1, 1), ("exchange", 1, 2), ("replace", -1, 1), ("replace", 1, 1), ("replace", -2, 1), ("replace", 2, 2)],
)
def test_a_kill_before_between_and_after_the_renames(kind: str, die: int, kept: int, tmp_path: Path) -> None:
    """Before (negative) or after the nth rename. There is always a whole save to read, and the next one clears up."""
    place = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", CHILD, kind, str(place), str(die)], timeout=100)
    assert killed.returncode == -9
    assert content(place) == (kept, kept)
    assert any(name.startswith(".diffagents-run-") for name in os.listdir(tmp_path))
    save(place, 3)
    assert content(place) == (3, 3) and os.listdir(tmp_path) == ["run"]


def test_leftovers_of_others_are_left_alone(tmp_path: Path) -> None:
    """Those of living processes, of other machines, of other names, and whatever only looks alike."""
    place = tmp_path / "run"
    mine = files.temporary(place)  # this process lives
    dead = mine.with_name(mine.name.replace(f"-{os.getpid()}-", "-999999999-"))
    others = [mine, dead.with_name(dead.name.replace(files._MACHINE, "0" * 8)), tmp_path / ".diffagents-run-thesis.tmp"]
    others.append(dead.with_name(dead.name.replace("-run-", "-run2-")))
    for path in (dead, *others):
        path.mkdir()
        (path / "x").touch()
    save(place, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", *(path.name for path in others)])


@pytest.mark.parametrize("folder", [False, True])
def test_what_was_replaced_while_it_was_read_is_not_mixed(folder: bool, tmp_path: Path) -> None:
    place = tmp_path / ("run" if folder else "run.zip")
    save(place, 1, folder)
    source = artifact.read(place)
    save(place, 2, folder)
    with pytest.raises(artifact.Replaced, match="replaced by another save"):
        source.tensors("model")
    with pytest.raises(artifact.Replaced):
        source.trainer_state()
    attempts: list[artifact.Artifact] = []

    def load() -> int:
        attempts.append(artifact.read(place))
        if len(attempts) == 1:
            save(place, 3, folder)
        return int(attempts[-1].tensors("model")["w"][0])

    assert artifact.retried(load) == 3 and len(attempts) == 2


@pytest.mark.parametrize("folder", [False, True])
def test_an_agent_that_is_saved_meanwhile_loads(folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agents = [small("TD3BC", seed=seed).learn(toy_data(), 2) for seed in range(2)]
    place = tmp_path / "run"
    agents[0].save_pretrained(place) if folder else agents[0].save(place)
    read_config, saves = artifact._read_config, iter(agents[1:])

    def replaced_after(found: Path) -> Any:
        config = read_config(found)
        for agent in saves:
            agent.save_pretrained(place) if folder else agent.save(place)
        return config

    monkeypatch.setattr(artifact, "_read_config", replaced_after)
    for load in (type(agents[0]).load, diffagents.load, type(agents[0]).from_pretrained):
        loaded = load(place, device="cpu", verbose=0)
        assert loaded.seed == 1
        weights = agents[1].policy.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in loaded.policy.state_dict().items())


def in_processes(jobs: list[Callable[[], None]]) -> list[int]:
    """Run each job in a fork of its own; the exit codes."""
    children = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                job()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize("folder", [False, True])
def test_two_writers_and_a_reader(folder: bool, tmp_path: Path) -> None:
    """Each save succeeds, and whatever is read is one save."""
    torch.set_num_threads(1)  # a fork has only one
    place = tmp_path / ("run" if folder else "run.zip")
    save(place, 0, folder)
    until = time.monotonic() + 2.0

    def write(n: int) -> Callable[[], None]:
        def job() -> None:
            while time.monotonic() < until:
                save(place, n, folder)

        return job

    def read() -> None:
        seen: collections.Counter[tuple[int, int]] = collections.Counter()
        while time.monotonic() < until:
            seen[artifact.retried(lambda: content(place))] += 1
        assert all(one == other for one, other in seen) and sum(seen.values()) > 20, seen

    assert in_processes([write(1), write(2), read]) == [0, 0, 0]
    assert os.listdir(tmp_path) == [place.name]


def test_two_processes_save_a_replay_buffer_and_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("DIFFAGENTS_CACHE", str(tmp_path / "cache"))
    agent = small("TD3BC", env="Pendulum-v1").learn_online(12, learning_starts=8)
    for folder in ("buffers", "cache"):
        (tmp_path / folder).mkdir()
        name = "b.safetensors" if folder == "buffers" else "x"
        left = files.temporary(tmp_path / folder / name)
        left.with_name(left.name.replace(f"-{os.getpid()}-", "-999999999-")).touch()

    def buffers() -> None:
        for _ in range(20):
            agent.save_replay_buffer(tmp_path / "buffers" / "b")

    assert in_processes([buffers, buffers]) == [0, 0]
    assert os.listdir(tmp_path / "buffers") == ["b.safetensors"]
    agent.load_replay_buffer(tmp_path / "buffers" / "b")


def test_the_cache_leaves_no_part_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFAGENTS_CACHE", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path(__file__).resolve().parents[2] / "examples" / "data"))
    load_dataset("diffagents/reacher/replay-v0")
    (file,) = tmp_path.iterdir()
    left = files.temporary(file)
    dead = left.with_name(left.name.replace(f"-{os.getpid()}-", "-999999999-"))
    dead.touch()
    file.write_bytes(b"damaged")
    load_dataset("diffagents/reacher/replay-v0")
    assert list(tmp_path.iterdir()) == [file] and file.stat().st_size > 1000


def test_agent_and_replay_buffer_belong_together_whenever_the_process_ends(tmp_path: Path) -> None:
    """Between the two files a process may be killed, more than once; what is on the disk can always be finished."""

    def stop_at(n: int) -> Callable[[Any, Any], bool]:
        return lambda local, _: local["self"].n_env_steps < n

    agent = small("TD3BC", env="Pendulum-v1")
    agent.learn_online(60, learning_starts=8, callback=stop_at(20))
    place, buffer = tmp_path / "run.zip", tmp_path / "buffer"
    agent.save(place, replay_buffer=buffer)
    assert sorted(os.listdir(tmp_path)) == ["buffer.safetensors", "run.zip"]
    for steps in (30, 40):
        agent.learn_online(None, callback=stop_at(steps))
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(artifact, "write", killed)
            with pytest.raises(KeyboardInterrupt):
                agent.save(place, replay_buffer=buffer)
        loaded = diffagents.load(place, env="Pendulum-v1", device="cpu", verbose=0)
        loaded.load_replay_buffer(buffer)
        assert loaded.n_env_steps == 20 == len(loaded.replay_buffer)
    loaded.learn_online(None)
    assert loaded.n_env_steps == 60
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Path, "unlink", killed)  # after both have been written
        with pytest.raises(KeyboardInterrupt):
            loaded.save(place, replay_buffer=buffer)
    again = diffagents.load(place, env="Pendulum-v1", device="cpu", verbose=0)
    again.load_replay_buffer(buffer)
    assert len(again.replay_buffer) == 60
    again.save(place, replay_buffer=buffer)
    assert sorted(os.listdir(tmp_path)) == ["buffer.safetensors", "run.zip"]
    with pytest.raises(RuntimeError, match="no replay buffer yet"):
        small("TD3BC", env="Pendulum-v1").save(tmp_path / "other", replay_buffer=buffer)
    assert not (tmp_path / "other.zip").exists()


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_scratch_folder_of_a_killed_process_is_removed_by_the_next(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with files.scratch_folder(tmp_path / "push") as folder:
            (folder / "large").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    with files.scratch_folder(tmp_path / "push") as folder:
        assert list(tmp_path.iterdir()) == [folder] and not list(folder.iterdir())
        with files.scratch_folder(tmp_path / "push") as other:  # another one at the same time
            assert folder.exists() and other != folder
    assert not list(tmp_path.iterdir())
