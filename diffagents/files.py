"""Replacing a file or a folder in one step, and clearing away what a killed process left behind.

What is to be written is written beside its place first, under a name that nobody else has and that says which process of which
machine is at work: `.diffagents-<name>-<machine>-<process>-<random>.tmp`. A later writer removes such leftovers of processes
that no longer exist. A write that fails is an OSError which says what was not written, where, and what to do.
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
import sys
from collections.abc import Iterator
from pathlib import Path

_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CURES = {
    errno.ENOSPC: "free some space there, or choose another place",
    errno.EDQUOT: "free some space there, or choose another place",
    errno.EFBIG: "free some space there, or choose another place",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EROFS: "choose a place that you may write to",
}


def temporary(target: Path) -> Path:
    """A name beside `target` for what will replace it; nothing exists there yet."""
    return target.parent / f"{_prefix(target)}{_MACHINE}-{os.getpid()}-{secrets.token_hex(6)}.tmp"


def _prefix(target: Path) -> str:
    return f".diffagents-{target.name[:80]}-"


@contextlib.contextmanager
def replacing(target: Path, what: str) -> Iterator[Path]:
    """Write a file or a folder beside its place, which it takes in one step when the block ends without an error.

    Args:
        target: The place. Missing folders are made; of a link that is replaced which it leads to.
        what: What is being written, for the error message.

    Yields:
        The path to write to; nothing is there yet.

    Raises:
        OSError: The write failed; `target` is as it was.
    """
    real = Path(os.path.realpath(target))
    part = temporary(real)
    try:
        with write_errors(what, target):
            real.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(real)
            yield part
            replace_folder(part, real) if part.is_dir() else os.replace(part, real)
    except BaseException:
        remove(part)
        raise


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
    """What processes of this machine that no longer exist left beside `target`, newest first.

    The suffix is ".tmp", or ".old" for a folder that had been moved away.
    """
    name = re.compile(re.escape(_prefix(target)) + rf"{_MACHINE}-(\d+)-[0-9a-f]{{12}}\.(tmp|old)")
    found = []
    with contextlib.suppress(OSError):  # a folder that cannot be listed, or that changes meanwhile
        for path in target.parent.iterdir():
            match = name.fullmatch(path.name)
            if match and not _is_alive(int(match[1])):
                found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def _is_alive(process: int) -> bool:
    """Whether a process of this machine exists; this one counts as one that does."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it belongs to somebody else
        return True
    return True


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
        os.rename(new, target)
        return
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
    """The folder that a process, killed while it replaced `target`, had moved away; None if there is none."""
    return next((path for path in leftovers(target) if path.suffix == ".old"), None)


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
