"""Saves and loads that a review broke: what is written can be read, what others wrote stays theirs, and nothing is mixed."""

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from small_agents import small

import diffagents
from diffagents import files, registry
from diffagents.data.replay_buffer import Replay, previous_of
from diffagents.errors import ArtifactError
from diffagents.storage import artifact, hub, publish
from diffagents.types import Spec

SPEC = Spec.from_spaces(gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,)))
CPU = torch.device("cpu")
MOMENT = {"environment steps": 4, "updates": 0}


def save(place: Path, n: int = 1, **more: Any) -> Path:
    tensors = {name: {"w": torch.full((3,), float(n))} for name in ("model", "learner")}
    return artifact.write(place, {"algorithm": "IQL", "n": n, **more}, tensors, folder=place.suffix != ".zip")


def agent(seed: int = 0) -> Any:
    made = small("TD3BC", seed=seed)
    made.set_up(SPEC)
    return made


# ---- what is written can be read ---------------------------------------------------------------------------------------


def test_what_utf_8_cannot_encode_is_replaced(tmp_path: Path) -> None:
    text = "donn\udce9e \ud800 \ud83d\ude00 é 模"
    place = save(tmp_path / "a.zip", words={text: [text]})
    assert artifact.read(place).config["words"] == {
        "donn\ufffde \ufffd \U0001f600 é 模": ["donn\ufffde \ufffd \U0001f600 é 模"]
    }


@pytest.mark.parametrize("kind", ["list", "dict", "itself"])
def test_what_is_nested_too_deeply_is_refused_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    def nested(levels: int) -> Any:
        value: Any = []
        for _ in range(levels):
            value = [value] if kind == "list" else {"x": value}
        return value

    value: Any = nested(5_000)
    if kind == "itself":
        value = {}
        value["x"] = value
    with pytest.raises(TypeError, match=r"config\['value'\]\S* is nested more than 100 levels deep"):
        save(tmp_path / "a.zip", value=value)
    assert not list(tmp_path.iterdir())
    assert artifact.read(save(tmp_path / "b.zip", value=nested(90))).config["value"] == nested(90)


def test_numbers_tensors_and_results_that_cannot_be_read_back_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="more than 10000 bits"):
        save(tmp_path / "a", value=1 << 20_000)
    with pytest.raises(ValueError, match="model tensors are too many"):
        artifact.write(tmp_path / "a", {"algorithm": "IQL"}, {"model": {"x" * (1 << 23): torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"results\.json would have"):
        artifact.write(
            tmp_path / "a", {"algorithm": "IQL"}, {"model": {}}, folder=True, companions={"results.json": b"x" * (1 << 24)}
        )
    assert not list(tmp_path.iterdir())


# ---- what strangers wrote ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 93])
def test_a_member_whose_method_heeds_no_size(method: int, tmp_path: Path) -> None:
    place = save(tmp_path / "a.zip")
    data = bytearray(place.read_bytes())
    data[8:10] = method.to_bytes(2, "little")  # in the first member's own header
    at = data.index(b"PK\x01\x02") + 10
    data[at : at + 2] = method.to_bytes(2, "little")
    place.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"config\.json has the compression method {method}"):
        artifact.read(place)


def test_headers_are_checked_before_the_whole_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = save(tmp_path / "a")
    model = place / "model.safetensors"
    os.truncate(model, 1 << 31)  # a hole: takes no space on the disk
    with pytest.raises(ArtifactError, match="2147483648 bytes instead of the"):
        artifact.read(place).tensors("model")
    header = json.dumps({f"a{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}).encode()
    model.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ArtifactError, match="more than the 100000 tensors"):
        artifact.read(place).tensors("model")
    monkeypatch.setattr(artifact, "_SMALL", 0)  # whole files pass this check
    for whole in (save(tmp_path / "b"), save(tmp_path / "b.zip")):
        assert artifact.read(whole).tensors("model")["w"].tolist() == [1.0] * 3
    model.write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(ArtifactError, match="truncated or damaged"):
        artifact.read(place).tensors("model")


def test_results_of_a_stranger_are_small(tmp_path: Path) -> None:
    place = save(tmp_path / "a")
    (place / "results.json").write_text('{"x": [' + "{}," * (1 << 22) + "{}]}")
    with pytest.raises(ArtifactError, match=r"results\.json has .* more than the 8388608 allowed"):
        artifact.read_json(place, "results.json")


def buffer_file(path: Path, header: Any = None, **tensors: torch.Tensor) -> Path:
    whole = {"format": 1, "sizes": [3, 2, 100], "n_added": 4, "max_abs_reward": 0.0, "moment": MOMENT}
    rows = {"rows": torch.zeros(4, 10), "env": torch.zeros(4, dtype=torch.int32), "ended": torch.zeros(4, dtype=torch.uint8)}
    text = header if isinstance(header, str) else json.dumps(whole | (header or {}))
    save_file(rows | tensors, path, {"diffagents": text})
    return path


EMPTY = {"rows": torch.zeros(0, 10), "env": torch.zeros(0, dtype=torch.int32), "ended": torch.zeros(0, dtype=torch.uint8)}
BUFFERS: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "n_added infinite": ({"n_added": float("inf")}, {}),
    "n_added too large for numpy": ({"n_added": 10**30, "sizes": [3, 2, 4]}, {}),
    "n_added true": ({"n_added": True}, {}),
    "reward NaN": ({"max_abs_reward": float("nan")}, {}),
    "reward infinite": ({"max_abs_reward": float("inf")}, {}),
    "reward too large for a float": ({"max_abs_reward": 10**400}, {}),
    "reward negative": ({"max_abs_reward": -1.0}, {}),
    "reward a list": ({"max_abs_reward": []}, {}),
    "sizes as floats": ({"sizes": [3.0, 2.0, 100]}, {}),
    "capacity infinite": ({"sizes": [3, 2, float("inf")]}, {}),
    "capacity too large for numpy": ({"sizes": [3, 2, 10**30]}, {}),
    "capacity 0": ({"sizes": [3, 2, 0]}, EMPTY),
    "capacity negative": ({"sizes": [3, 2, -1], "n_added": -1}, EMPTY),
    "sizes too few": ({"sizes": [3]}, {}),
    "nested": ("[" * 100_000, {}),
    "a list": ("[]", {}),
    "env 2-D": ({}, {"env": torch.zeros(4, 3, dtype=torch.int32)}),
    "env negative": ({}, {"env": torch.full((4,), -1, dtype=torch.int32)}),
    "ended 2-D": ({}, {"ended": torch.zeros(4, 3, dtype=torch.uint8)}),
    "ended 7": ({}, {"ended": torch.full((4,), 7, dtype=torch.uint8)}),
    "running 0-D": ({}, {"running": torch.zeros(())}),
    "running of another shape": ({}, {"running": torch.zeros(1, 5)}),
    "running NaN": ({}, {"running": torch.full((1, 2), torch.nan)}),
    "running longer than all": ({}, {"running": torch.zeros(5, 2)}),
    "running in bfloat16": ({}, {"running": torch.zeros(1, 2, dtype=torch.bfloat16)}),
}


@pytest.mark.parametrize("case", BUFFERS)
def test_an_impossible_buffer_is_refused(case: str, tmp_path: Path) -> None:
    header, tensors = BUFFERS[case]
    path = buffer_file(tmp_path / "b.safetensors", header, **tensors)
    with pytest.raises(ArtifactError, match="is not a replay buffer of diffagents, or it is damaged"):
        Replay.load(path, SPEC, CPU, MOMENT)


def test_a_possible_buffer_is_loaded_and_a_stranger_s_moment_is_printable(tmp_path: Path) -> None:
    path = buffer_file(tmp_path / "b.safetensors", running=torch.zeros(2, 2))
    replay = Replay.load(path, SPEC, CPU, MOMENT)
    assert len(replay) == 4 and len(replay.running) == 2 and replay.episodes(whole=False) is not None
    buffer_file(path, {"moment": {"\x1b[2J": 1, "x": [2], "y": 3_000_000_000}})
    with pytest.raises(ArtifactError, match=r"x1b\[2J 1, x list, y 3000000000, but the agent") as caught:
        Replay.load(path, SPEC, CPU, MOMENT)
    assert str(caught.value).isprintable()


def test_a_pipe_in_the_place_of_a_buffer_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match="no replay buffer"):
        Replay.load(tmp_path / "b", SPEC, CPU, MOMENT)


# ---- agent and buffer --------------------------------------------------------------------------------------------------


def with_buffer(n: int = 5) -> Any:
    made = agent()
    made.replay_buffer = Replay(3, 2, 100, CPU)
    for _ in range(n):
        zero = torch.zeros(1)
        made.replay_buffer.add(torch.zeros(1, 3), torch.zeros(1, 2), zero, zero, torch.zeros(1, 3), np.array([False]))
    return made


def test_a_buffer_behind_a_link_to_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "disk" / "real.safetensors")
    true_replace = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        true_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for _ in range(2):
        with_buffer().save(tmp_path / "a.zip", replay_buffer=tmp_path / "b")
    assert (tmp_path / "b.safetensors").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["real.safetensors"]


def test_a_user_s_own_file_called_previous_stays(tmp_path: Path) -> None:
    made = with_buffer()
    mine = made.save_replay_buffer(tmp_path / "b.previous")
    before = mine.read_bytes()
    for _ in range(2):
        made.save(tmp_path / "a.zip", replay_buffer=tmp_path / "b")
    assert mine.name == "b.previous.safetensors" and mine.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "b.previous.safetensors", "b.safetensors"]


@pytest.mark.parametrize("version", ["this", "an earlier"])
def test_the_buffer_of_the_agent_on_the_disk_is_found(version: str, tmp_path: Path) -> None:
    made = with_buffer()
    made.save(tmp_path / "a.zip", replay_buffer=tmp_path / "b")
    path = tmp_path / "b.safetensors"
    os.replace(path, previous_of(path) if version == "this" else tmp_path / "b.previous.safetensors")
    with_buffer(7).replay_buffer.save(path, {"environment steps": 9})
    made.load_replay_buffer(path)
    assert len(made.replay_buffer) == 5


# ---- what others wrote stays theirs ------------------------------------------------------------------------------------


def modes(*paths: Path) -> list[int]:
    return [stat.S_IMODE(path.stat().st_mode) for path in paths]


def test_a_private_save_stays_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, folder, buffer = save(tmp_path / "a.zip"), save(tmp_path / "f"), tmp_path / "b.safetensors"
    made = with_buffer()
    made.save_replay_buffer(buffer)
    for path in (place, buffer, folder / "model.safetensors"):
        path.chmod(0o600)
    folder.chmod(0o700)
    seen: list[int] = []
    true_sync = artifact.sync
    monkeypatch.setattr(artifact, "sync", lambda path: (seen.extend(modes(path)), true_sync(path))[1])
    save(place)
    assert seen[0] == 0o600  # already while it was written
    save(folder)
    made.save(tmp_path / "agent.zip", replay_buffer=buffer)
    made.save(tmp_path / "agent.zip", replay_buffer=buffer)
    assert modes(place, buffer, folder / "model.safetensors", folder) == [0o600, 0o600, 0o600, 0o700]
    assert modes(folder / "config.json") == modes(tmp_path / "agent.zip") != [0o600]


@pytest.mark.parametrize("linked", [True, False])
def test_other_files_of_the_folder(linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that another program has open go on growing; where there are no hard links they are copied."""

    def no_links(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not linked:
        monkeypatch.setattr(os, "link", no_links)
    place = save(tmp_path / "run")
    (place / "tb" / "deep").mkdir(parents=True)
    (place / "tb").chmod(0o750)
    (place / "tb" / "deep" / "link").symlink_to("../nowhere")
    with (place / "tb" / "log").open("w") as log:
        log.write("1\n")
        log.flush()
        save(place, 2)
        log.write("2\n")
    assert (place / "tb" / "log").read_text() == ("1\n2\n" if linked else "1\n")
    assert (place / "tb" / "log").stat().st_nlink == 1 and modes(place / "tb") == [0o750]
    assert os.readlink(place / "tb" / "deep" / "link") == "../nowhere"
    assert artifact.read(place).config["n"] == 2 and os.listdir(tmp_path) == ["run"]
    os.mkfifo(place / "tb" / "pipe")
    if linked:
        save(place, 3)
        assert (place / "tb" / "pipe").is_fifo()
        return
    with pytest.raises(OSError, match=r"tb/pipe can be neither linked nor copied .*: nothing was written; move it"):
        save(place, 3)
    assert artifact.read(place).config["n"] == 2 and os.listdir(tmp_path) == ["run"]


def test_a_folder_that_is_replaced_while_its_files_are_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = save(tmp_path / "run")
    (place / "notes.txt").write_text("mine")
    true_link_all, other = artifact._link_all, []

    def link_all(*args: Any) -> None:
        if not other:
            other.append(True)
            shutil.copytree(place, tmp_path / "other")
            (tmp_path / "other" / "new.txt").write_text("new")
            true_link_all(*args)
            files.replace_folder(tmp_path / "other", place)
        else:
            true_link_all(*args)

    monkeypatch.setattr(artifact, "_link_all", link_all)
    save(place, 2)
    assert (place / "notes.txt").read_text() == "mine" and (place / "new.txt").read_text() == "new"


@pytest.mark.parametrize("kind", ["pipe", "socket", "link to a pipe"])
def test_a_pipe_or_socket_is_not_replaced(kind: str, tmp_path: Path) -> None:
    """Never with a device of the system: without the check, root would replace that for the whole machine."""
    real, place = tmp_path / "real", tmp_path / "x.zip"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(place))  # the path of a socket must be short
    else:
        os.mkfifo(real if kind.startswith("link") else place)
    if kind.startswith("link"):
        place.symlink_to(real)
    before, mode = os.listdir(tmp_path), place.stat().st_mode
    for write in (lambda: save(place), lambda: _replace(place)):
        with pytest.raises(FileExistsError, match=r"x\.zip is a device, pipe or socket"):
            write()
    assert os.listdir(tmp_path) == before and place.stat().st_mode == mode


def _replace(place: Path) -> None:
    with files.replacing(place, "the thing"):
        raise AssertionError("not reached")


# ---- names, processes and races ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["模" * 70, "x" * 250, "é" * 120])
def test_long_names(name: str, tmp_path: Path) -> None:
    made = with_buffer()
    for path in (save(tmp_path / name), save(tmp_path / f"{name[:-10]}.zip")):
        assert artifact.read(path).config["n"] == 1
    for _ in range(2):
        made.save(tmp_path / "a.zip", replay_buffer=tmp_path / f"{name[:-14]}.safetensors")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_leftovers_of_long_names_are_not_mixed(tmp_path: Path) -> None:
    one, other = tmp_path / ("x" * 100 + "1"), tmp_path / ("x" * 100 + "2")
    left = files.temporary(one).with_suffix(".old")
    left.mkdir()
    assert files.find_moved(one) == left and files.find_moved(other) is None


def test_the_current_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = save(tmp_path / "a")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    save(place, 2)
    assert artifact.read(place).config["n"] == 2


def test_leftovers_whose_process_number_is_another_s_now(tmp_path: Path) -> None:
    """As process 1 of a container has in the next one; and those of other machines and containers, in the end."""
    place = tmp_path / "run"
    mine = files.temporary(place)
    start = files._started(os.getpid())
    assert start > 0 and f"-{os.getpid()}-{start}-" in mine.name
    earlier = mine.with_name(mine.name.replace(f"-{start}-", f"-{start - 1}-"))
    unknown = mine.with_name(mine.name.replace(f"-{start}-", "-0-"))
    fresh = mine.with_name(mine.name.replace(files._MACHINE, "0" * 8))
    ancient = mine.with_name(mine.name.replace(files._MACHINE, "1" * 8))
    for path in (mine, earlier, unknown, fresh, ancient):
        path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_MONTH", -1e9)
        assert set(files.leftovers(place)) == {earlier, fresh, ancient}
    assert files.leftovers(place) == [earlier]
    save(place)
    assert set(tmp_path.iterdir()) == {place, mine, unknown, fresh, ancient}


def test_two_processes_make_the_same_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_rename = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "run" and not Path(target).exists():
            monkeypatch.setattr(os, "rename", true_rename)
            save(tmp_path / "run", 1)  # the other one, in the meantime
        true_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path / "run", 2)
    assert artifact.read(tmp_path / "run").config["n"] == 2 and os.listdir(tmp_path) == ["run"]


KILLED = """
import os, signal, sys, torch
from diffagents import files
files._exchange = lambda *_: False
real = os.replace
def dying(source, target):
    real(source, target)
    if str(target).endswith(".old"): os.kill(os.getpid(), signal.SIGKILL)
os.replace = dying
files.replace_folder(files.Path(sys.argv[2]), files.Path(sys.argv[1]))
"""


def commits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bytes]]:
    """What is pushed from now on, without a Hub."""
    pushed: list[dict[str, bytes]] = []

    def commit(folder: Path, _: str) -> None:
        pushed.append({path.name: path.read_bytes() for path in folder.iterdir()})

    monkeypatch.setattr(hub.Repository, "open", lambda *_, **__: SimpleNamespace(commit=commit, readme=None))
    return pushed


def test_a_folder_that_a_killed_process_had_moved_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = agent().save_pretrained(tmp_path / "run")
    other = files.temporary(place)
    save(other)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(place), str(other)], timeout=60)
    assert killed.returncode == -9 and not place.exists()
    left = next(path for path in tmp_path.iterdir() if path.suffix == ".old")
    os.rename(left, left.with_name(left.name.replace(files._MACHINE, "0" * 8)))  # as after a new start of the machine
    for load in (diffagents.load, diffagents.TD3BC.load, diffagents.TD3BC.from_pretrained):
        assert type(load(place, device="cpu", verbose=0)) is diffagents.TD3BC
    pushed = commits(monkeypatch)
    registry.push_folder(place, "me/run", verbose=0)
    assert {"config.json", "model.safetensors", "README.md"} <= pushed[0].keys()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        registry.push_folder(tmp_path / "nothing", "me/run", verbose=0)


# ---- pushes ------------------------------------------------------------------------------------------------------------


def test_a_push_is_of_one_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although another process saves between the copies of its files."""
    place = tmp_path / "run"
    agents = [agent(seed) for seed in range(3)]
    agents[0].save_pretrained(place)
    later, true_copy = iter(agents[1:]), shutil.copyfile

    def copy(source: Any, target: Any) -> Any:
        done = true_copy(source, target)
        if Path(source).name == "model.safetensors" and (other := next(later, None)) is not None:
            other.save_pretrained(place)
        return done

    monkeypatch.setattr(shutil, "copyfile", copy)
    pushed = commits(monkeypatch)
    registry.push_folder(place, "me/run", verbose=0)
    for name in ("config.json", "model.safetensors", "learner.safetensors"):
        assert pushed[0][name] == (place / name).read_bytes(), name
    assert json.loads(pushed[0]["config.json"])["seed"] == 2


def test_a_damaged_folder_is_named_as_the_user_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = agent().save_pretrained(tmp_path / "run")
    (place / "model.safetensors").write_bytes(safetensors.torch.save({"w": torch.ones(1)})[:-1])
    commits(monkeypatch)
    with pytest.raises(ArtifactError, match=rf"^{place}: model\.safetensors is truncated"):
        registry.push_folder(place, "me/run", verbose=0)


def _latin_1(readme: Path) -> None:
    readme.write_bytes(readme.read_bytes() + "\nfür alle\n".encode("latin-1"))


def _itself(readme: Path) -> None:
    readme.unlink()
    readme.symlink_to("README.md")


@pytest.mark.parametrize(("edit", "refusal"), [(_latin_1, None), (_itself, "is a link that leads to itself")])
def test_odd_cards(edit: Callable[[Path], None], refusal: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = agent().save_pretrained(tmp_path / "run", license="cc-by-4.0")
    edit(place / "README.md")
    pushed = commits(monkeypatch)
    if refusal is None:
        registry.push_folder(place, "me/run", verbose=0)
        assert b"license: cc-by-4.0" in pushed[0]["README.md"]
    else:
        with pytest.raises(ArtifactError, match=refusal):
            registry.push_folder(place, "me/run", verbose=0)


def test_the_origin_is_said_before_it_is_published(tmp_path: Path) -> None:
    made = agent()
    made.state.provenance["source"] = {"repo_id": "acme-secret/\x1b[2Jrobot", "sha": "0" * 40}
    place = made.save_pretrained(tmp_path / "run")
    said = publish.what_is_published(place, "me/run")
    assert "started from: acme-secret/?[2Jrobot" in said
