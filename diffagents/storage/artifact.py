"""Reads and writes a trained agent on disk: a folder of `config.json` and `*.safetensors` files, or the same files in a .zip.

    config.json            format, library and algorithm; the rest comes from checkpoint.py
    model.safetensors      everything that acting needs
    learner.safetensors    every other network; needed to continue learning
    optimizer.safetensors, trainer_state.json   needed to resume the run exactly (optional)

A folder may also contain COMPANIONS (`README.md`, `results.json`, pictures); they are never read here. Reading is safe for
files from strangers: nothing is unpickled, evaluated or unpacked to disk, and sizes are checked before memory is allocated.
Writing is atomic: a failure leaves an older artifact unchanged and no temporary files behind.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import stat
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from diffagents.errors import AGAIN, ArtifactError, printable, short
from diffagents.files import find_moved, mode_of, remove, replacing, set_mode, sync
from diffagents.training.state import HubCommit, bare

LIBRARY, FORMAT = "diffagents", 1
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Format n -> a function that converts a config of format n to format n + 1. `read` applies them, oldest first."""

SAMPLERS = ("AWR", "BDPO", "DiffCPS", "DiffusionBC", "DiffusionQL", "IDQL", "IQL", "QGPO", "SfBC")
"""Algorithms whose older files lack the hyperparameter `deterministic`: their `predict` samples unless it is told otherwise."""

CONFIG, TRAINER_STATE = "config.json", "trainer_state.json"
TENSOR_FILES = {name: f"{name}.safetensors" for name in ("model", "learner", "optimizer")}
MAX_BYTES = {CONFIG: 1 << 20, TRAINER_STATE: 1 << 26, **dict.fromkeys(TENSOR_FILES.values(), 1 << 32)}
"""File of an artifact -> the largest size that is read."""
COMPANIONS = ("README.md", "results.json", "curves.png", "replay.mp4")
MAX_COMPANION_BYTES, MAX_RESULTS_BYTES = 1 << 28, 1 << 23
MAX_HEADER_BYTES, MAX_TENSORS = 1 << 23, 100_000  # of a safetensors file
MAX_ZIP_MEMBERS, MAX_ZIP_RATIO = 1000, 100
_SMALL = 1 << 26  # reading so much takes no time and space that would have to be guarded
MAX_DEPTH, MAX_BITS = 100, 10_000  # of lists in lists and of whole numbers, in JSON: Python reads and prints no more

Stamp = tuple[tuple[int, int, int] | None, ...]
T = TypeVar("T")

_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint32, torch.uint16, torch.uint8}
_TENSOR_DTYPES = _FLOATS | _INTEGERS | {torch.bool}
_PASS_SAVED = "pass the folder or .zip file that save() wrote"
_CURES = {
    "model": AGAIN,
    "learner": "this copy can act but cannot continue learning; load the whole artifact",
    "optimizer": "it was saved without its trainer state, so the run cannot be resumed; start a new one",
}


class Replaced(ArtifactError):
    """Another process saved while the artifact was being read."""


def write(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    trainer_state: Mapping[str, Any] | None = None,
    *,
    folder: bool = False,
    companions: Mapping[str, bytes] | None = None,
) -> Path:
    """Write an artifact, all or nothing.

    Args:
        path: An existing folder, which becomes an artifact folder (its other files are kept); otherwise a zip file, whose
            suffix `.zip` is added if it is missing. Missing parent folders are created.
        config: The content of config.json, with the key `algorithm`; `format` and `library` are added.
        tensors: "model" (required), "learner" and "optimizer" -> named tensors on any device. They are copied, and the prefix
            `_orig_mod.` of `torch.compile` is removed from their names.
        trainer_state: The content of trainer_state.json; None writes none.
        folder: Write a folder even if `path` does not exist yet.
        companions: The content of every file of COMPANIONS that the folder is to have; the others are deleted. None leaves
            them all unchanged.

    Returns:
        The path of the folder or zip file.

    Raises:
        ValueError: A tensor contains NaN, or something could not be read back.
        TypeError: A value of `config` or `trainer_state` that `to_json_safe` refuses.
        FileExistsError: Something other than an artifact exists at `path`.
        OSError: The disk is full, permission is denied, ...; what was there before is unchanged.
    """
    files = _encode(config, tensors, trainer_state) | dict(companions or {})
    for file, data in files.items():
        if len(data) > max_bytes(file):
            raise ValueError(
                f"{file} would have {len(data)} bytes; files of more than {max_bytes(file)} bytes cannot be read back"
            )
    target = Path(path).expanduser()
    as_folder = folder or target.is_dir()
    if not as_folder and target.suffix != ".zip":
        target = target.with_name(target.name + ".zip")
    if target.exists() and target.is_dir() != as_folder:
        is_now, needed = ("file", "folder") if as_folder else ("folder", "file")
        raise FileExistsError(f"{target} is a {is_now}, so no {needed} can be written there: choose another name")
    real = Path(os.path.realpath(target))  # the target of a link is replaced, not the link itself
    if as_folder:
        _check_replaceable(real)
    with replacing(target, "the artifact") as part:
        if as_folder:
            replaced = MAX_BYTES if companions is None else (*MAX_BYTES, *COMPANIONS)
            _write_folder(files, part, real, replaced)
        else:
            _write_zip(files, part, mode_of(real))
    sync(real.parent)
    return target


def to_json_safe(value: Any, where: str = "config") -> Any:
    """Convert a value to the types of strict JSON: numpy to Python, tuples to lists, infinities and NaN to strings.

    What UTF-8 cannot encode in a string, half of a surrogate pair, becomes U+FFFD.

    Args:
        value: Numbers, strings, None, arrays, and lists or dicts of these.
        where: The name of `value`, for error messages.

    Raises:
        TypeError: Anything else; the message names its place.
    """
    return _json_safe(value, where, 0)


def _json_safe(value: Any, where: str, depth: int) -> Any:
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufU":
        value = value.tolist()
    if isinstance(value, str):
        return _encodable(value)
    if value is None or isinstance(value, bool) or (isinstance(value, int) and value.bit_length() <= MAX_BITS):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int):
        raise TypeError(f"{where} is a number of more than {MAX_BITS} bits, which cannot be read back: use a smaller one")
    if depth >= MAX_DEPTH:
        raise TypeError(
            f"{printable(where[:100])}... is nested more than {MAX_DEPTH} levels deep, which cannot be read back: use fewer"
        )
    if isinstance(value, list | tuple):
        return [_json_safe(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {_encodable(key): _json_safe(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    kind = "dict with keys that are not strings" if isinstance(value, Mapping) else type(value).__name__
    raise TypeError(f"{where} is a {kind}, which JSON cannot represent: use numbers, strings, lists or dicts with string keys")


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _encode(
    config: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], trainer_state: Mapping[str, Any] | None
) -> dict[str, bytes]:
    """The content of each file; checks that `read` would accept it."""
    if not isinstance(config.get("algorithm"), str):
        raise ValueError(f"config['algorithm'] must be the algorithm's name, not {config.get('algorithm')!r}")
    if "model" not in tensors or not set(tensors) <= set(TENSOR_FILES):
        raise ValueError(f"tensors must have 'model' and may have 'learner' and 'optimizer'; its keys are {sorted(tensors)}")
    head = {"format": FORMAT, "library": LIBRARY}
    files = {CONFIG: _dump({**head, **config, **head}, "config")}
    if trainer_state is not None:
        files[TRAINER_STATE] = _dump(trainer_state, "trainer_state")
    for name, named in tensors.items():
        copies = {bare(key): tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in named.items()}
        if len(copies) < len(named):
            raise ValueError(f"two {name} tensors have the same name once '_orig_mod.' is removed: {sorted(named)[:4]}")
        _check_tensors(copies, f"{name} tensors")
        data = safetensors.torch.save(copies, {"format": "pt"})
        if len(copies) > MAX_TENSORS or int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
            raise ValueError(f"{len(copies)} {name} tensors are too many, or their names too long, to be read back")
        files[TENSOR_FILES[name]] = data
    return files


def _dump(value: Mapping[str, Any], where: str) -> bytes:
    return json.dumps(to_json_safe(value, where), indent=1, allow_nan=False).encode()


def _check_replaceable(folder: Path) -> None:
    """Refuse to overwrite a folder that is neither empty nor an artifact."""
    if not folder.exists():
        return
    contains_current = False
    with contextlib.suppress(FileNotFoundError):  # there is no current directory any more
        contains_current = Path.cwd().is_relative_to(folder)
    if contains_current or not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is read-only or contains the current directory: choose another folder")
    try:
        ours = not any(folder.iterdir()) or read_json(folder, CONFIG).get("library") == LIBRARY
    except ArtifactError:
        ours = False
    if not ours:
        raise FileExistsError(f"{folder} contains other files but no artifact: add .zip to the name, or choose a new folder")


def _write_zip(files: Mapping[str, bytes], part: Path, mode: int | None) -> None:
    with _create(part, mode) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)  # with a fixed date: the same state gives the same bytes
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
    sync(part)


def _write_folder(files: Mapping[str, bytes], part: Path, real: Path, replaced: Collection[str]) -> None:
    """Write `files` to the folder `part`, with the other files of the folder `real` except those named in `replaced`."""
    if real.exists():
        _link_unchanged(real, part, replaced)
    else:
        part.mkdir()
    for name, data in files.items():
        mode = mode_of(real / name)
        with _create(part / name, mode) as file:
            file.write(data)
        sync(part / name)
        set_mode(part / name, mode)
    sync(part)


def _create(path: Path, mode: int | None) -> IO[bytes]:
    """Open a new file that nobody can read, also while it is written, who could not read the one that it replaces."""
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o666 if mode is None else mode))


def _link_unchanged(real: Path, part: Path, replaced: Collection[str]) -> None:
    """Make the folder `part` with hard links to the files of `real` except those named in `replaced`.

    What others write to these files meanwhile is thus not lost.
    """
    for attempt in range(10):
        before = real.stat().st_ino
        try:
            _link_all(real, part, replaced)
            if real.stat().st_ino == before:
                return
        except FileNotFoundError:  # another process replaced the folder, or removed a file from it, meanwhile
            if attempt == 9:
                raise
        remove(part)
    raise OSError(errno.EBUSY, "other processes replace the folder all the time", str(real))


def _link_all(source: Path, to: Path, without: Collection[str] = ()) -> None:
    to.mkdir(mode=0o700)
    with os.scandir(source) as entries:
        for entry in entries:
            place = to / entry.name
            if entry.name in without:
                continue
            if entry.is_dir(follow_symlinks=False):
                _link_all(Path(entry.path), place)
            elif entry.is_symlink():
                os.symlink(os.readlink(entry.path), place)
            else:
                _link(entry, place)
    with contextlib.suppress(OSError):
        shutil.copystat(source, to)


def _link(entry: os.DirEntry[str], place: Path) -> None:
    """Link a file, or copy it where that is impossible: on some file systems, and if it belongs to somebody else."""
    try:
        os.link(entry.path, place)
        return
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror
    if entry.is_file(follow_symlinks=False):
        try:
            shutil.copy2(entry.path, place)
            return
        except PermissionError as error:
            reason = error.strerror
    raise OSError(
        f"{printable(entry.path)} can be neither linked nor copied ({reason}), but a save keeps the other files of its folder: "
        "nothing was written; move it elsewhere, or choose another folder"
    )


@dataclass(frozen=True)
class Artifact:
    """An artifact whose config has been read and checked; its other files are read on request.

    Args:
        path: The folder or zip file.
        config: The content of config.json, converted to the current format.
        origin: The commit on the Hub that the folder was downloaded from; None for a local artifact.
        files: The files to use; any others in the folder are ignored.
        stamp: That of the save that `config` is of; None: not to be compared.
    """

    path: Path
    config: dict[str, Any]
    origin: HubCommit | None = None
    files: Collection[str] = tuple(MAX_BYTES)
    stamp: Stamp | None = None

    def __str__(self) -> str:
        return str(self.origin or self.path)

    def has(self, name: str) -> bool:
        """Whether the artifact has "model", "learner", "optimizer" or "trainer_state"."""
        file = TENSOR_FILES.get(name, f"{name}.json")
        return file in self.files and _find(self.path, file) is not None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read the CPU tensors of "model", "learner" or "optimizer" by name; no other file is read.

        Raises:
            ArtifactError: The file is missing, damaged or not a safetensors file, or a tensor has an unexpected dtype, NaN or
                infinity.
        """
        where = f"{self}: {TENSOR_FILES[name]}"
        with _naming(self.origin, self.path), self.of_one_save():
            data = _read_bytes(self.path, TENSOR_FILES[name], lambda file, size: _check_header(file, size, where))
        if data is None:
            raise ArtifactError(f"{where} is missing: {_CURES[name]}")
        try:
            tensors = safetensors.torch.load(data)
        except Exception as error:  # the parser's exceptions are of several types
            raise ArtifactError(f"{where} is truncated or damaged ({short(error)}): {AGAIN}") from None
        _check_tensors(tensors, where)
        return tensors

    def trainer_state(self) -> dict[str, Any] | None:
        """Read `trainer_state.json`; None if the artifact was saved without it. Raises ArtifactError."""
        with _naming(self.origin, self.path), self.of_one_save():
            return read_json(self.path, TRAINER_STATE) if self.has("trainer_state") else None

    @contextlib.contextmanager
    def of_one_save(self) -> Iterator[None]:
        """Read something within, and raise Replaced if the artifact is no longer the one that `config` was read from.

        Raises:
            Replaced: It is not; `retried` begins anew.
        """
        error: Exception | None = None
        try:
            yield
        except (ArtifactError, OSError) as raised:  # perhaps because it was being replaced
            error = raised
        if self.stamp is not None and _stamp(self.path) != self.stamp:
            raise Replaced(f"{self} was replaced by another save while it was being read: load it again") from None
        if error is not None:
            raise error


def read(path: str | os.PathLike[str], origin: HubCommit | None = None, files: Collection[str] = tuple(MAX_BYTES)) -> Artifact:
    """Open an artifact folder or zip file, check its config and convert an old format.

    Args:
        path: The folder or zip file, with or without `.zip`.
        origin: As in `Artifact`.
        files: As in `Artifact`.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ArtifactError: It is not an artifact, or it is damaged or from a newer version.
    """
    given = Path(path).expanduser()
    other = given.with_suffix("") if given.suffix == ".zip" else Path(f"{given}.zip")
    found = next((place for place in (given, other) if place.exists()), None) or find_moved(given)
    if found is None:
        raise FileNotFoundError(
            f"there is no artifact at {given} nor at {other}: check the path (diffagents.load and from_pretrained also load "
            "from the Hub and the zoo)"
        )
    stamp = _stamp(found) if origin is None else None  # a commit of the Hub does not change
    with _naming(origin, found):
        source = Artifact(found, {}, origin, files, stamp)
        with source.of_one_save():
            return replace(source, config=_read_config(found))


def retried(load: Callable[[], T]) -> T:
    """The result of `load`, which reads an artifact, begun anew if another process replaces that meanwhile."""
    for _ in range(50):
        with contextlib.suppress(Replaced):
            return load()
    return load()


def _stamp(path: Path) -> Stamp:
    """What tells one save at a path from the next; None where something is missing."""
    places = [path / CONFIG, path / TENSOR_FILES["model"]] if path.is_dir() else [path]
    facts: list[tuple[int, int, int] | None] = []
    for place in places:
        try:
            stat = place.stat()
        except OSError:
            facts.append(None)
        else:
            facts.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(facts)


@contextlib.contextmanager
def _naming(origin: HubCommit | None, path: Path) -> Iterator[None]:
    """Let error messages about a download name its commit instead of the folder in the Hub's cache."""
    try:
        yield
    except ArtifactError as error:
        if origin is None:
            raise
        raise ArtifactError(str(error).replace(str(path), str(origin))) from None


def _read_config(found: Path) -> dict[str, Any]:
    """The checked content of config.json, converted to the current format."""
    where = f"{found}: {CONFIG}"
    config = read_json(found, CONFIG)
    library, version = config.get("library"), config.get("format")
    if library != LIBRARY:
        whose = "Stable-Baselines3" if "policy_class" in config else "its own library"
        raise ArtifactError(f"{where} names the library {short(library)}, not {LIBRARY}: load it with {whose}")
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{where} has the format {short(version)}, not a whole number of at least 1: {AGAIN}")
    if version > FORMAT:
        raise ArtifactError(
            f"{where} has format {short(version)}, but this version reads at most format {FORMAT}; the artifact is from a "
            f"newer {LIBRARY}: upgrade {LIBRARY}"
        )
    if not isinstance(config.get("algorithm"), str):
        raise ArtifactError(f"{where} names no algorithm: {AGAIN}")
    if _find(found, TENSOR_FILES["model"]) is None:
        raise ArtifactError(f"{found} has no {TENSOR_FILES['model']}: {_CURES['model']}")
    for old in range(version, FORMAT):
        config = {**MIGRATIONS[old](config), "format": old + 1}
    if config["algorithm"] in SAMPLERS and isinstance(config.get("knobs"), dict):
        config["knobs"] = {**config["knobs"], "deterministic": config["knobs"].get("deterministic", False)}
    return config


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read a strict JSON object: without NaN, infinity, or numbers that overflow to infinity.

    Args:
        path: The folder or zip file.
        name: The file in it.

    Raises:
        ArtifactError: It is missing, too large or not such an object.
    """
    data = _read_bytes(path, name)
    if data is None:
        raise ArtifactError(f"{path} is not a {LIBRARY} artifact (no {name} in it): {_PASS_SAVED}")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
        if b"\\ud" in data.lower():  # half of a surrogate pair cannot be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        if isinstance(value, dict):
            return value
        problem = f"a {type(value).__name__}, not an object"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:
        problem = f"not JSON ({short(error)})"
    raise ArtifactError(f"{path}: {name} is {problem}: {AGAIN}")


def _finite(text: str) -> float:
    """A number of JSON. Raises ValueError for NaN and infinity."""
    if not math.isfinite(value := float(text)):
        raise ValueError("a number that is not finite")
    return value


def _read_bytes(path: Path, name: str, check: Callable[[IO[bytes], int], None] | None = None) -> bytes | None:
    """The content of one file of an artifact; None if it is missing.

    Args:
        path: The folder or zip file.
        name: The file in it.
        check: Is called with the open file and its size before the whole is read.
    """
    found = _find(path, name)
    if found is None:
        return None
    if isinstance(found, Path):
        with found.open("rb", buffering=0) as file:
            if check is not None:
                check(file, os.fstat(file.fileno()).st_size)
                file.seek(0)
            return file.read()
    try:
        with zipfile.ZipFile(path) as archive:
            if check is not None:
                with archive.open(found) as member:
                    check(member, found.file_size)
            return archive.read(found)
    except ArtifactError:
        raise
    except Exception as error:  # zipfile raises many types of exceptions for damaged bytes
        raise ArtifactError(f"{path} is a truncated or damaged zip ({short(error)}): {AGAIN}") from None


def _check_header(file: IO[bytes], size: int, where: str) -> None:
    """Raises ArtifactError if the beginning of a tensor file shows that reading the whole would be useless or too much."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        pickled = (start[:1] == b"\x80" and start[1:2] < b"\x10") or start[:2] == b"PK"
        pickle = "is a pickle under another name, which is never opened because it may run code"
        reason = pickle if pickled else f"claims a header of {length} bytes"
        raise ArtifactError(f"{where} is not a safetensors file; it {reason}: {AGAIN}")
    header = file.read(length)
    if header.count(b'"data_offsets"') > MAX_TENSORS:
        raise ArtifactError(f"{where} contains more than the {MAX_TENSORS} tensors allowed: {AGAIN}")
    if size <= _SMALL:
        return
    try:  # a sparse file may claim a size that takes no space on the disk
        entries = json.loads(header)
        end = 8 + length + max(entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__")
        if end == size:
            return
        problem = f"{size} bytes instead of the {short(end)} of its tensors"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        problem = short(error)
    raise ArtifactError(f"{where} is truncated or damaged ({problem}): {AGAIN}")


def _find(path: Path, name: str) -> Path | zipfile.ZipInfo | None:
    """The path or zip member of one file of an artifact, its size checked; None if it is missing."""
    if not path.is_dir():
        return _members(path).get(name)
    file = path / name
    if not file.exists():
        return None
    if not file.is_file():  # reading a pipe or device never ends; links are allowed, as the Hub's cache consists of them
        raise ArtifactError(f"{file} is not a regular file: {AGAIN}")
    _check_size(file.stat().st_size, name, path)
    return file


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip file by name. Refuses unsafe names and links even though nothing is unpacked here: others may."""
    if not path.is_file():
        raise ArtifactError(f"{path} is neither a folder nor a regular file: {_PASS_SAVED}")
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK":
        what = (
            "a pickle, which is never opened because it may run code" if start[:1] == b"\x80" else "neither a zip nor a folder"
        )
        raise ArtifactError(f"{path} is {what}: {_PASS_SAVED}")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except Exception as error:  # as in _read_bytes
        raise ArtifactError(f"{path} is a truncated or damaged zip ({short(error)}): {AGAIN}") from None
    names = [info.orig_filename for info in infos]
    if CONFIG not in names and any(name == "data" or name.endswith(".pth") for name in names):
        raise ArtifactError(f"{path} is a Stable-Baselines3 file: load it with Stable-Baselines3, e.g. SAC.load(...)")
    if CONFIG not in names and any(name.endswith("data.pkl") for name in names):
        raise ArtifactError(f"{path} is a torch.save file, which is never opened because it may run code: {_PASS_SAVED}")
    if len(names) > MAX_ZIP_MEMBERS or len(set(names)) < len(names):
        raise ArtifactError(f"{path} contains {len(names)} files, or the same name twice: do not use it")
    for name, info in zip(names, infos, strict=True):
        odd = name.startswith("/") or ".." in name.split("/") or any(sign in name for sign in "\\:\0")
        if odd or stat.S_ISLNK(info.external_attr >> 16):
            raise ArtifactError(f"{path} contains an unsafe file name or link, {short(name)}: do not use it")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # with others Python heeds no limit of size
            how = f"the compression method {info.compress_type}, of which only 0 and 8 (deflate) are read"
            raise ArtifactError(f"{path}: {short(name)} has {how}: {AGAIN}")
        if info.file_size > max(1 << 20, MAX_ZIP_RATIO * info.compress_size):
            raise ArtifactError(f"{path} contains a zip bomb, {short(name)} of {info.file_size} bytes: do not use it")
        _check_size(info.file_size, name, path)
    return dict(zip(names, infos, strict=True))


def max_bytes(name: str) -> int:
    """The largest size of a file that is read."""
    return MAX_BYTES.get(name, MAX_RESULTS_BYTES if name == "results.json" else 1 << 32)


def _check_size(size: int, name: str, path: Path) -> None:
    """Raises ArtifactError for a file that is too large to be read."""
    limit = max_bytes(name)
    if size > limit:
        raise ArtifactError(f"{path}: {short(name)} has {size} bytes, more than the {limit} allowed: {AGAIN}")


def _check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises ArtifactError for an unexpected dtype, NaN or infinity."""
    for key, tensor in tensors.items():
        if tensor.dtype not in _TENSOR_DTYPES:
            raise ArtifactError(f"{where}: {short(key)} has the dtype {tensor.dtype}, which no agent of this library uses")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{where}: {short(key)} contains NaN or infinity: load an earlier checkpoint")
