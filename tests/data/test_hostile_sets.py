"""Minari sets, HDF5 and .npz files made to run code, to read other files, or to take all memory: each is refused."""

import io
import json
import os
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pytest

import diffagents
from diffagents.data import hdf5
from diffagents.data.load import load_dataset
from diffagents.data.transitions import Transitions

N = 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The `data` folder of a Minari set me/p/x-v0."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    diffagents.collect(lambda _: np.zeros(1, np.float32), "Pendulum-v1", 200, "me/p/x-v0")
    return tmp_path / "sets/me/p/x-v0/data"


def load() -> Transitions:
    return load_dataset("me/p/x-v0", download=False, cache=False)


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of the metadata; None removes one."""
    metadata = json.loads((folder / "metadata.json").read_text()) | changes
    metadata = {name: value for name, value in metadata.items() if value is not None}
    (folder / "metadata.json").write_text(json.dumps(metadata))


# ---- Minari: metadata ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["observation_space", "action_space"])
@pytest.mark.parametrize("value", [None, {"type": "Box"}])
@pytest.mark.parametrize("door", [load_dataset, diffagents.describe])
def test_the_environment_of_a_set_is_never_made(absent: str, value: Any, door: Callable[..., Any], folder: Path) -> None:
    marker = folder / "marker"
    spec = {"id": "X-v0", "entry_point": "os:system", "kwargs": {"command": f"touch {marker}"}, "additional_wrappers": []}
    edit(folder, env_spec=json.dumps(spec), eval_env_spec=json.dumps(spec), **{absent: value})
    (folder / "main_data.hdf5").write_bytes(b"")  # describe finds no arrays instead
    with pytest.raises(ValueError, match=f"has no {absent}, which Minari would take from the environment"):
        door("me/p/x-v0", download=False, cache=False)
    assert not marker.exists()


def test_a_set_with_spaces_is_read_whatever_its_environment_would_run(folder: Path) -> None:
    marker = folder / "marker"
    spec = {"id": "X-v0", "entry_point": "os:system", "kwargs": {"command": f"touch {marker}"}, "additional_wrappers": []}
    edit(folder, env_spec=json.dumps(spec), eval_env_spec=json.dumps(spec), requirements=["x @ file:///etc/passwd"])
    assert len(load()) == 200
    diffagents.describe("me/p/x-v0", download=False, cache=False, quick=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"total_episodes": 4 * 10**8}, OSError, "claims 400,000,000 episodes in"),
        ({"total_episodes": -1}, OSError, "claims -1 episodes in"),
        ({"total_steps": 90_000_000}, OSError, "claims 90,000,000 steps of 5 numbers in"),
        (
            {"action_space": json.dumps({"type": "Box", "dtype": "S100000000", "shape": [1], "low": [0], "high": [1]})},
            ValueError,
            "has the dtype S100000000, which is not one of numbers",
        ),
        (
            {"observation_space": '{"type": "Dict", "subspaces": {"\\ud800": {"type": "Discrete", "n": 1, "start": 0}}}'},
            ValueError,
            "surrogates not allowed",
        ),
        ({"observation_space": '{"type":"Tuple","subspaces":[' * 400 + "]}" * 400}, ValueError, "cannot be opened"),
    ],
)
def test_claims_of_the_metadata(changes: dict[str, Any], error: type[Exception], message: str, folder: Path) -> None:
    edit(folder, **changes)
    with pytest.raises(error, match=message):
        load()


def test_what_the_metadata_say_is_cut_and_cleaned(folder: Path) -> None:
    nested = json.loads("[" * 600 + "]" * 600)
    many = {"id": "X-v0", "additional_wrappers": [], "kwargs": {"a": ["x"] * 100_000}}
    edit(
        folder,
        dataset_id="\x1b[2J" + "x" * 10**6,
        description="half \ud800 " + "x" * 2_000_000,
        algorithm_name=nested,
        author=["me", "you"],
        ref_min_score=nested,
        ref_max_score=7,
        env_spec=json.dumps(many),
        eval_env_spec=json.dumps(many),
    )
    info = load().info
    assert info["id"].startswith("?[2Jxxx") and len(info["id"]) == 200
    assert info["made"]["description"].startswith("half ? xxx") and len(info["made"]["description"]) == 2000
    assert info["made"]["author"] == "['me', 'you']" and "algorithm_name" not in info["made"]
    assert info["ref_min_score"] is None and info["ref_max_score"] == 7.0 and info["env_spec"] is None
    assert len(json.dumps(info, ensure_ascii=False, allow_nan=False).encode()) < 20_000
    for odd in (float("nan"), float("inf"), 10**400, True, "1"):
        edit(folder, ref_min_score=odd)
        assert load().info["ref_min_score"] is None


# ---- Minari: files that are not the set's own ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["main_data.hdf5", "metadata.json"])
@pytest.mark.parametrize("door", [load_dataset, diffagents.describe])
def test_a_file_of_a_set_that_is_a_link_to_elsewhere(name: str, door: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / "private")
    (folder / name).symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=rf"{name} is a link to a file that is not in the dataset's folder"):
        door("me/p/x-v0", download=False, cache=False)


def test_a_folder_that_is_a_link_and_one_of_the_hubs_cache_are_read(folder: Path, tmp_path: Path) -> None:
    size = len(load())
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert len(load()) == size
    folder.unlink()
    snapshot = tmp_path / "hub/datasets--me--p/snapshots/0a1b/x-v0/data"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub/datasets--me--p/blobs").mkdir()
    for i, file in enumerate(sorted((tmp_path / "elsewhere").iterdir())):
        file.rename(tmp_path / f"hub/datasets--me--p/blobs/{i}")
        (snapshot / file.name).symlink_to(f"../../../../blobs/{i}")
    folder.symlink_to(snapshot)
    assert len(load()) == size


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_not_waited_for(folder: Path, tmp_path: Path) -> None:
    def late(*_: Any) -> None:
        raise TimeoutError("it is waited for")

    (folder / "main_data.hdf5").unlink()
    os.mkfifo(folder / "main_data.hdf5")
    os.mkfifo(tmp_path / "x.hdf5")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    try:
        with pytest.raises(ValueError, match=r"main_data.hdf5 is no regular file"):
            load()
        with pytest.raises(FileNotFoundError, match=r"x.hdf5 is no regular file"):
            load_dataset(tmp_path / "x.hdf5")
        with pytest.raises(ValueError, match=r"x.hdf5 is no regular file"):
            Transitions.load(tmp_path / "x.hdf5")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- HDF5 ----------------------------------------------------------------------------------------------------------------


def many_claims(file: Any) -> None:
    group = file.create_group("observations")
    for i in range(100):
        group.create_dataset(f"k{i}", (1_000_000, 16), "f4", chunks=(1000, 16))


def hard_links(file: Any) -> None:
    group = file.create_group("observations")
    group.create_dataset("a", (1_000_000, 16), "f4", chunks=(1000, 16))
    for i in range(100):
        group[f"h{i}"] = group["a"]


def doubled(file: Any) -> None:
    low = file.create_group("z")
    low["x"] = np.zeros((N, 1), "f4")
    for i in range(14):
        high = file.create_group(f"z{i}")
        high["l"] = high["r"] = low
        low = high
    file["observations"] = low


def itself(file: Any) -> None:
    group = file.create_group("observations")
    group["me"] = group


def lists(file: Any) -> None:
    file.create_dataset("observations", (N,), h5py.vlen_dtype("f4"))[0] = np.zeros(5_000, "f4")


def overflow(file: Any) -> None:
    file.create_dataset("observations", (2**60,) * 20, "f4", chunks=(1,) * 20)


def huge_chunk(file: Any) -> None:
    file.create_dataset("observations", (N, 2), "f4", chunks=(2**28, 2), maxshape=(None, 2))


FILES: dict[str, tuple[Callable[[Any], None], str]] = {
    "many claims": (many_claims, r"its arrays claim 64,000,\d+ bytes together, of which"),
    "hard links": (hard_links, r"its arrays claim 64,000,\d+ bytes together, of which"),
    "groups doubled by hard links": (doubled, "claims more arrays and groups than"),
    "a group in itself": (itself, "has groups more than 16 deep"),
    "references to the heap": (lists, "observations has dtype object, which is not a real number"),
    "a product that overflows": (overflow, r"'observations' claims [\d,]+ bytes, of which 0 are stored"),
    "a chunk": (huge_chunk, r"'observations' claims 2,147,483,648 bytes, of which 0 are stored"),
}


@pytest.mark.parametrize("kind", FILES)
def test_an_hdf5_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5, "FILE_UNCHECKED_BYTES", 1 << 24)
    make, message = FILES[kind]
    with h5py.File(path := tmp_path / "x.hdf5", "w", libver="earliest") as file:
        file["actions"], file["rewards"] = np.linspace(-1, 1, 2 * N).reshape(N, 2), np.arange(N, dtype="f4")
        file["terminations"], file["truncations"] = np.arange(N) % 10 == 9, np.zeros(N, bool)
        make(file)
    with pytest.raises((ValueError, TypeError), match=message):
        load_dataset(path, cache=False)
    # `describe` reports why the data were refused, with the other arrays, unless one of all of them is refused.
    try:
        refused = diffagents.describe(path, cache=False, quick=True).refused or ""
    except ValueError as error:
        refused = str(error)
    assert "observations" in refused or "its arrays" in refused or "groups" in refused


def test_the_size_of_a_chunk_that_the_file_states_is_not_believed(tmp_path: Path) -> None:
    with h5py.File(path := tmp_path / "x.hdf5", "w", libver="earliest") as file:
        rows = np.random.default_rng(0).integers(0, 9, (1000, 40)).astype("f4")
        data = file.create_dataset("observations", (400_000_000, 40), "f4", chunks=(1000, 40), compression="gzip")
        data[:1000] = rows
        size = data.id.get_chunk_info(0).size
    content = path.read_bytes()
    at = content.index(struct.pack("<IIQQQ", size, 0, 0, 0, 0))
    path.write_bytes(content[:at] + struct.pack("<I", 2**32 - 1) + content[at + 4 :])
    with pytest.raises(ValueError, match=rf"claims 64,000,000,000 bytes, of which {len(content):,} are stored"):
        load_dataset(path, cache=False)


def test_a_name_with_a_slash_does_not_lead_through_a_link(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "private.hdf5", "w") as file:
        file["b"] = np.ones((N, 2))
    with h5py.File(path := tmp_path / "x.hdf5", "w") as file:
        group = file.create_group("observations")
        group["l"] = h5py.ExternalLink(str(tmp_path / "private.hdf5"), "/")
        group["l_b"] = np.zeros((N, 2))
    path.write_bytes(path.read_bytes().replace(b"l_b\0", b"l/b\0"))
    with hdf5.opened(path) as (file, budget), pytest.raises(hdf5.ForeignContent, match="'l/b' is no name"):
        hdf5.read_node(file["observations"].id, b"l/b", budget)
    with pytest.raises(ValueError, match=r"is a link|is no name"):
        load_dataset(path, cache=False)


def test_an_array_in_two_groups_is_read_twice(tmp_path: Path) -> None:
    with h5py.File(path := tmp_path / "x.hdf5", "w") as file:
        file["actions"], file["rewards"] = np.linspace(-1, 1, 2 * N).reshape(N, 2), np.arange(N, dtype="f4")
        file["terminations"] = file["truncations"] = np.zeros(N, bool)
        file["observations/a"] = np.ones((N, 2))
        file["observations/b"] = file["observations/a"]
        file["observations/text"] = ["one that is not chosen"] * N
    assert load_dataset(path, cache=False, obs_keys=["a", "b"]).spec.obs_dim == 4


def test_lists_of_any_length_are_not_read(tmp_path: Path) -> None:
    with h5py.File(path := tmp_path / "x.hdf5", "w") as file:
        lists(file)
    with hdf5.opened(path) as (file, budget):
        assert len(hdf5.read(file, "observations", budget)) == 0
        assert not hdf5.arrays(file, budget)


def test_a_set_that_minari_has_opened_is_described_by_our_reader(folder: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "private.hdf5", "w") as file:
        file["x"] = np.ones((201, 3))
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        del file["episode_0/observations"]
        file["episode_0/observations"] = h5py.ExternalLink(str(tmp_path / "private.hdf5"), "/x")
    with pytest.raises(ValueError, match="'observations' is a link"):
        diffagents.describe(minari.load_dataset("me/p/x-v0"), cache=False)


# ---- .npz ----------------------------------------------------------------------------------------------------------------


def npz(path: Path, observations: bytes, method: int = zipfile.ZIP_STORED) -> None:
    arrays = {"actions": np.zeros((N, 2), "f4"), "rewards": np.zeros(N, "f4"), "terminations": np.zeros(N, bool)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in {**arrays, "truncations": np.arange(N) == N - 1}.items():
            np.save(buffer := io.BytesIO(), array)
            archive.writestr(f"{name}.npy", buffer.getvalue())
        archive.writestr("observations.npy", observations, method)


def array_file(array: np.ndarray, claimed: tuple[int, ...] | None = None) -> bytes:
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": claimed or array.shape}
    np.lib.format.write_array_header_1_0(buffer := io.BytesIO(), header)
    return buffer.getvalue() + array.tobytes()


@pytest.mark.parametrize(
    ("content", "method", "message"),
    [
        (array_file(np.zeros((N, 3), "f4")), zipfile.ZIP_BZIP2, "observations.npy is compressed with method 12"),
        (array_file(np.zeros((N, 3), "f4")), zipfile.ZIP_LZMA, "observations.npy is compressed with method 14"),
        (array_file(np.zeros((N, 3), "f4"), (2**33, 3)), 0, r"observations.npy claims the shape \(8589934592, 3\), but has"),
        (bytes(1 << 24), zipfile.ZIP_DEFLATED, r"its arrays claim 16,7\d+,\d+ bytes together, of which"),
    ],
    ids=["bz2", "lzma", "shape", "zeros"],
)
@pytest.mark.parametrize("door", [load_dataset, diffagents.describe])
def test_an_npz_file(
    content: bytes,
    method: int,
    message: str,
    door: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hdf5, "FILE_UNCHECKED_BYTES", 1 << 20)
    npz(tmp_path / "x.npz", content, method)
    with pytest.raises(ValueError, match=message):
        door(tmp_path / "x.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_plain_npz_file_is_read(method: int, tmp_path: Path) -> None:
    npz(tmp_path / "x.npz", array_file(np.zeros((N, 3), "f4")), method)
    assert len(load_dataset(tmp_path / "x.npz")) == N - 1


# ---- names in messages ---------------------------------------------------------------------------------------------------


def test_names_of_a_stranger_are_printed_without_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {"actions": np.zeros((N, 2), "f4"), "rewards": np.zeros(N, "f4"), "terminations": np.zeros(N, bool)}
    arrays |= {"truncations": np.arange(N) == N - 1, "observations": np.zeros((N, 3), "f4")}
    name = os.fsdecode(b"\x1b[2Jdonn\xe9e.npz")
    with open(tmp_path / name, "wb") as file:
        np.savez(file, **arrays)
    with pytest.warns(UserWarning, match="donn") as caught:
        data = load_dataset(tmp_path / name, verbose=1)
    assert data.info["id"] == "?[2Jdonn?e.npz"
    assert capsys.readouterr().out.startswith("?[2Jdonn?e.npz: 19 transitions")
    assert all(str(warning.message).isprintable() for warning in caught)
    for odd in (
        {"\x1b[2J": arrays["rewards"], "observations": arrays["observations"]},
        {"terminals": arrays["rewards"], "masks": arrays["rewards"], "\x1b[2J": arrays["rewards"]},
        {**{key: arrays[key] for key in arrays if key != "observations"}, "observations/\x1b[2J": arrays["rewards"]},
        {**arrays, "observations": np.zeros(N, [("\x1b[2J", "f4")])},
    ):
        np.savez(tmp_path / "x.npz", **odd)
        with pytest.raises((ValueError, TypeError)) as raised:
            load_dataset(tmp_path / "x.npz")
        assert str(raised.value).isprintable(), ascii(str(raised.value))


def test_a_file_of_transitions_that_is_damaged(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    for header in ({}, {"diffagents": "[]"}, {"diffagents": '{"format": 1}'}, {"diffagents": "[" * 10**5}):
        save_file({"obs": np.zeros(3)}, tmp_path / "x", header)
        with pytest.raises(ValueError, match=r"has transitions format|is damaged|is not|recursion"):
            Transitions.load(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is damaged, or Transitions.save did not write it"):
        Transitions.load(tmp_path / "x")
