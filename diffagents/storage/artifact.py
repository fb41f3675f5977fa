"""A trained agent on disk: a folder of `config.json` and `*.safetensors`, or the same zipped.

    config.json            format, library, algorithm; the rest is the agent's: knobs, spaces, versions, provenance
    model.safetensors      all that acting needs
    learner.safetensors    every other network; needed to go on learning
    optimizer.safetensors, trainer_state.json   needed to go on as if never stopped (optional)

COMPANIONS (`README.md`, `results.json`, pictures) may lie beside them in a folder and are never read here. Reading is safe
with files from strangers: nothing is unpickled, evaluated or unpacked to disk, and sizes are checked before memory is
taken. Writing is atomic: a failure leaves an older artifact as it was and no temporary files.
"""

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import stat
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from diffagents.errors import AGAIN, ArtifactError, short
from diffagents.training.state import bare

LIBRARY, FORMAT = "diffagents", 1
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Format n -> what turns a config of format n into one of n + 1. Applied by `read`, oldest first."""

CONFIG, TRAINER_STATE = "config.json", "trainer_state.json"
TENSOR_FILES = {name: f"{name}.safetensors" for name in ("model", "learner", "optimizer")}
MAX_BYTES = {CONFIG: 1 << 20, TRAINER_STATE: 1 << 26, **dict.fromkeys(TENSOR_FILES.values(), 1 << 32)}
COMPANIONS = ("README.md", "results.json", "curves.png", "replay.mp4")
MAX_COMPANION_BYTES = 1 << 28
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file
MAX_ZIP_MEMBERS, MAX_ZIP_RATIO = 1000, 100

_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint32, torch.uint16, torch.uint8}
_TENSOR_DTYPES = _FLOATS | _INTEGERS | {torch.bool}
_GIVE = "give the folder or .zip that save() made"
_CURES = {
    "model": AGAIN,
    "learner": "this copy can act but not learn on; get the whole artifact",
    "optimizer": "it was saved without its trainer state, so the run cannot be resumed; start a new one",
}


def write(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    trainer_state: Mapping[str, Any] | None = None,
    *,
    folder: bool = False,
    companions: Mapping[str, bytes] | None = None,
) -> Path:
    """Write an artifact, all or nothing, and return where it is.

    An existing folder, or any path with `folder=True`, becomes an artifact folder (files that are not ours are kept);
    else the path is a zip, and gets `.zip` added where it does not end so. Missing parents are made.

    `config` must name its `algorithm`; `format` and `library` are added. `tensors` maps "model" (required), "learner"
    and "optimizer" to named tensors of any device and layout; they are copied, and `torch.compile`'s `_orig_mod.` is
    taken out of their names. `config` and `trainer_state` go through `to_json_safe`. `companions`: the files of COMPANIONS
    that a folder shall have; those that it has and shall not, go. None leaves them as they are.

    Raises ValueError (NaN in a tensor, what could not be read back), TypeError (a value that JSON cannot hold),
    FileExistsError (something that is no artifact of ours is in the way), OSError (disk full, PermissionError).
    """
    files = _encode(config, tensors, trainer_state)
    target = Path(path)
    as_folder = folder or target.is_dir()
    if not as_folder and target.suffix != ".zip":
        target = target.with_name(target.name + ".zip")
    if target.exists() and target.is_dir() != as_folder:
        raise FileExistsError(f"{target} is a {'file' if as_folder else 'folder'}: give another name")
    real = Path(os.path.realpath(target))  # what a link leads to is replaced, not the link
    temp = real.parent / f".{LIBRARY}-{secrets.token_hex(6)}.tmp"
    if as_folder:
        _check_replaceable(real)
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        if as_folder:
            _write_folder(
                files | dict(companions or {}), temp, real, MAX_BYTES if companions is None else (*MAX_BYTES, *COMPANIONS)
            )
        else:
            _write_zip(files, temp)
            os.replace(temp, real)
    except BaseException as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(temp) if temp.is_dir() else temp.unlink()
        if isinstance(error, OSError):
            reason = f"{error.strerror or error}: the artifact was not written, an older one is as it was"
            raise OSError(error.errno or errno.EIO, reason, str(target)) from error
        raise
    _sync(real.parent)
    return target


def to_json_safe(value: Any, where: str = "config") -> Any:
    """The same in strict JSON's types: numpy to Python, tuples to lists, infinities and NaN to "inf", "-inf", "nan".

    Raises TypeError for anything else, naming the place; `where` is the name of `value` itself.
    """
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufU":
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [to_json_safe(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: to_json_safe(item, f"{where}[{key!r}]") for key, item in value.items()}
    kind = "dict with keys that are not strings" if isinstance(value, Mapping) else type(value).__name__
    raise TypeError(f"{where} is a {kind}, which JSON cannot hold: give numbers, strings, lists or dicts by name")


def _encode(
    config: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], trainer_state: Mapping[str, Any] | None
) -> dict[str, bytes]:
    if not isinstance(config.get("algorithm"), str):
        raise ValueError(f"config['algorithm'] must be the algorithm's name, not {config.get('algorithm')!r}")
    if "model" not in tensors or not set(tensors) <= set(TENSOR_FILES):
        raise ValueError(f"tensors must have 'model' and may have 'learner' and 'optimizer', not {sorted(tensors)}")
    head = {"format": FORMAT, "library": LIBRARY}
    files = {CONFIG: _dump({**head, **config, **head}, "config")}
    if trainer_state is not None:
        files[TRAINER_STATE] = _dump(trainer_state, "trainer_state")
    for name, named in tensors.items():
        copies = {bare(key): tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in named.items()}
        if len(copies) < len(named):
            raise ValueError(f"two {name} tensors have one name once '_orig_mod.' is taken out: {sorted(named)[:4]}")
        _check_tensors(copies, f"{name} tensors")
        files[TENSOR_FILES[name]] = safetensors.torch.save(copies, {"format": "pt"})
    for file, data in files.items():
        if len(data) > MAX_BYTES[file]:
            raise ValueError(f"{file} would have {len(data)} bytes; more than {MAX_BYTES[file]} are not read back")
    return files


def _dump(value: Mapping[str, Any], where: str) -> bytes:
    return json.dumps(to_json_safe(value, where), indent=1, allow_nan=False).encode()


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if Path.cwd().is_relative_to(folder) or not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is read-only or holds the current directory: give another folder")
    try:
        ours = not any(folder.iterdir()) or read_json(folder, CONFIG).get("library") == LIBRARY
    except ArtifactError:
        ours = False
    if not ours:
        raise FileExistsError(f"{folder} holds other files and no artifact: add .zip to the name or give a new folder")


def _write_zip(files: Mapping[str, bytes], temp: Path) -> None:
    with zipfile.ZipFile(temp, "x", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)  # its date is fixed: the same state gives the same bytes
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
    _sync(temp)


def _write_folder(files: Mapping[str, bytes], temp: Path, real: Path, ours: Iterable[str]) -> None:
    if real.exists():  # take along what is not ours: a README, results, a video, .git
        shutil.copytree(real, temp, symlinks=True, ignore=lambda at, _: ours if Path(at) == real else ())
    else:
        temp.mkdir()
    for name, data in files.items():
        (temp / name).write_bytes(data)
        _sync(temp / name)
    _sync(temp)
    # A folder that is not empty cannot be replaced in one step: the old one steps aside, and back if the new one fails.
    aside = temp.with_suffix(".old")
    try:
        if real.exists():
            os.replace(real, aside)
        os.replace(temp, real)
    except BaseException:
        if aside.exists() and not real.exists():
            os.replace(aside, real)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "posix":  # elsewhere what is opened for reading cannot be synced, nor a folder opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
                raise
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Artifact:
    """An artifact whose config has been read and checked; its other files are read when asked for."""

    path: Path
    config: dict[str, Any]
    files: Collection[str] = tuple(MAX_BYTES)
    """Which files count as there, where a folder has more than is wanted."""

    def has(self, name: str) -> bool:
        """Whether "model", "learner", "optimizer" or "trainer_state" is there."""
        file = TENSOR_FILES.get(name, f"{name}.json")
        return file in self.files and _find(self.path, file) is not None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The named CPU tensors of "model", "learner" or "optimizer"; no other file is read.

        Raises ArtifactError: not there, damaged, not safetensors, a foreign dtype, NaN or infinity in a named tensor.
        """
        where = f"{self.path}: {TENSOR_FILES[name]}"
        data = _read_bytes(self.path, TENSOR_FILES[name])
        if data is None:
            raise ArtifactError(f"{where} is not there: {_CURES[name]}")
        header = int.from_bytes(data[:8], "little")
        if header > MAX_HEADER_BYTES:
            pickled = data[:1] == b"\x80" or data[:2] == b"PK"
            what = "a pickle under another name, never opened here" if pickled else f"a header of {header} bytes"
            raise ArtifactError(f"{where} is not a safetensors file but {what}: {AGAIN}")
        try:
            tensors = safetensors.torch.load(data)
        except Exception as error:  # whatever the parser trips over, it means the same here
            raise ArtifactError(f"{where} is truncated or damaged ({short(error)}): {AGAIN}") from None
        _check_tensors(tensors, where)
        return tensors

    def trainer_state(self) -> dict[str, Any] | None:
        """The content of `trainer_state.json`, or None where the artifact was saved without it."""
        return read_json(self.path, TRAINER_STATE) if self.has("trainer_state") else None


def read(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact folder or zip (with or without `.zip` in `path`), check its config and migrate an old format.

    Raises FileNotFoundError where there is nothing, ArtifactError where there is something else.
    """
    given = Path(path)
    other = given.with_suffix("") if given.suffix == ".zip" else Path(f"{given}.zip")
    found = next((place for place in (given, other) if place.exists()), None)
    if found is None:
        raise FileNotFoundError(f"no artifact at {given} nor at {other}: check the path")
    where = f"{found}: {CONFIG}"
    config = read_json(found, CONFIG)
    library, version = config.get("library"), config.get("format")
    if library != LIBRARY:
        whose = "Stable-Baselines3" if "policy_class" in config else "its own library"
        raise ArtifactError(f"{where} names the library {short(library)}, not {LIBRARY}: load it with {whose}")
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{where} has the format {short(version)}, not a whole number from 1: {AGAIN}")
    if version > FORMAT:
        raise ArtifactError(f"{where} has format {short(version)}, above {FORMAT}, from a newer {LIBRARY}: upgrade")
    if not isinstance(config.get("algorithm"), str):
        raise ArtifactError(f"{where} names no algorithm: {AGAIN}")
    if _find(found, TENSOR_FILES["model"]) is None:
        raise ArtifactError(f"{found} has no {TENSOR_FILES['model']}: {_CURES['model']}")
    for old in range(version, FORMAT):
        config = {**MIGRATIONS[old](config), "format": old + 1}
    return Artifact(found, config)


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A strict JSON object: no NaN, no infinity, no number that overflows into one."""
    data = _read_bytes(path, name)
    if data is None:
        raise ArtifactError(f"{path} is not a {LIBRARY} artifact (no {name} in it): {_GIVE}")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
        if b"\\ud" in data.lower():  # half of a pair alone is a text that cannot be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        if isinstance(value, dict):
            return value
        problem = f"a {type(value).__name__}, not an object"
    except RecursionError:
        problem = "nested too deep"
    except ValueError as error:
        problem = f"not JSON ({short(error)})"
    raise ArtifactError(f"{path}: {name} is {problem}: {AGAIN}")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("a number that is not finite")
    return value


def _read_bytes(path: Path, name: str) -> bytes | None:
    found = _find(path, name)
    if not isinstance(found, zipfile.ZipInfo):
        return None if found is None else found.read_bytes()
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(found)
    except Exception as error:  # zipfile lets errors of many types through when the bytes are damaged
        raise ArtifactError(f"{path} is a truncated or damaged zip ({short(error)}): {AGAIN}") from None


def _find(path: Path, name: str) -> Path | zipfile.ZipInfo | None:
    """Where one file of an artifact is, its size checked; None if absent. Refuses what is no folder or honest zip."""
    if not path.is_dir():
        return _members(path).get(name)
    file = path / name
    if not file.exists():
        return None
    if not file.is_file():  # a pipe or device never ends; links are followed, the Hub's cache is made of them
        raise ArtifactError(f"{file} is not a regular file: {AGAIN}")
    _check_size(file.stat().st_size, name, path)
    return file


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Name -> member of a zip, after refusing what no honest artifact holds: someone else may unpack it."""
    if not path.is_file():
        raise ArtifactError(f"{path} is neither a folder nor a regular file: {_GIVE}")
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK":
        what = "a pickle, never opened as it may run code" if start[:1] == b"\x80" else "neither a zip nor a folder"
        raise ArtifactError(f"{path} is {what}: {_GIVE}")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except Exception as error:  # as in _read_bytes
        raise ArtifactError(f"{path} is a truncated or damaged zip ({short(error)}): {AGAIN}") from None
    names = [info.orig_filename for info in infos]
    if CONFIG not in names and any(name == "data" or name.endswith(".pth") for name in names):
        raise ArtifactError(f"{path} is a Stable-Baselines3 file: load it with Stable-Baselines3, e.g. SAC.load(...)")
    if CONFIG not in names and any(name.endswith("data.pkl") for name in names):
        raise ArtifactError(f"{path} is a torch.save file, never opened here as it may run code: {_GIVE}")
    if len(names) > MAX_ZIP_MEMBERS or len(set(names)) < len(names):
        raise ArtifactError(f"{path} holds {len(names)} files or one name twice: do not use it")
    for name, info in zip(names, infos, strict=True):
        odd = name.startswith("/") or ".." in name.split("/") or any(sign in name for sign in "\\:\0")
        if odd or stat.S_ISLNK(info.external_attr >> 16):
            raise ArtifactError(f"{path} holds an unsafe file name or link, {short(name)}: do not use it")
        if info.file_size > max(1 << 20, MAX_ZIP_RATIO * info.compress_size):
            raise ArtifactError(f"{path} holds a zip bomb, {short(name)} of {info.file_size} bytes: do not use it")
        _check_size(info.file_size, name, path)
    return dict(zip(names, infos, strict=True))


def _check_size(size: int, name: str, path: Path) -> None:
    limit = MAX_BYTES.get(name, 1 << 32)
    if size > limit:
        raise ArtifactError(f"{path}: {short(name)} has {size} bytes, more than the {limit} allowed: {AGAIN}")


def _check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype not in _TENSOR_DTYPES:
            raise ArtifactError(f"{where}: {short(key)} has the dtype {tensor.dtype}, which no agent of ours uses")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{where}: {short(key)} holds NaN or infinity: go back to an earlier checkpoint")
