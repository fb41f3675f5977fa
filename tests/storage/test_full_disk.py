"""Every writer on a disk that takes no more: an OSError with cause, place and cure, the old one whole, and nothing left behind.

The kernel is told to let no file grow beyond a size, which fails in the middle of a write as a full disk does.
"""

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from small_agents import small

from diffagents import files
from diffagents.data.replay_buffer import Replay
from diffagents.experiments import grid
from diffagents.storage import artifact, hub, publish
from diffagents.types import Spec

LIMIT = 16_384
SPEC = Spec.from_spaces(gym.spaces.Box(-9, 9, (20,)), gym.spaces.Box(-1, 1, (5,)))
Job = tuple[Callable[[bool], Any], Path]
"""Writes something small (False) or too large (True); where."""


def an_artifact(root: Path, folder: bool) -> Job:
    place = root / ("a" if folder else "a.zip")
    tensors = {False: {"model": {"w": torch.ones(10)}}, True: {"model": {"w": torch.ones(10_000)}}}
    return lambda large: artifact.write(place, {"algorithm": "IQL"}, tensors[large], folder=folder), place


def a_replay_buffer(root: Path) -> Job:
    def save(large: bool) -> None:
        replay = Replay(20, 5, 5_000, "cpu")
        n = 1_000 if large else 10
        zeros = torch.zeros(n)
        replay.add(torch.ones(n, 20), torch.zeros(n, 5), zeros, zeros, torch.zeros(n, 20), np.zeros(n, bool))
        replay.save(root / "buffer", {})

    return save, root / "buffer.safetensors"


def an_exported_policy(root: Path) -> Job:
    agents = {large: small("TD3BC", policy_kwargs={"net_arch": [200] if large else [2]}) for large in (False, True)}
    for agent in agents.values():
        agent.set_up(SPEC)
    place = root / "policy.pt2"
    return lambda large: agents[large].export(place, format="torch_export"), place


def a_pulled_folder(root: Path) -> Job:
    cached = root.parent / "cached"
    artifact.write(cached, {"algorithm": "IQL"}, {"model": {"w": torch.ones(10_000)}}, folder=True)

    def pull(large: bool) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hub, "resolve", lambda *_, **__: SimpleNamespace(fetch=lambda *_, **__: cached))
            if large:
                hub.pull("me/x", root / "to")

    return pull, root / "to"


def a_card(root: Path) -> Job:
    agent = small("TD3BC")
    agent.set_up(SPEC)
    agent.save_pretrained(root / "a")

    def renew(large: bool) -> None:
        name = "x" * (3 * LIMIT if large else 3)
        publish.renew_card(root / "a", name)

    return renew, root / "a" / "README.md"


def progress_of_a_run(root: Path) -> Job:
    return lambda large: grid._write(root / "progress.json", "x" * (LIMIT * 2 if large else 2)), root / "progress.json"


JOBS: dict[str, Callable[[Path], Job]] = {
    "zip": lambda root: an_artifact(root, folder=False),
    "folder": lambda root: an_artifact(root, folder=True),
    "replay buffer": a_replay_buffer,
    "exported policy": an_exported_policy,
    "pull into a folder": a_pulled_folder,
    "card": a_card,
    "progress of a run": progress_of_a_run,
}


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", JOBS)
def test_a_disk_that_takes_no_more(kind: str, tmp_path: Path) -> None:
    root, report = tmp_path / "disk", tmp_path / "report.json"
    root.mkdir()
    save, place = JOBS[kind](root)
    save(False)
    before = content(root)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        said: dict[str, Any] = {}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, limits[1]))
            save(True)
        except BaseException as error:
            said = {"type": type(error).__name__, "errno": getattr(error, "errno", None), "text": str(error)}
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            report.write_text(json.dumps(said))
            os._exit(0)
    os.waitpid(child, 0)
    said = json.loads(report.read_text())
    assert (said["type"], said["errno"]) == ("OSError", errno.EFBIG), said
    assert "was not written; an older one is unchanged; free some space" in said["text"]
    assert str(place) in said["text"]
    assert content(root) == before
    assert not [path for path in root.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (RuntimeError("flush failed (file write failed: errno = 28, error message = 'No space left on device')"), errno.ENOSPC),
        (PermissionError(errno.EACCES, "Permission denied"), errno.EACCES),
        (OSError(errno.EROFS, "Read-only file system"), errno.EROFS),
    ],
)
def test_failed_writes_of_every_library(error: Exception, code: int, tmp_path: Path) -> None:
    place = tmp_path / "x"

    def write() -> None:
        with files.replacing(place, "the thing") as part:
            part.write_text("half")
            raise error

    with pytest.raises(OSError, match="the thing was not written") as caught:
        write()
    assert caught.value.errno == code and caught.value.filename == str(place)
    assert str(caught.value).count("; ") == 2  # with a cure
    assert not list(tmp_path.iterdir())


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), files.replacing(tmp_path / "x", "the thing"):
        raise ValueError("wrong")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with files.replacing(tmp_path / "link", "the thing") as part:
        part.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
