"""HDF5 files that name other files of this machine, or claim more than they hold: nothing of it is read."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import diffagents
from diffagents.data.load import load_dataset

N = 20
SECRET = b"PRIVATE KEY 0123456789abcdef!!!!"


def fill(group: Any) -> None:
    rng = np.random.default_rng(0)
    group["observations"] = rng.normal(size=(N, 2))
    group["actions"] = rng.uniform(-1, 1, (N, 2))
    group["rewards"] = np.arange(float(N))
    group["terminations"] = np.arange(N) % 10 == 9
    group["truncations"] = np.zeros(N, bool)


def external(file: Any, folder: Path) -> None:
    (folder / "id_rsa").write_bytes(SECRET * 10)
    file.create_dataset("observations", (N, 2), "i1", external=[(str(folder / "id_rsa"), 0, 2 * N)])


def external_link(file: Any, folder: Path) -> None:
    with h5py.File(folder / "other.hdf5", "w") as other:
        other["x"] = np.ones((N, 2))
    file["observations"] = h5py.ExternalLink(str(folder / "other.hdf5"), "/x")


def soft_link(file: Any, folder: Path) -> None:
    file["elsewhere"] = np.ones((N, 2))
    file["observations"] = h5py.SoftLink("/elsewhere")


def virtual(file: Any, folder: Path) -> None:
    with h5py.File(folder / "other.hdf5", "w") as other:
        other["x"] = np.ones((N, 2))
    layout = h5py.VirtualLayout((N, 2), "f8")
    layout[:] = h5py.VirtualSource(str(folder / "other.hdf5"), "x", (N, 2))
    file.create_virtual_dataset("observations", layout)


def pipe(file: Any, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    file["observations"] = h5py.ExternalLink(str(folder / "pipe"), "/x")


def claim(file: Any, folder: Path) -> None:
    file.create_dataset("observations", (10**9, 100), "f4", chunks=(1000, 100))  # nothing is stored


HOSTILE: dict[str, tuple[Callable[[Any, Path], None], str]] = {
    "external storage": (external, "'observations' is stored in other files"),
    "external link": (external_link, "'observations' is a link"),
    "soft link": (soft_link, "'observations' is a link"),
    "virtual dataset": (virtual, "'observations' is stored in other files"),
    "link to a pipe": (pipe, "'observations' is a link"),
    "size": (claim, "'observations' claims 400,000,000,000 bytes, of which 0 are stored"),
}


def refusal(path: Path) -> str:
    """Why `describe` refuses a file, which it reports if there are other arrays to describe, and else raises."""
    try:
        report = diffagents.describe(path, cache=False)
    except ValueError as error:
        return str(error)
    assert "observations" not in {row["name"] for row in report.facts["arrays"]}
    return report.refused or ""


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("inside", [False, True])
def test_a_flat_file(kind: str, inside: bool, tmp_path: Path) -> None:
    make, message = HOSTILE[kind]
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        fill(file)
        del file["observations"]
        make(file.create_group("observations") if inside else file, tmp_path)  # inside: a Dict observation
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path / "data.hdf5", cache=False)
    assert re.search(message, refusal(tmp_path / "data.hdf5"))


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_robomimic_file(kind: str, tmp_path: Path) -> None:
    make, message = HOSTILE[kind]
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        for name in ("obs", "next_obs"):
            demo[f"{name}/pos"] = np.ones((N, 2))
        demo["actions"], demo["rewards"], demo["dones"] = np.ones((N, 2)), np.ones(N), np.arange(N) == N - 1
        make(demo["obs"], tmp_path)
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path / "data.hdf5", cache=False)


@pytest.mark.parametrize("where", ["data", "data/demo_0", "data/demo_0/obs"])
def test_a_robomimic_file_whose_group_is_a_link(where: str, tmp_path: Path) -> None:
    parent, _, name = where.rpartition("/")
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        file.require_group(parent or "/")[name] = h5py.ExternalLink(str(tmp_path / "other.hdf5"), "/x")
        if name == "obs":
            for part in ("next_obs", "actions", "rewards", "dones"):
                file[f"{parent}/{part}"] = np.ones(N)
    with pytest.raises(ValueError, match=f"'{name}' is a link"):
        load_dataset(tmp_path / "data.hdf5", cache=False)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_minari_set(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, message = HOSTILE[kind]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    diffagents.collect(lambda _: np.zeros(1, np.float32), "Pendulum-v1", 200, "me/p/x-v0")
    with h5py.File(tmp_path / "sets/me/p/x-v0/data/main_data.hdf5", "r+") as file:
        del file["episode_0/observations"]
        make(file["episode_0"], tmp_path)
    with pytest.raises(ValueError, match=rf"Minari set 'me/p/x-v0' in .* is refused: {message}"):
        load_dataset("me/p/x-v0", download=False, cache=False)


def test_arrays_that_are_compressed_well_are_read(tmp_path: Path) -> None:
    n = 3_000_000
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        zeros = {"compression": "gzip", "compression_opts": 9, "chunks": (100_000, 6)}
        file.create_dataset("observations", data=np.zeros((n, 6), np.float32), **zeros)
        assert file["observations"].id.get_storage_size() * 900 < n * 6 * 4
        file["actions"], file["rewards"] = np.zeros((n, 1), np.float32), np.zeros(n, np.float32)
        file["terminations"] = np.arange(n) % 1000 == 999
        file["truncations"] = np.zeros(n, bool)
    assert len(load_dataset(tmp_path / "data.hdf5", cache=False)) == n
