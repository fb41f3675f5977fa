"""Mutated datasets and replay buffers: each is read, or refused by one of our errors in one printable line.

A mutant is made from its number alone, so a case that fails is made again by `python tests/data/test_fuzz_data.py KIND NUMBER`.
FILES and BUFFERS (environment variables) are the numbers of mutants; the slow test has 1,000 and 500.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

import diffagents
from diffagents.data.load import load_dataset
from diffagents.data.replay_buffer import Replay
from diffagents.errors import ArtifactError
from diffagents.types import Spec

FILES, BUFFERS = int(os.environ.get("FILES", "120")), int(os.environ.get("BUFFERS", "60"))
SECONDS, GROWTH = 20, 600 << 20
EXPECTED = (ValueError, TypeError, OSError)
N = 30
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 10**9, 10**30, 0.5, "", "x", "\x1b[31m", "<b>", "/etc/passwd", "a:b", [], {}, [1, [2]]),
    *("{}", '{"type": "Box"}', '{"id": "evil:X-v0"}', "inf", "nan", ["a"] * 3, {"a": {"b": {}}}),
    *("half \ud800", "x" * 5000, float("nan"), 10**400, [[[[[[]]]]]] * 9, "x\n\x1b" * 99),
)


def flat() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(N + 1, 3)).astype(np.float32)
    return {
        "observations": obs[:-1],
        "next_observations": obs[1:],
        "actions": rng.uniform(-1, 1, (N, 2)).astype(np.float32),
        "rewards": rng.normal(size=N).astype(np.float32),
        "terminals": np.arange(N) % 10 == 9,
        "timeouts": np.zeros(N, bool),
    }


def odd_array(random: Random, like: np.ndarray) -> Any:
    """Something that might stand where an array stood."""
    other: list[Callable[[], Any]] = [
        lambda: like[: random.randrange(len(like))],
        lambda: np.concatenate([like, like]),
        lambda: like.reshape(-1),
        lambda: like[None],
        lambda: like.astype(random.choice(["f2", "f8", "i1", "i8", "u1", "?", "c8"])),
        lambda: np.full_like(like, random.choice([0, 1]), dtype="f4") * random.choice([np.nan, np.inf, 1e38, 1e-45, -1]),
        lambda: np.zeros((0, *like.shape[1:]), like.dtype),
        lambda: np.array(random.choice([3, 1.5, b"text"])),
        lambda: np.array([b"a"] * len(like)),
        lambda: np.zeros((len(like), random.choice([1, 2, 300])), like.dtype),
        lambda: np.where(np.random.default_rng(0).random(like.shape) < 0.1, np.nan, like.astype("f4")),
    ]
    return random.choice(other)()


def odd_node(random: Random, group: h5py.Group, name: str) -> None:
    """Put something in the place of an array, or of the group with that name, that only an HDF5 file can hold."""
    del group[name]
    what = random.randrange(8)
    if what == 0:
        group.create_dataset(name, (10**6, random.choice([3, 300])), "f4", chunks=(10, 3))  # nothing is stored
    elif what == 1:
        group.create_dataset(name, (2**60,) * 20, "f4", chunks=(1,) * 20)
    elif what == 2:
        group.create_dataset(name, (N,), h5py.vlen_dtype("f4"))
    elif what == 3:
        group.create_dataset(name, (N,), [("\x1b[2J", "f4"), ("b", "f4", (100,))])
    elif what == 4:
        group.create_dataset(name, data=h5py.Empty("f4"))
    elif what == 5:
        group.create_dataset(name, (N,), h5py.ref_dtype)
    elif what == 6:
        group.create_group(name)[random.choice(["me", "\x1b", "x" * 5000])] = group
    else:
        group[name] = np.dtype("f4")


def a_d4rl_file(folder: Path, random: Random) -> Any:
    arrays = flat()
    for _ in range(random.randrange(3)):
        name = random.choice(list(arrays))
        what = random.randrange(4)
        if what == 0:
            del arrays[name]
        elif what == 1:
            arrays[random.choice(["masks", "valids", "qpos", "dones", "episode_0", "data", "infos", "terminations"])] = arrays[
                name
            ]
        else:
            arrays[name] = odd_array(random, np.asarray(arrays[name]))
    if random.random() < 0.5:
        np.savez(path := folder / "x.npz", **{name: value for name, value in arrays.items()})
        return path
    with h5py.File(path := folder / "x.hdf5", "w") as file:
        for name, value in arrays.items():
            file[name] = value
        if random.random() < 0.3:
            odd_node(random, file, random.choice(list(arrays)))
        if random.random() < 0.2:
            file["observations2"] = h5py.SoftLink("/nowhere")
            file.create_group("actions2/x/y")
    return path


def a_robomimic_file(folder: Path, random: Random) -> Any:
    with h5py.File(path := folder / "x.hdf5", "w") as file:
        for i in range(3):
            arrays = {key: value for key, value in flat().items() if key in ("actions", "rewards")}
            arrays |= {"dones": np.arange(N) == N - 1, "obs/pos": flat()["observations"]}
            arrays["next_obs/pos"] = flat()["next_observations"]
            demo = f"demo_{random.choice([i, i, i, 'x', ''])}{i}"
            for _ in range(random.randrange(2)):
                name = random.choice(list(arrays))
                arrays[name] = odd_array(random, np.asarray(arrays[name]))
            for name, value in arrays.items():
                if random.random() > 0.03:
                    file[f"data/{demo}/{name}"] = value
    return path


def a_minari_set(folder: Path, random: Random) -> Any:
    shutil.copytree(MINARI / "me", folder / "me")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    data = folder / "me/p/x-v0/data"
    metadata = json.loads((data / "metadata.json").read_text())
    for _ in range(random.randrange(3)):
        name = random.choice(list(metadata))
        value = random.choice(ODD)
        if random.random() < 0.3 and isinstance(metadata[name], str):
            value = metadata[name].replace(random.choice(metadata[name] or "x"), random.choice('0{[\\"x'), 1)
        metadata[name] = value
        if random.random() < 0.1:
            del metadata[name]
    (data / "metadata.json").write_text(json.dumps(metadata))
    if random.random() < 0.5:
        with h5py.File(data / "main_data.hdf5", "r+") as file:
            episode = file[f"episode_{random.randrange(2)}"]
            name = random.choice(list(episode))
            if isinstance(episode[name], h5py.Dataset):
                old = episode[name][()]
                del episode[name]
                if random.random() < 0.2:
                    episode[name] = old
                    odd_node(random, episode, name)
                elif random.random() < 0.9:
                    episode[name] = odd_array(random, np.asarray(old))
    return "me/p/x-v0"


def damaged(make: Callable[[Path, Random], Any]) -> Callable[[Path, Random], Any]:
    """The same files, with some bytes changed, cut off or doubled."""

    def make_damaged(folder: Path, random: Random) -> Any:
        source = make(folder, Random(1))
        path = folder / "me/p/x-v0/data/main_data.hdf5" if isinstance(source, str) else source
        data = bytearray(path.read_bytes())
        for _ in range(random.choice([1, 1, 3, 20])):
            data[random.randrange(len(data))] = random.randrange(256)
        if random.random() < 0.2:
            data = data[: random.randrange(len(data))]
        path.write_bytes(data)
        return source

    return make_damaged


KINDS = {
    "D4RL": a_d4rl_file,
    "robomimic": a_robomimic_file,
    "Minari": a_minari_set,
    "damaged D4RL": damaged(a_d4rl_file),
    "damaged Minari": damaged(a_minari_set),
}
MINARI = Path()


@pytest.fixture(scope="module", autouse=True)
def _minari(tmp_path_factory: pytest.TempPathFactory) -> None:
    make_minari(tmp_path_factory.mktemp("minari"))


def make_minari(root: Path) -> None:
    global MINARI
    MINARI = root
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffagents.collect(lambda _: np.zeros(1, np.float32), "Pendulum-v1", 400, "me/p/x-v0", root=root)


def a_buffer(folder: Path, random: Random) -> bytes:
    replay = Replay(3, 2, 40, "cpu")
    zeros = torch.zeros(10)
    replay.add(torch.ones(10, 3), torch.zeros(10, 2), zeros, zeros, torch.zeros(10, 3), np.zeros(10, bool))
    data = bytearray(replay.save(folder / "b", {"updates": 3}).read_bytes())
    size = int.from_bytes(data[:8], "little")
    if random.random() < 0.5:  # the header, as JSON
        header = json.loads(data[8 : 8 + size])
        ours = json.loads(header["__metadata__"]["diffagents"])
        for _ in range(random.choice([1, 2])):
            table = random.choice([ours, header, *(value for value in header.values() if isinstance(value, dict))])
            table[random.choice(list(table))] = random.choice(ODD)
        if isinstance(header.get("__metadata__"), dict) and random.random() < 0.9:
            header["__metadata__"]["diffagents"] = json.dumps(ours)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + bytes(data[8 + size :])
    for _ in range(random.choice([1, 3, 20])):
        data[random.randrange(len(data))] = random.randrange(256)
    return bytes(data[: random.randrange(len(data))] if random.random() < 0.2 else data)


def outcome(kind: str, number: int, folder: Path) -> str:
    """What reading a mutant comes to: "read", "refused", or what went wrong."""
    random = Random(f"{kind} {number}")
    started = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "buffer":
                (folder / "m.safetensors").write_bytes(a_buffer(folder, random))
                spec = Spec.from_spaces(gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,)))
                replay = Replay.load(folder / "m.safetensors", spec, torch.device("cpu"), {"updates": 3})
                assert bool(replay.matrix.isfinite().all())
            else:
                data = load_dataset(KINDS[kind](folder, random), cache=False, download=False)
                json.dumps(data.info, allow_nan=False, ensure_ascii=False).encode()
                assert len(json.dumps(data.info)) < 30_000
                for name in ("obs", "action", "rew", "next_obs", "done"):
                    assert bool(getattr(data, name).isfinite().all()), name
                assert len(data) == int(data.episode_ends[-1]) and int(data.done.sum()) <= len(data.episode_ends)
        result = "read"
    except ArtifactError as error:
        result = "refused" if kind == "buffer" else f"ArtifactError {error}"
        result = result if str(error).isprintable() else f"unprintable {str(error)!a}"
    except EXPECTED as error:
        result = "refused" if str(error).isprintable() and kind != "buffer" else f"{type(error).__name__} {str(error)!a}"
    except BaseException as error:
        result = f"{type(error).__name__} {ascii(str(error))[:300]}"
    took = time.monotonic() - started
    return f"{took:.0f} s" if took > SECONDS else result


def in_a_fork(kind: str, numbers: range, folder: Path) -> dict[int, str]:
    """The outcomes of some mutants, computed in a process with bounded memory, which a crash of a library may end."""
    torch.set_num_threads(1)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + GROWTH, size + GROWTH))
            signal.alarm(SECONDS * len(numbers))
            with os.fdopen(write_end, "w") as pipe:
                for number in numbers:
                    place = folder / f"{kind}-{number}".replace(" ", "-")
                    place.mkdir()
                    pipe.write(json.dumps([number, outcome(kind, number, place)]) + "\n")
                    pipe.flush()
                    shutil.rmtree(place)
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        outcomes = dict(json.loads(line) for line in pipe)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        outcomes[numbers[len(outcomes)]] = f"killed by signal {-status}"
    return outcomes


def check(kind: str, count: int, folder: Path) -> dict[str, int]:
    outcomes: dict[int, str] = {}
    while len(outcomes) < count:
        outcomes |= in_a_fork(kind, range(len(outcomes), count), folder)
        shutil.rmtree(folder)
        folder.mkdir()
    bad = {number: text for number, text in outcomes.items() if text not in ("read", "refused")}
    assert not bad, json.dumps(dict(list(bad.items())[:10]), indent=1)
    return {text: list(outcomes.values()).count(text) for text in ("read", "refused")}


@pytest.mark.parametrize("kind", [*KINDS, "buffer"])
def test_mutants_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    counts = check(kind, BUFFERS if kind == "buffer" else FILES // len(KINDS), tmp_path / "x")
    assert min(counts.values()) > 0 or kind.startswith("damaged"), counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "buffer"])
def test_many_mutants(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").mkdir()
    counts = check(kind, 500 if kind == "buffer" else 200, tmp_path / "x")
    with capsys.disabled():
        print(f"\n{kind}: {counts}")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        make_minari(Path(scratch) / "minari")
        place = Path(scratch) / "mutant"
        place.mkdir()
        print(outcome(sys.argv[1], int(sys.argv[2]), place))
