"""Replacing a file or a folder in one step, and clearing away what a killed process left behind.

What is to be written is written beside its place first, under a name that nobody else has and that says which process of which
machine is at work: `.diffagents-<name>-<machine>-<process>-<random>.tmp`. A later writer removes such leftovers of processes
that no longer exist.
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
from pathlib import Path

_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def temporary(target: Path) -> Path:
    """A name beside `target` for what will replace it; nothing exists there yet."""
    return target.parent / f"{_prefix(target)}{_MACHINE}-{os.getpid()}-{secrets.token_hex(6)}.tmp"


def _prefix(target: Path) -> str:
    return f".diffagents-{target.name[:80]}-"


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
