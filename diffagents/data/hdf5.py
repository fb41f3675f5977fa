"""Reading HDF5 files from strangers: only what lies in the file itself, and no more than it can hold.

An HDF5 file may name other files of this machine: a dataset may be stored externally or be put together from other files
(a virtual dataset), and a link may lead to another file. What is read from there would end up in an agent's normaliser, and
with it on the Hub. And a dataset may claim any size: what has not been written is filled with a constant when it is read.
Many datasets may claim a little each, and one that is in several groups is read in each, so there is one `Budget` for a file.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MOST_INFLATED = 1100
"""How many times its stored bytes an array may have: a little more than deflate can compress."""
UNCHECKED_BYTES = 1 << 26
"""Size of an array up to which this is not asked."""
FILE_MOST_INFLATED, FILE_UNCHECKED_BYTES = 200, 1 << 28
"""The same for all that is read of a file together, which is never compressed as well as an array of zeros."""
SMALLEST_NODE, MOST_DEEP = 64, 16
"""Bytes that an array or group has at least in a file; groups within groups that are followed."""


class ForeignContent(ValueError):
    """A part of the file is not in the file, or claims a size that the file cannot hold; the message names it."""


def most_bytes(size: int) -> int:
    """How many bytes may be read from a file of that size."""
    return max(FILE_UNCHECKED_BYTES, FILE_MOST_INFLATED * size)


class Budget:
    """What may still be read from one file: bytes, and arrays and groups, each counted as often as it is read."""

    def __init__(self, path: Path) -> None:
        self.size = os.path.getsize(path)
        self._bytes = most_bytes(self.size)
        self._nodes = 1000 + self.size // SMALLEST_NODE

    def visit(self, depth: int) -> None:
        """Count one array or group, within `depth` groups.

        Raises:
            ForeignContent: There are more, or deeper ones, than the file can have.
        """
        self._nodes -= 1
        if self._nodes < 0:
            raise ForeignContent(f"it claims more arrays and groups than {self.size:,} bytes can hold")
        if depth > MOST_DEEP:
            raise ForeignContent(f"it has groups more than {MOST_DEEP} deep")

    def claim(self, n_bytes: int, name: str) -> None:
        """Count the bytes of one array.

        Raises:
            ForeignContent: All arrays together claim more than the file can hold.
        """
        self._bytes -= n_bytes
        if self._bytes < 0:
            raise ForeignContent(
                f"up to {name!r}, its arrays claim {most_bytes(self.size) - self._bytes:,} bytes together, of "
                f"which {self.size:,} are stored"
            )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Budget]]:
    """Open a file for reading.

    Args:
        path: The file.

    Yields:
        The `h5py.File`, and what may be read from it.

    Raises:
        OSError: It is no regular file (a pipe would be waited for), or no HDF5 file.
    """
    import h5py

    if not path.is_file():
        raise OSError(f"{path} is missing, or no regular file")
    with h5py.File(path, "r") as file:
        yield file, Budget(path)


def check_link(group: Any, name: bytes) -> None:
    """Check that a name in a group is an object of its own.

    Args:
        group: The low-level identifier of the group.
        name: A name in it.

    Raises:
        KeyError: There is no such name.
        ForeignContent: It is a soft or external link, or leads through other groups, which may be links.
    """
    import h5py

    shown = name.decode(errors="replace")[:80]
    if b"/" in name or name in (b"", b"."):
        raise ForeignContent(f"{shown!r} is no name of an array or group")
    try:
        kind = group.links.get_info(name).type
    except RuntimeError as error:  # there is no such name, or the file is damaged
        raise KeyError(f"{shown}: {error}") from None
    if kind != h5py.h5l.TYPE_HARD:
        raise ForeignContent(f"{shown!r} is a link, which may lead to another file: copy the array itself")


def read_array(dataset: Any, name: str, budget: Budget) -> np.ndarray:
    """Read an array, after a check that it is stored in its file.

    Args:
        dataset: The low-level identifier of the dataset.
        name: What to call it.
        budget: Of its file.

    Returns:
        The array; an empty one of the same dtype if that is not one of numbers, or if there is no value. Strings and lists of
        any length are not read, because each may refer to the same large one.

    Raises:
        ForeignContent: It is stored in other files, or claims more bytes than the file can hold.
    """
    import h5py

    how = dataset.get_create_plist()
    if how.get_external_count() or how.get_layout() == h5py.h5d.VIRTUAL:
        raise ForeignContent(f"{name!r} is stored in other files, which are never read: copy the array into the file")
    shape, dtype = dataset.shape, dataset.dtype
    if shape is None or dtype.kind not in "biuf":
        return np.empty(0, object if dtype.subdtype else dtype)
    claimed = math.prod(shape) * dtype.itemsize
    chunk = math.prod(how.get_chunk()) * dtype.itemsize if how.get_layout() == h5py.h5d.CHUNKED else 0
    if (most := max(claimed, chunk)) > UNCHECKED_BYTES:
        stored = min(dataset.get_storage_size(), budget.size)  # the former is what the file says
        if most > MOST_INFLATED * stored:
            raise ForeignContent(f"{name!r} claims {most:,} bytes, of which {stored:,} are stored")
    budget.claim(claimed, name)
    array = np.empty(shape, dtype)
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
    return array


def node(group: Any, name: str) -> Any:
    """The dataset or group of that name in a group, all of h5py's high-level interface.

    Raises:
        KeyError: There is no such name.
        ForeignContent: The name is a link.
    """
    check_link(group.id, name.encode())
    return group[name]


def subgroup(group: Any, name: str) -> Any:
    """As `node`, but a group. Raises KeyError for anything else."""
    import h5py

    found = node(group, name)
    if not isinstance(found, h5py.Group):
        raise KeyError(f"{name!r} is not a group")
    return found


def read(group: Any, name: str, budget: Budget) -> Any:
    """One entry of a group of h5py's high-level interface: an array, or a dict of those in a group.

    Raises:
        KeyError: There is no such name.
        ForeignContent: It is not stored in this file, or claims more than the file can hold.
    """
    return read_node(group.id, name.encode(), budget)


def read_node(group: Any, name: bytes, budget: Budget, depth: int = 0) -> Any:
    """As `read`, by low-level calls, which are much quicker.

    Args:
        group: The low-level identifier of the group.
        name: A name in it.
        budget: Of its file.
        depth: How many groups it is in.
    """
    import h5py

    budget.visit(depth)
    check_link(group, name)
    found, shown = h5py.h5o.open(group, name), name.decode(errors="replace")[:80]
    if isinstance(found, h5py.h5g.GroupID):
        return {key.decode(errors="replace"): read_node(found, key, budget, depth + 1) for key in found}
    if not isinstance(found, h5py.h5d.DatasetID):
        raise KeyError(f"{shown!r} is neither an array nor a group of arrays")
    return read_array(found, shown, budget)


def arrays(file: Any, budget: Budget) -> dict[str, np.ndarray]:
    """All arrays of numbers in a file, by their path; links are not followed.

    Args:
        file: The `h5py.File`.
        budget: Of the file.

    Raises:
        ForeignContent: One is stored in other files, or they claim more than the file can hold.
    """
    import h5py

    found: dict[str, np.ndarray] = {}

    def walk(group: Any, prefix: str, depth: int) -> None:
        for key in group:
            budget.visit(depth)
            if group.links.get_info(key).type != h5py.h5l.TYPE_HARD:
                continue
            check_link(group, key)
            item, name = h5py.h5o.open(group, key), prefix + key.decode(errors="replace")
            if isinstance(item, h5py.h5g.GroupID):
                walk(item, f"{name}/", depth + 1)
            elif isinstance(item, h5py.h5d.DatasetID) and item.dtype.kind in "biuf" and item.shape is not None:
                found[name] = read_array(item, name[:80], budget)

    walk(file.id, "", 0)
    return found
