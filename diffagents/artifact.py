"""A trained agent on disk: a folder of `config.json` and `*.safetensors`, or the same zipped.

    config.json            format, library, algorithm; the rest is the agent's: knobs, spaces, versions, provenance
    model.safetensors      all that acting needs
    learner.safetensors    every other network; needed to go on learning
    optimizer.safetensors, trainer_state.json   needed to go on as if never stopped (optional)

Other files (`README.md`, `results.json`, `replay.mp4`) may lie beside them and are never read here. Reading is safe with
files from strangers: nothing is unpickled, evaluated or unpacked to disk, and sizes are checked before memory is taken.
Writing is atomic: a failure leaves an older artifact as it was and no temporary files.
"""

import json
import math
import os
import secrets
import shutil
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors.torch
import torch
from gymnasium import spaces
from torch import Tensor, nn

LIBRARY = "diffagents"
FORMAT = 1
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Format n -> what turns a config of format n into one of n + 1. Applied by `read`, oldest first."""

CONFIG = "config.json"
TRAINER_STATE = "trainer_state.json"
TENSOR_FILES = {name: f"{name}.safetensors" for name in ("model", "learner", "optimizer")}

MAX_CONFIG_BYTES = 1 << 20
MAX_TRAINER_STATE_BYTES = 1 << 24
MAX_TENSOR_BYTES = 1 << 32
MAX_HEADER_BYTES = 100_000_000
MAX_ZIP_MEMBERS = 1000
MAX_ZIP_RATIO = 100
MAX_SPACE_SIZE = 1_000_000

_LIMITS = {CONFIG: MAX_CONFIG_BYTES, TRAINER_STATE: MAX_TRAINER_STATE_BYTES}
_LIMITS |= dict.fromkeys(TENSOR_FILES.values(), MAX_TENSOR_BYTES)
_TENSOR_DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool}
_BOX_DTYPES = ("float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
_CURES = {
    "model": "the policy is missing; save or download the agent again",
    "learner": "this copy can act but not learn on; save or download the whole artifact",
    "optimizer": "it was saved without its trainer state, so its run cannot be resumed; start a new one with learn()",
}


class ArtifactError(ValueError):
    """A file or folder that cannot be trusted or understood as an artifact; the message says why and what to do."""


# ---------------------------------------------------------------------------------------------------------- writing


def write(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    trainer_state: Mapping[str, Any] | None = None,
    *,
    folder: bool = False,
) -> Path:
    """Write an artifact, all or nothing, and return where it is.

    An existing folder, or any path with `folder=True`, becomes an artifact folder (files that are not ours are kept);
    else the path is a zip, and gets `.zip` added where it does not end so. Missing parents are made.

    `config` must name its `algorithm`; `format` and `library` are added. `tensors` maps "model" (required), "learner" and
    "optimizer" to named tensors of any device and layout; they are copied, and `torch.compile`'s `_orig_mod.` is taken out
    of their names. Numpy values and infinities in `config` and `trainer_state` are stored as `to_json_safe` says.

    Raises ValueError (NaN in a tensor, names or sizes that could not be read back), TypeError (a value JSON cannot hold),
    FileExistsError (the place is taken by something that is no artifact of ours), OSError (disk full, no permission).
    """
    files = _encode(config, tensors, trainer_state)
    target, as_folder = _target(path, folder)
    # Follow links: the artifact behind a link is replaced, not the link.
    real = Path(os.path.realpath(target))
    if as_folder:
        _check_replaceable(real)
    temp = real.parent / f".{LIBRARY}-{secrets.token_hex(6)}.tmp"
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        if as_folder:
            _write_folder(files, temp, real)
        else:
            _write_zip(files, temp)
            os.replace(temp, real)
        _sync_directory(real.parent)
    except BaseException as error:
        _remove(temp)
        if isinstance(error, OSError) and error.errno is not None:
            reason = f"{error.strerror}: the artifact was not written, an older one there is as it was"
            raise OSError(error.errno, reason, str(target)) from error
        raise
    return target


def to_json_safe(value: Any, where: str = "config") -> Any:
    """The same value in strict JSON's types: numpy to Python, tuples to lists, infinities and NaN to "inf", "-inf", "nan".

    Raises TypeError naming the place (`where` is its start) for anything else.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufU":
        return to_json_safe(value.tolist(), where)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: JSON keys must be strings")
        return {key: to_json_safe(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_safe(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold: give numbers, strings, lists or dicts")


def _encode(
    config: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], trainer_state: Mapping[str, Any] | None
) -> dict[str, bytes]:
    if not isinstance(config.get("algorithm"), str):
        raise ValueError(f"config['algorithm'] must be the algorithm's name, not {config.get('algorithm')!r}")
    if "model" not in tensors or not set(tensors) <= set(TENSOR_FILES):
        raise ValueError(f"tensors must have 'model' and may have 'learner' and 'optimizer', not {sorted(tensors)}")
    head = {"format": FORMAT, "library": LIBRARY}
    body = {key: value for key, value in config.items() if key not in head}
    files = {CONFIG: _dump_json({**head, **body}, "config")}
    if trainer_state is not None:
        files[TRAINER_STATE] = _dump_json(trainer_state, "trainer_state")
    for name, named in tensors.items():
        clean: dict[str, Tensor] = {}
        for key, tensor in named.items():
            bare = key.replace("_orig_mod.", "")
            if bare in clean:
                raise ValueError(f"two {name} tensors are called {bare!r} once '_orig_mod.' is taken out")
            clean[bare] = tensor.detach().to("cpu", copy=True).contiguous()
        _check_tensors(clean, f"{name} tensors")
        files[TENSOR_FILES[name]] = safetensors.torch.save(clean, {"format": "pt"})
    for file, data in files.items():
        if len(data) > _LIMITS[file]:
            raise ValueError(f"{file} would have {len(data)} bytes, more than the {_LIMITS[file]} that can be read back")
    return files


def _dump_json(value: Mapping[str, Any], where: str) -> bytes:
    return json.dumps(to_json_safe(value, where), indent=1, allow_nan=False).encode()


def _target(path: str | os.PathLike[str], folder: bool) -> tuple[Path, bool]:
    target = Path(path)
    if target.is_dir():
        return target, True
    if folder:
        if target.exists():
            raise FileExistsError(f"{target} is a file: give a folder, or leave folder=True out to write a zip")
        return target, True
    if target.suffix != ".zip":
        target = target.with_name(target.name + ".zip")
    if target.is_dir():
        raise FileExistsError(f"{target} is a folder: give another name for the zip")
    return target, False


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if Path.cwd().is_relative_to(folder):
        raise FileExistsError(f"{folder} holds the current directory and cannot be replaced: give a folder inside it")
    if not any(folder.iterdir()):
        return
    try:
        ours = _parse_json(_file_bytes(folder, CONFIG), folder / CONFIG).get("library") == LIBRARY
    except ArtifactError:
        ours = False
    if not ours:
        raise FileExistsError(f"{folder} holds other files and no artifact: add .zip to the name, or give an empty folder")


def _write_zip(files: Mapping[str, bytes], temp: Path) -> None:
    with open(temp, "xb") as out:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for name, data in files.items():
                # ZipInfo's own fixed date: the same state gives the same bytes.
                info = zipfile.ZipInfo(name)
                info.external_attr = 0o644 << 16
                archive.writestr(info, data)
        out.flush()
        os.fsync(out.fileno())


def _write_folder(files: Mapping[str, bytes], temp: Path, real: Path) -> None:
    temp.mkdir()
    for name, data in files.items():
        with open(temp / name, "xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
    _sync_directory(temp)
    if not real.exists():
        os.replace(temp, real)
        return
    for entry in os.scandir(real):
        if entry.name in _LIMITS:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, temp / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry.path, temp / entry.name)
    aside = temp.with_suffix(".old")
    try:
        os.replace(real, aside)
        os.replace(temp, real)
    except BaseException:
        if aside.exists() and not real.exists():
            os.replace(aside, real)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _link(source: Any, to: Any) -> None:
    # A second name for the same file costs no space, and the first one goes with the old folder.
    try:
        os.link(source, to, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, to, follow_symlinks=False)


def _remove(temp: Path) -> None:
    if temp.is_dir():
        shutil.rmtree(temp, ignore_errors=True)
    else:
        temp.unlink(missing_ok=True)


def _sync_directory(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Artifact:
    """An artifact whose config has been read and checked; its other files are read when asked for."""

    path: Path
    config: dict[str, Any]

    def has(self, name: str) -> bool:
        """Whether the file "model", "learner", "optimizer" or "trainer_state" is there."""
        file = TRAINER_STATE if name == "trainer_state" else TENSOR_FILES[name]
        return _file_bytes_or_none(self.path, file, peek=True) is not None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The named CPU tensors of one file ("model", "learner" or "optimizer"); no other file is read.

        Raises ArtifactError: not there, damaged, not safetensors, a foreign dtype, NaN or infinity in a named tensor.
        """
        file = TENSOR_FILES[name]
        where = f"{self.path}: {file}"
        data = _file_bytes_or_none(self.path, file)
        if data is None:
            raise ArtifactError(f"{self.path} has no {file}: {_CURES[name]}")
        header = int.from_bytes(data[:8], "little")
        if data[:1] == b"\x80" or data[:2] == b"PK":
            raise ArtifactError(f"{where} is a pickle or torch.save file under a wrong name; it was not opened")
        if header > MAX_HEADER_BYTES:
            raise ArtifactError(f"{where} is not a safetensors file (its header would have {header} bytes)")
        try:
            tensors = safetensors.torch.load(data)
        except Exception as error:  # the parser has several error types of its own, and all mean the same here
            raise ArtifactError(f"{where} is truncated or damaged ({_short(error)}); copy or download it again") from None
        _check_tensors(tensors, where)
        return tensors

    def trainer_state(self) -> dict[str, Any] | None:
        """The content of `trainer_state.json`, or None where the artifact was saved without it."""
        data = _file_bytes_or_none(self.path, TRAINER_STATE)
        return None if data is None else _parse_json(data, f"{self.path}: {TRAINER_STATE}")


def read(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact folder or zip (with or without `.zip` in `path`) and check its config; formats of old are migrated.

    Raises FileNotFoundError where there is nothing, ArtifactError where there is something else.
    """
    given = Path(path)
    beside = given.with_suffix("") if given.suffix == ".zip" else given.with_name(given.name + ".zip") if given.name else given
    found = next((p for p in (given, beside) if p.exists()), None)
    if found is None:
        raise FileNotFoundError(f"no artifact at {given} nor at {beside}: check the path")
    if not found.is_dir():
        _check_is_zip(found)
    config = _parse_json(_file_bytes(found, CONFIG), f"{found}: {CONFIG}")
    config = _check_config(config, f"{found}: {CONFIG}")
    if _file_bytes_or_none(found, TENSOR_FILES["model"], peek=True) is None:
        raise ArtifactError(f"{found} has no {TENSOR_FILES['model']}: {_CURES['model']}")
    return Artifact(found, config)


def _check_is_zip(path: Path) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is neither a folder nor a regular file: give what save() made")
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80":
        raise ArtifactError(f"{path} is a pickle, which is never opened (it could run code): give what save() made")
    if start[:2] != b"PK":
        what = "an empty file" if not start else "neither an artifact folder nor a zip"
        raise ArtifactError(f"{path} is {what}: give the folder or .zip that save() made")


def _check_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    if config.get("library") != LIBRARY:
        if "policy_class" in config:
            raise ArtifactError(f"{where} belongs to a Stable-Baselines3 agent: load it with Stable-Baselines3")
        raise ArtifactError(f"{where} is not from {LIBRARY} (library: {_short(config.get('library'))}): load it with its own library")
    version = config.get("format")
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{where} has format {_short(version)}, not a whole number from 1: it is damaged, download it again")
    if version > FORMAT:
        raise ArtifactError(f"{where} has format {_short(version)}, made by a newer {LIBRARY}: upgrade (this one reads up to {FORMAT})")
    if not isinstance(config.get("algorithm"), str):
        raise ArtifactError(f"{where} names no algorithm: it is damaged, save or download the agent again")
    for old in range(version, FORMAT):
        config = {**MIGRATIONS[old](config), "format": old + 1}
    return config


def _file_bytes(path: Path, name: str) -> bytes:
    data = _file_bytes_or_none(path, name)
    if data is None:
        raise ArtifactError(f"{path} is not a {LIBRARY} artifact (no {name} in it): give the folder or .zip that save() made")
    return data


def _file_bytes_or_none(path: Path, name: str, peek: bool = False) -> bytes | None:
    """The bytes of one file of a folder or zip, checked against its limit; None where it is absent; `peek` reads nothing."""
    if not path.is_dir():
        return _member_bytes(path, name, peek)
    file = path / name
    if not file.exists():
        return None
    # Links are followed, for the Hub's cache is made of them; what they lead to must be a plain file (a pipe would hang).
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{file} is not a regular file: copy or download the artifact again")
    _check_size(status.st_size, name, path)
    return b"" if peek else file.read_bytes()


def _member_bytes(path: Path, name: str, peek: bool) -> bytes | None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = _check_members(archive.infolist(), path)
            if name not in members:
                return None
            info = members[name]
            _check_size(info.file_size, name, path)
            data = b"" if peek else archive.read(info)
    except (ArtifactError, MemoryError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # zipfile lets errors of many types through when the bytes are damaged
        raise ArtifactError(f"{path} is a truncated or damaged zip ({_short(error)}); copy or download it again") from None
    if not peek and len(data) != info.file_size:
        raise ArtifactError(f"{path} is a truncated zip: {name} ends early; copy or download it again")
    return data


def _check_members(infos: list[zipfile.ZipInfo], path: Path) -> dict[str, zipfile.ZipInfo]:
    """Refuse what no honest artifact holds, also in members that are never read: others may unpack the file."""
    if len(infos) > MAX_ZIP_MEMBERS:
        raise ArtifactError(f"{path} holds {len(infos)} files, an artifact holds a few: do not use it")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.orig_filename
        parts = name.split("/")
        if name in members:
            raise ArtifactError(f"{path} holds {_short(name)} twice: do not use it")
        if parts[0] == "" or ".." in parts or any(bad in name for bad in "\\:\0"):
            raise ArtifactError(f"{path} holds the unsafe file name {_short(name)}: do not use it")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ArtifactError(f"{path} holds {_short(name)} as a symbolic link: do not use it")
        if info.flag_bits & 1:
            raise ArtifactError(f"{path} holds {_short(name)} encrypted: unpack it and give the folder")
        _check_size(info.file_size, name, path)
        if info.file_size > MAX_CONFIG_BYTES and info.file_size > MAX_ZIP_RATIO * info.compress_size:
            raise ArtifactError(f"{path} holds {_short(name)}, which would unpack to {info.file_size} bytes (a zip bomb): do not use it")
        members[name] = info
    if CONFIG not in members:
        _explain_other_zip(list(members), path)
    return members


def _explain_other_zip(names: list[str], path: Path) -> None:
    if "data" in names and any(name.endswith(".pth") for name in names):
        raise ArtifactError(f"{path} is a Stable-Baselines3 file: load it with Stable-Baselines3, e.g. SAC.load(...)")
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        raise ArtifactError(f"{path} is a torch.save file (a pickle), which is never opened: give what save() made")
    inner = next((name for name in names if name.endswith("/" + CONFIG)), None)
    if inner is not None:
        raise ArtifactError(f"{path} holds {_short(inner)}, not {CONFIG}: unpack it and give that folder")


def _check_size(size: int, name: str, path: Path) -> None:
    limit = _LIMITS.get(name, MAX_TENSOR_BYTES)
    if size > limit:
        raise ArtifactError(f"{path}: {_short(name)} has {size} bytes, more than the {limit} allowed: it is damaged or hostile")


def _parse_json(data: bytes, where: str | Path) -> dict[str, Any]:
    """A strict JSON object: no NaN, no infinity, no number that overflows into one."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ArtifactError(f"{where} is nested too deep: it is damaged or hostile") from None
    except ValueError as error:
        raise ArtifactError(f"{where} is not JSON ({_short(error)}): save or download the agent again") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} holds a {type(value).__name__}, not an object: save or download the agent again")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not strict JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is out of range")
    return value


def _check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype not in _TENSOR_DTYPES:
            raise ArtifactError(f"{where}: {_short(key)} has the dtype {tensor.dtype}, which no agent uses")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{where}: {_short(key)} holds NaN or infinity; go back to an earlier checkpoint")


def _short(value: object) -> str:
    """A value of unknown origin as at most 80 printable characters on one line."""
    text = str(value).splitlines()[:1] if isinstance(value, Exception) else [repr(value) if not _is_huge(value) else "a huge number"]
    line = text[0] if text else type(value).__name__
    return ascii(line)[1:-1][:80] if not line.isascii() else line[:80]


def _is_huge(value: object) -> bool:
    # Printing an integer of thousands of digits is an error of its own.
    return isinstance(value, int) and abs(value) > 10**30
