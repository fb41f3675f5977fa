"""Replacing a file or a folder in one step, and clearing away what a killed process left behind.

What is to be written is written beside its place first, under a name that nobody else has and that says which process of which
machine is at work: `.diffagents-<name>-<machine>-<process>-<its start>-<random>.tmp`. A later writer removes such leftovers of
processes that no longer exist. Of processes that it cannot ask about, those of other machines, containers and earlier starts of
the system, it removes what is a month old. A write that fails is an OSError which says what was not written, where, and what to
do.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def _machine() -> str:
    """What tells apart those whose process numbers mean different processes, in 8 characters.

    The host's name is not enough: containers and machines of a cluster often share one.
    """
    facts = [platform.node()]
    with contextlib.suppress(OSError):
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("".join(facts).encode()).hexdigest()[:8]


_MACHINE = _machine()
_MONTH = 30 * 24 * 3600.0
_MAX_NAME = 80  # bytes of a file's name that are repeated in the names of what will replace it
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space there, or choose another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may write to"),
}


def temporary(target: Path) -> Path:
    """A name beside `target` for what will replace it; nothing exists there yet."""
    process = os.getpid()
    return target.parent / f"{_prefix(target)}{_MACHINE}-{process}-{_started(process)}-{secrets.token_hex(6)}.tmp"


def hidden(target: Path, ending: str) -> Path:
    """The file beside `target` that this library keeps for it under a name of its own, which users do not choose."""
    return target.parent / f"{_prefix(target)[:-1]}.{ending}"


def _prefix(target: Path) -> str:
    """The beginning of the names of what belongs to `target`; long names are cut between characters, and told apart."""
    name, given = target.name, os.fsencode(target.name)
    if len(given) > _MAX_NAME:
        while len(os.fsencode(name)) > _MAX_NAME - 9:
            name = name[:-1]
        name += f"~{hashlib.sha256(given).hexdigest()[:8]}"
    return f".diffagents-{name}-"


def mode_of(path: Path) -> int | None:
    """The permissions of a regular file; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mode & 0o777 if stat.S_ISREG(found.st_mode) else None


@contextlib.contextmanager
def replacing(target: Path, what: str) -> Iterator[Path]:
    """Write a file or a folder beside its place, which it takes in one step when the block ends without an error.

    A file keeps the permissions of the one that it replaces.

    Args:
        target: The place. Missing folders are made; of a link that is replaced which it leads to.
        what: What is being written, for the error message.

    Yields:
        The path to write to; nothing is there yet.

    Raises:
        FileExistsError: `target` is a device, a pipe or a socket.
        OSError: The write failed; `target` is as it was.
    """
    real = Path(os.path.realpath(target))
    part = temporary(real)
    try:
        with write_errors(what, target):
            mode = mode_of(real)
            if mode is None and real.exists() and not real.is_dir():
                raise FileExistsError(
                    f"{target} is a device, pipe or socket, which {what} does not replace: choose another name"
                )
            real.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(real)
            yield part
            if part.is_dir():
                replace_folder(part, real)
            else:
                set_mode(part, mode)
                os.replace(part, real)
    except BaseException:
        remove(part)
        raise


def set_mode(path: Path, mode: int | None) -> None:
    """Give a file permissions, where the file system has them; None leaves them as they are."""
    if mode is not None and mode != mode_of(path):
        with contextlib.suppress(OSError):
            path.chmod(mode)


@contextlib.contextmanager
def scratch_folder(near: Path) -> Iterator[Path]:
    """A new folder beside `near`, removed at the end; if this process is killed, by the next one that wants such a folder."""
    folder = temporary(near)
    near.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(near)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        remove(folder)


@contextlib.contextmanager
def write_errors(what: str, target: Path) -> Iterator[None]:
    """Turn what a failed write raises, whichever library wrote, into an OSError with the cause, the place and the cure.

    HDF5 and safetensors report a full disk by exceptions of their own, with the number of the system's error in their text.

    Args:
        what: What is being written: the subject of "was not written".
        target: Where to.
    """
    try:
        yield
    except Exception as error:
        text = re.search(r"\b(?:os error|errno =) (\d+)", str(error))
        code = int(text[1]) if text else error.errno if isinstance(error, OSError) else None
        if code is None:  # no failed write: an error of the caller's input, or one that has been explained already
            raise
        cure = f"; {_CURES[code]}" if code in _CURES else ""
        reason = f"{os.strerror(code)}: {what} was not written; an older one is unchanged{cure}"
        raise OSError(code, reason, str(target)) from error


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "posix":  # Windows can neither sync a file that is open for reading nor open a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
                raise
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it can be."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def leftovers(target: Path) -> list[Path]:
    """What processes that no longer exist left beside `target`, newest first.

    The suffix is ".tmp", or ".old" for a folder that had been moved away.
    """
    now, found = time.time(), []
    for path, machine, process, start in _parts(target):
        with contextlib.suppress(OSError):  # it changes meanwhile
            facts = path.stat()
            changed = max(facts.st_mtime, facts.st_ctime)  # a folder that was moved away may be old itself
            if not _is_alive(process, start) if machine == _MACHINE else changed < now - _MONTH:
                found.append((facts.st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def _parts(target: Path) -> Iterator[tuple[Path, str, int, int]]:
    """What lies beside `target` to replace it or because it was moved away: path, machine, process and its start."""
    name = re.compile(re.escape(_prefix(target)) + r"([0-9a-f]{8})-(\d{1,20})(?:-(\d{1,20}))?-[0-9a-f]{12}\.(?:tmp|old)")
    with contextlib.suppress(OSError):  # a folder that cannot be listed, or that changes meanwhile
        for path in target.parent.iterdir():
            if match := name.fullmatch(path.name):
                yield path, match[1], int(match[2]), int(match[3] or 0)


def _is_alive(process: int, start: int) -> bool:
    """Whether the process of this machine that began at `start` exists; this one counts as one that does."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it belongs to somebody else
        pass
    now = _started(process)
    return now == start or 0 in (now, start)


def _started(process: int) -> int:
    """When a process began, in ticks since the start of the system; 0 where this cannot be known."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # /proc shows the processes of another container
            return 0
        with open(f"/proc/{process}/stat", "rb", buffering=0) as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def clear_leftovers(target: Path) -> None:
    """Remove what killed processes left beside `target`; if nothing is there, the folder that one moved away returns."""
    for path in leftovers(target):
        if path.suffix == ".old" and not os.path.lexists(target):
            with contextlib.suppress(OSError):
                os.rename(path, target)
        remove(path)


def replace_folder(new: Path, target: Path) -> None:
    """Put the folder `new` in the place of the folder `target`, if there is one, and remove that.

    On Linux the two are exchanged in one step, so that there is a whole folder at every moment. Elsewhere, and on file systems
    that cannot do this, the old one is moved away first; a kill in between leaves it under a name that `find_moved` knows.

    Raises:
        OSError: It failed; `target` is as it was.
    """
    if not target.exists():
        try:
            os.rename(new, target)
            return
        except OSError:
            if not target.is_dir():  # otherwise it came into being meanwhile
                raise
    if _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)
        return
    old = new.with_suffix(".old")
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def find_moved(target: Path) -> Path | None:
    """The folder that was moved away while `target` was being replaced, by whichever process; None if there is none.

    It is what to read while there is nothing at `target`: if that process is alive, `target` will soon be there.
    """
    found = []
    for path, *_ in _parts(target):
        with contextlib.suppress(OSError):
            if path.suffix == ".old":
                found.append((path.stat().st_mtime_ns, path))
    return max(found)[1] if found else None


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False if the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
