"""Artifacts: what is written comes back exactly; a failed write harms nothing; files from strangers are refused."""

import errno
import json
import os
import pickle
import resource
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import stable_baselines3
import torch
from torch import Tensor, nn

from diffagents import files
from diffagents.errors import ArtifactError
from diffagents.storage import artifact, hub
from diffagents.storage.artifact import read, to_json_safe, write
from diffagents.training.state import load_optimizer, load_state, optimizer_tensors

CONFIG = {"algorithm": "SRPO", "knobs": {"beta": 0.1, "sizes": (2, 3)}}
STATE = {"plan": [1, 2], "seed": 2**127 + 1}


def net(value: float = 0.5) -> nn.Sequential:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)
    return module


def parts(value: float = 0.5) -> dict[str, dict[str, Tensor]]:
    return {"model": net(value).state_dict(), "learner": {"q.count": torch.tensor(3)}}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ---- writing and reading back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [False, True])
def test_round_trip(tmp_path: Path, folder: bool) -> None:
    tensors = {
        "model": {"w": torch.randn(3, 2), "scalar": torch.tensor(2.5, dtype=torch.float64), "none": torch.empty(0, 4)},
        "learner": {"half": torch.randn(4).bfloat16(), "flag": torch.tensor([True, False])},
        "optimizer": {"rng": torch.Generator().get_state(), "count": torch.tensor(2**40)},
    }
    place = write(tmp_path / "a" / "b", CONFIG, tensors, STATE, folder=folder)
    assert place == tmp_path / "a" / ("b" if folder else "b.zip")
    assert place.is_dir() == folder
    found = read(place)
    expected = {"format": 1, "library": "diffagents", "algorithm": "SRPO", "knobs": {"beta": 0.1, "sizes": [2, 3]}}
    assert found.config == expected
    assert found.path == place
    assert found.trainer_state() == STATE
    for name, given in tensors.items():
        back = found.tensors(name)
        assert back.keys() == given.keys()
        assert all(back[key].dtype == value.dtype and torch.equal(back[key], value) for key, value in given.items())
    assert names(place.parent) == [place.name]


def test_optional_files_may_be_absent(tmp_path: Path) -> None:
    for folder in (False, True):
        found = read(write(tmp_path / str(folder), CONFIG, {"model": {}}, folder=folder))
        assert [found.has(name) for name in ("model", "learner", "optimizer", "trainer_state")] == [True] + [False] * 3
        assert found.trainer_state() is None
        with pytest.raises(ArtifactError, match=r"learner\.safetensors is missing: this copy can act"):
            found.tensors("learner")
        with pytest.raises(ArtifactError, match=r"optimizer\.safetensors is missing: .* start a new one"):
            found.tensors("optimizer")


def test_only_the_file_asked_for_is_read(tmp_path: Path) -> None:
    place = write(tmp_path / "a", CONFIG, parts(), STATE, folder=True)
    for name in ("learner.safetensors", "trainer_state.json"):
        (place / name).write_bytes(b"damaged")
    assert read(place).tensors("model").keys() == net().state_dict().keys()


def test_awkward_tensors_are_copied_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tied = nn.Parameter(torch.ones(2))
    given = {"t": base.t(), "row": base[1], "same": base, "wide": torch.ones(1).expand(5), "p": tied, "again": tied}
    place = write(tmp_path / "a", CONFIG, {"model": given}, folder=True)
    back = read(place).tensors("model")
    assert all(torch.equal(back[key], value) for key, value in given.items())
    assert (place / "model.safetensors").stat().st_size < 1000  # "row" did not bring all of "base" along


class Compiled(nn.Module):
    """Names its parts as torch.compile does, whose import takes many seconds."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def test_names_lose_what_compiling_adds(tmp_path: Path) -> None:
    module = nn.ModuleDict({"pi": Compiled(net(0.25))})
    assert "pi._orig_mod.0.weight" in module.state_dict()
    back = read(write(tmp_path / "a", CONFIG, {"model": module.state_dict()})).tensors("model")
    assert set(back) == {"pi.0.weight", "pi.0.bias", "pi.1.weight", "pi.1.bias"}
    fresh = nn.ModuleDict({"pi": Compiled(net(0.0))})
    load_state(fresh, back)
    assert all((value == 0.25).all() for value in fresh.state_dict().values())
    with pytest.raises(ValueError, match="two model tensors have the same name"):
        write(tmp_path / "b", CONFIG, {"model": {"_orig_mod.w": torch.ones(1), "w": torch.ones(1)}})


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, CONFIG, parts()) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize(
    ("given", "made"),
    [("best_model", "best_model.zip"), ("x.zip", "x.zip"), ("beta0.05", "beta0.05.zip"), ("there", "there")],
)
def test_suffix_rule_and_reading_with_or_without_it(tmp_path: Path, given: str, made: str) -> None:
    (tmp_path / "there").mkdir()
    assert write(str(tmp_path / given), CONFIG, parts()) == tmp_path / made
    for name in (made, made.removesuffix(".zip"), made.removesuffix(".zip") + ".zip"):
        assert read(tmp_path / name).path == tmp_path / made
    assert (tmp_path / made).is_dir() == (made == "there")


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        place = write(tmp_path / "a", CONFIG, parts())
        folder = write(tmp_path / "b", CONFIG, parts(), folder=True)
    finally:
        os.umask(old)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (place, folder, folder / "config.json")] == [0o644, 0o755, 0o644]


def test_overwriting_a_folder_keeps_what_is_not_ours(tmp_path: Path) -> None:
    place = write(tmp_path / "a", CONFIG, {**parts(), "optimizer": {}}, STATE, folder=True)
    (place / ".git").mkdir()
    (place / ".git" / "config.json").write_text("kept")
    (place / "README.md").write_text("read me")
    (place / "link").symlink_to("README.md")
    write(place, {"algorithm": "IQL"}, parts(0.75))
    assert names(tmp_path) == ["a"]
    assert names(place) == [".git", "README.md", "config.json", "learner.safetensors", "link", "model.safetensors"]
    assert (place / ".git" / "config.json").read_text() == "kept"
    assert (place / "link").is_symlink()
    assert (place / "README.md").read_text() == "read me"
    assert read(place).config["algorithm"] == "IQL"
    assert read(place).tensors("model")["0.bias"][0] == 0.75


@pytest.mark.parametrize("folder", [False, True])
def test_writing_through_a_link_keeps_the_link(tmp_path: Path, folder: bool) -> None:
    real = write(tmp_path / "runs" / "a", CONFIG, parts(), folder=folder)
    link = tmp_path / ("best" if folder else "best.zip")
    link.symlink_to(real)
    write(link, CONFIG, parts(0.75))
    assert link.is_symlink()
    assert read(real).tensors("model")["0.bias"][0] == 0.75


def test_a_cache_made_of_links_is_read(tmp_path: Path) -> None:
    """The Hub's cache: snapshots/<sha>/config.json -> ../../blobs/<hash>."""
    blobs = write(tmp_path / "blobs", CONFIG, parts(), folder=True)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in names(blobs):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert read(snapshot).tensors("model").keys() == net().state_dict().keys()


def taken_by_a_file(path: Path) -> None:
    path.write_text("mine")


def taken_by_other_files(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def taken_by_a_foreign_config(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text('{"library": "other"}')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (taken_by_a_file, "is a file"),
        (taken_by_other_files, "other files but no artifact"),
        (taken_by_a_foreign_config, "other files but no artifact"),
    ],
)
def test_what_is_not_ours_is_not_replaced(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "a")
    before = {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match=message):
        write(tmp_path / "a", CONFIG, parts(), folder=True)
    assert {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_folder_called_zip_and_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").mkdir()
    with pytest.raises(FileExistsError, match=r"a\.zip is a folder"):
        write(tmp_path / "a", CONFIG, parts())
    monkeypatch.chdir(tmp_path / "a.zip")
    with pytest.raises(PermissionError, match="current directory"):
        write(".", CONFIG, parts())
    assert Path.cwd().exists()


@pytest.mark.parametrize(
    ("config", "tensors", "state", "error", "message"),
    [
        ({}, parts(), None, ValueError, r"config\['algorithm'\]"),
        (CONFIG, {"learner": {}}, None, ValueError, "must have 'model'"),
        (CONFIG, {"model": {}, "actor": {}}, None, ValueError, "'actor', 'model'"),
        (CONFIG, {"model": {"w": torch.tensor([1.0, float("nan")])}}, None, ValueError, "model tensors: w contains NaN"),
        (CONFIG, {"model": {"w": torch.ones(1, dtype=torch.complex64)}}, None, ValueError, "w has the dtype"),
        ({**CONFIG, "knobs": {"f": [print]}}, parts(), None, TypeError, r"config\['knobs'\]\['f'\]\[0\] is a builtin"),
        (CONFIG, parts(), {"a": {1: 2}}, TypeError, r"trainer_state\['a'\] is a dict with keys that are not strings"),
        ({**CONFIG, "x": "x" * (1 << 20)}, parts(), None, ValueError, r"config\.json would have .* bytes"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(
    tmp_path: Path, config: Any, tensors: Any, state: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write(tmp_path / "a", config, tensors, state)
    assert names(tmp_path) == []


# ---- a write that fails ----------------------------------------------------------------------------------------------


def full_on_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def no_replacing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(files, "_exchange", lambda *_: False)


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Any, target: Any) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "_exchange", refuse)
    monkeypatch.setattr(os, "replace", refuse)


def second_replace_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    true_replace, calls = os.replace, []

    def replace(source: Any, target: Any) -> None:
        calls.append(source)
        if Path(source).suffix == ".tmp":
            raise OSError(errno.EIO, "Input/output error")
        true_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(files, "_exchange", lambda *_: False)


def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("fault", [full_on_sync, no_replacing, no_exchange, second_replace_fails, interrupted])
def test_a_failed_write_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, folder: bool, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    place = write(tmp_path / "a", CONFIG, parts(), folder=folder)
    if folder:
        (place / "README.md").write_text("kept")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        fault(monkeypatch)
        with pytest.raises((OSError, KeyboardInterrupt)) as caught:
            write(place, CONFIG, parts(0.75))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert names(tmp_path) == [place.name]
    if isinstance(caught.value, OSError):
        assert "not written; an older one is unchanged" in str(caught.value)
        assert str(place) in str(caught.value)
    write(place, CONFIG, parts(0.75))
    assert read(place).tensors("model")["0.bias"][0] == 0.75


@pytest.mark.parametrize("folder", [False, True])
def test_a_disk_that_takes_only_a_part(tmp_path: Path, folder: bool) -> None:
    """A real short write: the kernel refuses to let any file grow over 8 kB."""
    place = write(tmp_path / "a", CONFIG, parts(), folder=folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match="not written") as caught:
            write(place, CONFIG, {"model": {"w": torch.ones(10_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == [place.name]
    assert read(place).tensors("model")["0.bias"][0] == 0.5


@pytest.mark.parametrize("folder", [False, True])
def test_a_killed_write_leaves_the_old_one(tmp_path: Path, folder: bool) -> None:
    place = write(tmp_path / "a", CONFIG, parts(), folder=folder)
    code = (
        "import os, signal, sys, torch; from diffagents.storage.artifact import write\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write(sys.argv[1], {'algorithm': 'SRPO'}, {'model': {'w': torch.ones(9)}})"
    )
    assert subprocess.run([sys.executable, "-c", code, str(place)], timeout=60).returncode == -9
    assert read(place).tensors("model")["0.bias"][0] == 0.5


def test_no_parent_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="not written"):
        write(tmp_path / "file" / "a", CONFIG, parts())
    assert (tmp_path / "file").read_text() == "mine"


# ---- what is refused -------------------------------------------------------------------------------------------------


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        place = write(path / "a", CONFIG, parts(), folder=True)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(change(config)))
        return place

    return make


def config_bytes(data: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        place = write(path / "a", CONFIG, parts(), folder=True)
        (place / "config.json").write_bytes(data)
        return place

    return make


def model_bytes(change: Callable[[bytes], bytes], folder: bool = True) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        place = write(path / "a", CONFIG, parts(), folder=folder)
        if folder:
            (place / "model.safetensors").write_bytes(change((place / "model.safetensors").read_bytes()))
        else:
            place.write_bytes(change(place.read_bytes()))
        return place

    return make


def zipped(
    extra: str | zipfile.ZipInfo, data: bytes = b"", keep: bool = True, how: int = zipfile.ZIP_STORED
) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        source = write(path / "source", CONFIG, parts(), folder=True)
        with zipfile.ZipFile(path / "a.zip", "w", how) as archive:
            for name in names(source) if keep else []:
                archive.write(source / name, name)
            archive.writestr(extra, data)
        return path / "a.zip"

    return make


def a_file(data: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path / "a.zip").write_bytes(data)
        return path / "a.zip"

    return make


def huge(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        place = write(path / "a", CONFIG, parts(), folder=True)
        os.truncate(place / name, (1 << 32) + 1)  # a hole: takes no space on disk
        return place

    return make


def declared_huge(path: Path) -> Path:
    """A zip whose directory says that a member is just over 4 GB."""
    info = zipfile.ZipInfo("replay.mp4")
    place = zipped(info, b"x")(path)
    data = place.read_bytes()
    at = data.rindex(b"PK\x01\x02")
    sizes = struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF)
    extra = struct.pack("<HHQQ", 1, 16, (1 << 32) + 1, (1 << 32) + 1)
    name_end = at + 46 + len("replay.mp4")
    head = data[at : at + 20] + sizes + data[at + 28 : at + 30] + struct.pack("<H", len(extra))
    entry = head + data[at + 32 : name_end] + extra
    end = data[name_end:]
    size = struct.unpack("<I", end[12:16])[0] + 20
    place.write_bytes(data[:at] + entry + end[:12] + struct.pack("<I", size) + end[16:])
    return place


def a_pipe(path: Path) -> Path:
    place = write(path / "a", CONFIG, parts(), folder=True)
    (place / "model.safetensors").unlink()
    os.mkfifo(place / "model.safetensors")
    return place


def a_pipe_itself(path: Path) -> Path:
    os.mkfifo(path / "a")
    return path / "a"


def without(*files: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        place = write(path / "a", CONFIG, parts(), folder=True)
        for name in files:
            (place / name).unlink()
        return place

    return make


def weights(**tensors: Tensor) -> Callable[[Path], Path]:
    return model_bytes(lambda data: safetensors.torch.save(tensors))


def torch_saved(path: Path) -> Path:
    torch.save({"w": torch.ones(2)}, path / "a.pt")
    return path / "a.pt"


def legacy_torch_saved(path: Path) -> Path:
    torch.save({"w": torch.ones(2)}, path / "a.pt", _use_new_zipfile_serialization=False)
    return path / "a.pt"


def sb3_saved(path: Path) -> Path:
    stable_baselines3.PPO("MlpPolicy", "Pendulum-v1", n_steps=2, batch_size=2, device="cpu").save(path / "a")
    return path / "a.zip"


def header(text: str, size: int | None = None) -> Callable[[Path], Path]:
    data = text.encode()
    return model_bytes(lambda _: struct.pack("<Q", len(data) if size is None else size) + data)


def symlink_info() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("README.md")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


class Evil:
    """Unpickling this leaves by SystemExit, which no `except Exception` hides."""

    def __reduce__(self) -> Any:
        return sys.exit, ("unpickled",)


EVIL = pickle.dumps(Evil())
DEEP = b'{"library": "diffagents", "format": 1, "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
BIG_INT = b'{"library": "diffagents", "format": ' + b"9" * 5000 + b"}"
NAN, INF = torch.tensor([1.0, float("nan")]), torch.tensor(float("-inf"))

REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a pickle": (a_file(EVIL), "is a pickle, which is never opened"),
    "torch.save": (torch_saved, "is a torch.save file, which is never opened"),
    "torch.save, legacy": (legacy_torch_saved, "is a pickle, which is never opened"),
    "stable-baselines3": (sb3_saved, "is a Stable-Baselines3 file: load it with Stable-Baselines3"),
    "empty file": (a_file(b""), "neither a zip nor a folder"),
    "text file": (a_file(b"hello"), "neither a zip nor a folder"),
    "pipe": (a_pipe_itself, "neither a folder nor a regular file"),
    "truncated zip": (model_bytes(lambda data: data[:-30], folder=False), "truncated or damaged zip"),
    "half a zip": (model_bytes(lambda data: data[: len(data) // 2], folder=False), "truncated or damaged zip"),
    "zip with a flipped bit": (model_bytes(lambda data: data.replace(b"SRPO", b"SRPP"), folder=False), "damaged zip"),
    "foreign zip": (zipped("notes.txt", b"x", keep=False), r"not a diffagents artifact \(no config\.json"),
    "zip of a folder": (zipped("a/config.json", b"{}", keep=False), r"not a diffagents artifact \(no config\.json"),
    "empty folder": (without("config.json", "model.safetensors", "learner.safetensors"), "not a diffagents artifact"),
    "folder without config": (without("config.json"), "not a diffagents artifact"),
    "folder without model": (without("model.safetensors"), r"has no model\.safetensors: save, copy or download"),
    "config is a list": (edit(lambda config: [config]), "config.json is a list, not an object"),
    "config is not JSON": (config_bytes(b"{'format': 1}"), r"config\.json is not JSON \(Expecting property"),
    "config is binary": (config_bytes(b"\xff\xfe\x00"), r"config\.json is not JSON \('utf-8' codec"),
    "config is empty": (config_bytes(b""), "is not JSON"),
    "config with NaN": (config_bytes(b'{"x": NaN}'), "not JSON .a number that is not finite"),
    "config with Infinity": (config_bytes(b'{"x": -Infinity}'), "not JSON .a number that is not finite"),
    "config with overflow": (config_bytes(b'{"x": 1e999}'), "not JSON .a number that is not finite"),
    "config too deep": (config_bytes(DEEP), "nested too deep"),
    "config too large": (config_bytes(b" " * (1 << 20) + b"{}"), "has 1048578 bytes, more than the 1048576 allowed"),
    "config with a bomb of digits": (config_bytes(BIG_INT), "is not JSON"),
    "foreign library": (edit(lambda c: {**c, "library": "lerobot"}), "names the library lerobot, not diffagents"),
    "no library": (edit(lambda c: {"format": 1, "algorithm": "SRPO"}), "names the library None, not diffagents"),
    "SB3's config": (edit(lambda c: {"policy_class": {}}), "load it with Stable-Baselines3"),
    "newer format": (
        edit(lambda c: {**c, "format": 2}),
        "format 2, but this version reads at most format 1; .* from a newer diffagents: upgrade",
    ),
    "much newer format": (
        edit(lambda c: {**c, "format": 10**4000}),
        "format int, but this version reads at most format 1; .* from a newer diffagents",
    ),
    "format 0": (edit(lambda c: {**c, "format": 0}), "the format 0, not a whole number"),
    "format true": (edit(lambda c: {**c, "format": True}), "the format True, not a whole number"),
    "format 1.0": (edit(lambda c: {**c, "format": 1.0}), r"the format 1\.0, not a whole number"),
    "format '1'": (edit(lambda c: {**c, "format": "1\n2"}), r"the format 1\\n2, not a whole number"),
    "no algorithm": (edit(lambda c: {**c, "algorithm": None}), "names no algorithm"),
    "path traversal": (zipped("../evil.py"), r"unsafe file name or link, \.\./evil\.py"),
    "inner path traversal": (zipped("a/../../evil.py"), "unsafe file name"),
    "absolute path": (zipped("/etc/evil"), "unsafe file name"),
    "Windows path": (zipped("C:evil"), "unsafe file name"),
    "backslashes": (zipped("..\\evil"), "unsafe file name"),
    "symbolic link": (zipped(symlink_info(), b"/etc/passwd"), "unsafe file name or link, README.md"),
    "one name twice": (zipped("model.safetensors", b"other"), "the same name twice"),
    "zip bomb": (zipped("replay.mp4", b"\0" * (2 << 20), how=zipfile.ZIP_DEFLATED), "a zip bomb, replay.mp4"),
    "declared size": (declared_huge, "(a zip bomb, replay.mp4|replay.mp4 has) .*4294967297 bytes"),
    "model too large": (huge("model.safetensors"), "has 4294967297 bytes, more than the 4294967296 allowed"),
    "model is a pipe": (a_pipe, "is not a regular file"),
    "model is empty": (model_bytes(lambda data: b""), "truncated or damaged"),
    "model truncated": (model_bytes(lambda data: data[:-1]), "truncated or damaged"),
    "model cut in its header": (model_bytes(lambda data: data[:20]), "truncated or damaged"),
    "model longer": (model_bytes(lambda data: data + b"x"), "truncated or damaged"),
    "model is a pickle": (model_bytes(lambda data: EVIL), "not a safetensors file; it is a pickle under another name"),
    "model is a torch.save file": (
        lambda path: model_bytes(lambda data: torch_saved(path).read_bytes())(path),
        "not a safetensors file; it is a pickle under another name",
    ),
    "model with an absurd header": (header("{}", 200_000_000), "not a safetensors file; it claims a header of 200000000 bytes"),
    "model with a lying header": (header("{}", 5_000_000), "truncated or damaged"),
    "model with a nested header": (header('{"w":' * 5000), "truncated or damaged"),
    "model with a shape from the moon": (
        header('{"w": {"dtype": "F32", "shape": [4294967296, 4294967296, 4294967296], "data_offsets": [0, 0]}}'),
        "truncated or damaged",
    ),
    "model with offsets beyond": (
        header('{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'),
        "truncated or damaged",
    ),
    "model with an unknown dtype": (
        header('{"w": {"dtype": "F1", "shape": [0], "data_offsets": [0, 0]}}'),
        "truncated or damaged",
    ),
    "NaN in a weight": (weights(good=torch.ones(2), bad=NAN), "bad contains NaN or infinity: load an earlier"),
    "infinity in a weight": (weights(bad=INF), "bad contains NaN or infinity"),
    "complex weights": (weights(w=torch.ones(1, dtype=torch.complex64)), r"w has the dtype torch\.complex64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    path = make(tmp_path)
    with pytest.raises(ArtifactError, match=message) as caught:
        read(path).tensors("model")
    text = str(caught.value)
    assert str(path) in text
    assert text.isprintable()  # one line, and nothing from the file that a terminal would act on
    assert len(text) < 300 + len(str(path))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no artifact at .*gone nor at .*gone\.zip"):
        read(tmp_path / "gone")


def test_the_trainer_state_is_as_strict(tmp_path: Path) -> None:
    place = write(tmp_path / "a", CONFIG, parts(), STATE, folder=True)
    (place / "trainer_state.json").write_text('{"x": Infinity}')
    with pytest.raises(ArtifactError, match=r"trainer_state\.json is not JSON"):
        read(place).trainer_state()


def test_errors_about_a_download_name_its_commit(tmp_path: Path) -> None:
    """And not the folder in the Hub's cache."""
    place, commit = write(tmp_path / "a", CONFIG, parts(), STATE, folder=True), hub.Origin("me/policy", "0123456789" * 4)
    found = read(place, commit)
    for name in ("model.safetensors", "trainer_state.json", "config.json"):
        (place / name).write_bytes(b"damaged")
    for use in (lambda: found.tensors("model"), found.trainer_state, lambda: read(place, commit)):
        with pytest.raises(ArtifactError, match=r"me/policy \(commit 01234567\): ") as caught:
            use()
        assert str(place) not in str(caught.value)


def test_other_files_are_allowed_and_compression_too(tmp_path: Path) -> None:
    place = zipped("data", b"{}", how=zipfile.ZIP_DEFLATED)(tmp_path)  # huggingface_sb3 wants a member of this name
    assert read(place).tensors("model").keys() == net().state_dict().keys()


def test_many_members(tmp_path: Path) -> None:
    place = tmp_path / "a.zip"
    with zipfile.ZipFile(place, "w") as archive:
        for i in range(1001):
            archive.writestr(f"config.json{i}" if i else "config.json", b"{}")
    with pytest.raises(ArtifactError, match="contains 1001 files"):
        read(place)


def test_formats_of_old_are_migrated_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write(tmp_path / "a", {"algorithm": "SRPO", "temperature": 3}, parts())
    monkeypatch.setattr(artifact, "FORMAT", 3)
    monkeypatch.setitem(artifact.MIGRATIONS, 1, lambda old: {**old, "beta": old["temperature"]})
    monkeypatch.setitem(artifact.MIGRATIONS, 2, lambda old: {**old, "beta": old["beta"] * 10})
    config = read(place).config
    assert config["beta"] == 30
    assert config["format"] == 3


@pytest.mark.parametrize("folder", [False, True])
def test_fuzz_every_mutation_is_refused_or_harmless(tmp_path: Path, folder: bool) -> None:
    """Flipped, cut, swapped and repeated bytes: our own error, or a config and tensors that were written so."""
    place = write(tmp_path / "a", CONFIG, parts(), STATE, folder=folder)
    random = np.random.default_rng(0)
    files = [place / name for name in names(place)] if folder else [place]
    good = {file: file.read_bytes() for file in files}
    n_refused = 0
    for _ in range(300):
        file = files[random.integers(len(files))]
        data = bytearray(good[file])
        for _ in range(random.integers(1, 4)):
            at, kind = int(random.integers(len(data))), random.integers(4)
            if kind == 0:
                data[at] ^= 1 << int(random.integers(8))
            elif kind == 1:
                del data[at : at + int(random.integers(1, 40))]
            elif kind == 2:
                data[at:at] = data[: int(random.integers(1, 40))]
            else:
                data[at] = int(random.integers(256))
            data = data or bytearray(b"x")
        file.write_bytes(data)
        try:
            found = read(place)
            module = net()
            load_state(module, found.tensors("model"))
            assert all(torch.isfinite(value).all() for value in module.state_dict().values())
            assert found.config["library"] == "diffagents"
            if found.has("trainer_state"):
                found.trainer_state()
        except ArtifactError:
            n_refused += 1
        file.write_bytes(good[file])
    assert 100 < n_refused < 300


# ---- modules and optimisers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("pi.0.bias"), r"the artifact lacks pi\.0\.bias \(1 tensors\)"),
        (lambda t: [t.pop(key) for key in list(t)], r"lacks pi\.0\.bias, pi\.0\.weight, pi\.1\.bias, \.\.\. \(4 "),
        (lambda t: t.update({"pi.2.bias": torch.ones(1)}), r"has the unexpected pi\.2\.bias"),
        (lambda t: t.update({"pi.x\n\x1b": torch.ones(1)}), r"has the unexpected pi\.x\\n\\x1b"),
        (lambda t: t.update({"pi.0.bias": torch.ones(4)}), r"pi\.0\.bias is \(4,\) .* in the artifact but \(3,\)"),
        (lambda t: t.update({"pi.0.bias": torch.ones(1)}), r"pi\.0\.bias is \(1,\)"),  # would broadcast
        (lambda t: t.update({"pi.0.bias": torch.ones(3).double()}), r"torch\.float64 in the artifact but \(3,\) "),
    ],
)
def test_load_state_is_strict_and_changes_nothing_when_it_refuses(
    change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    tensors = {f"pi.{key}": value for key, value in net(0.75).state_dict().items()}
    change(tensors)
    module = net(0.5)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_state(module, tensors, "pi.")
    assert str(caught.value).isprintable()
    assert all((value == 0.5).all() for value in module.state_dict().values())


def test_load_state_takes_its_prefix_only_and_works_in_place() -> None:
    module = net(0.5)
    weight = module[0].weight
    address = weight.data_ptr()
    given = {f"pi.{key}": value for key, value in net(0.75).state_dict().items()}
    load_state(module, {**given, "q.w": torch.ones(1)}, "pi.")
    assert module[0].weight is weight
    assert weight.data_ptr() == address
    assert weight.requires_grad
    assert (weight == 0.75).all()


Make = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2),
    "fused": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(1e-2), fused=True),
    "adamw fused": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-2), fused=True),
    "two groups": lambda m: torch.optim.AdamW([{"params": m[0].parameters()}, {"params": m[1].parameters()}], lr=1e-2),
}


def train(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for i in range(first, last):
        inputs = torch.randn(8, 2, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        (module(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_an_optimiser_goes_on_to_the_bit(tmp_path: Path, make: Make) -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).state_dict()
    straight, stopped = net(), net()
    straight.load_state_dict(start)
    stopped.load_state_dict(start)
    train(straight, make(straight), 0, 30)
    optimizer = make(stopped)
    train(stopped, optimizer, 0, 15)
    tensors = {"model": stopped.state_dict(), "optimizer": optimizer_tensors(optimizer, "opt.pi")}
    assert len(tensors["optimizer"]) == 4 * 3
    found = read(write(tmp_path / "a", CONFIG, tensors))
    resumed = net()
    load_state(resumed, found.tensors("model"))
    again = make(resumed)
    lr = again.param_groups[0]["lr"]
    load_optimizer(again, found.tensors("optimizer"), "opt.pi")
    assert again.param_groups[0]["lr"] is lr
    train(resumed, again, 15, 30)
    for key, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_an_optimiser_that_has_not_stepped_restores_to_none() -> None:
    module = net()
    optimizer = OPTIMIZERS["adam"](module)
    assert optimizer_tensors(optimizer, "pi") == {}
    train(module, optimizer, 0, 2)
    load_optimizer(optimizer, {"other.0.step": torch.tensor(1.0)}, "pi")
    assert optimizer_tensors(optimizer, "pi") == {}
    train(module, optimizer, 2, 3)
    assert optimizer_tensors(optimizer, "pi")["pi.0.step"] == 1


def test_the_state_is_restored_in_place_and_copied() -> None:
    module = net()
    optimizer = OPTIMIZERS["adam"](module)
    train(module, optimizer, 0, 2)
    live = optimizer_tensors(optimizer, "pi")
    kept = {key: value.clone() for key, value in live.items()}
    train(module, optimizer, 2, 5)
    load_optimizer(optimizer, kept, "pi")
    assert all(value is live[key] for key, value in optimizer_tensors(optimizer, "pi").items())
    assert all(torch.equal(live[key], value) for key, value in kept.items())
    fresh = OPTIMIZERS["adam"](module)
    load_optimizer(fresh, kept, "pi")
    train(module, fresh, 5, 6)
    assert kept["pi.0.step"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pi.0.exp_avg": torch.zeros(2)}, r"pi\.0\.exp_avg is \(2,\) torch\.float32 in the artifact but \(3, 2\)"),
        ({"pi.0.exp_avg": torch.zeros(3, 2).double()}, r"torch\.float64"),
        ({"pi.0.step": torch.zeros(1)}, r"pi\.0\.step is \(1,\)"),
        ({"pi.0.step": torch.tensor(-1.0)}, r"pi\.0\.step contains negative numbers"),
        ({"pi.1.exp_avg_sq": -torch.ones(3)}, r"pi\.1\.exp_avg_sq contains negative numbers"),
        ({"pi.4.step": torch.tensor(1.0)}, r"has pi\.4\.step, but this optimiser has only 4 parameters"),
        ({"pi.0.momentum": torch.zeros(3, 2)}, r"has pi\.0\.momentum"),
        ({"pi.0.step": None}, r"only \['exp_avg', 'exp_avg_sq'\] of pi\.0"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(change: dict[str, Tensor | None], message: str) -> None:
    module = net()
    optimizer = OPTIMIZERS["adam"](module)
    train(module, optimizer, 0, 2)
    good = {key: value.clone() for key, value in optimizer_tensors(optimizer, "pi").items()}
    bad = {key: value + 1 for key, value in good.items()}
    bad = {key: value for key, value in {**bad, **change}.items() if value is not None}
    with pytest.raises(ArtifactError, match=message):
        load_optimizer(optimizer, bad, "pi")
    assert all(torch.equal(value, good[key]) for key, value in optimizer_tensors(optimizer, "pi").items())


# ---- JSON and spaces -------------------------------------------------------------------------------------------------


def test_to_json_safe() -> None:
    value = {
        "numpy": [np.float32(0.1), np.int64(3), np.bool_(True), np.array([[1, 2]]), np.str_("x")],
        "odd": (float("inf"), -np.inf, np.float32("nan")),
        "plain": {"a": None, "b": True, "c": 2**70, "d": "x"},
    }
    safe = to_json_safe(value)
    assert safe == {
        "numpy": [float(np.float32(0.1)), 3, True, [[1, 2]], "x"],
        "odd": ["inf", "-inf", "nan"],
        "plain": {"a": None, "b": True, "c": 2**70, "d": "x"},
    }
    assert json.loads(json.dumps(safe, allow_nan=False)) == safe
    assert [float(text) for text in safe["odd"][:2]] == [np.inf, -np.inf]
    for bad in (object(), torch.ones(1), np.array([object()]), b"x", 1j):
        with pytest.raises(TypeError, match=r"^knobs\['a'\]\[0\] is a .*, which JSON cannot represent"):
            to_json_safe({"a": [bad]}, "knobs")
