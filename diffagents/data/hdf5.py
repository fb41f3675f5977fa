"""Reading HDF5 files from strangers: only what lies in the file itself, and no more than it can hold.

An HDF5 file may name other files of this machine: a dataset may be stored externally or be put together from other files
(a virtual dataset), and a link may lead to another file. What is read from there would end up in an agent's normaliser, and
with it on the Hub. And a dataset may claim any size: what has not been written is filled with a constant when it is read.
"""

from typing import Any

import numpy as np

MOST_INFLATED = 1100
"""How many times its stored bytes an array may have: a little more than deflate can compress."""
UNCHECKED_BYTES = 1 << 26
"""Size of an array up to which this is not asked."""


class ForeignContent(ValueError):
    """A part of the file is not in the file, or claims a size that the file cannot hold; the message names it."""


def check_link(group: Any, name: bytes) -> None:
    """Check that a name in a group is an object of its own.

    Args:
        group: The low-level identifier of the group.
        name: A name in it.

    Raises:
        KeyError: There is no such name.
        ForeignContent: It is a soft or external link.
    """
    import h5py

    try:
        kind = group.links.get_info(name).type
    except RuntimeError as error:  # there is no such name, or the file is damaged
        raise KeyError(f"{name.decode(errors='replace')}: {error}") from None
    if kind != h5py.h5l.TYPE_HARD:
        raise ForeignContent(
            f"{name.decode(errors='replace')!r} is a link, which may lead to another file: copy the array itself"
        )


def check_stored(dataset: Any, name: str) -> None:
    """Check that an array is stored in its file.

    Args:
        dataset: The low-level identifier of the dataset.
        name: What to call it.

    Raises:
        ForeignContent: It is stored in other files, or claims more bytes than the file can hold.
    """
    import h5py

    how = dataset.get_create_plist()
    if how.get_external_count() or how.get_layout() == h5py.h5d.VIRTUAL:
        raise ForeignContent(f"{name!r} is stored in other files, which are never read: copy the array into the file")
    claimed = int(np.prod(dataset.shape or (1,), dtype=np.float64)) * dataset.dtype.itemsize
    if claimed > UNCHECKED_BYTES and claimed > MOST_INFLATED * dataset.get_storage_size():
        raise ForeignContent(f"{name!r} claims {claimed:,} bytes, of which {dataset.get_storage_size():,} are stored")


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


def read(group: Any, name: str) -> Any:
    """One entry of a group of h5py's high-level interface: an array, or a dict of those in a group.

    Raises:
        KeyError: There is no such name.
        ForeignContent: It is not stored in this file.
    """
    import h5py

    found = node(group, name)
    if isinstance(found, h5py.Group):
        return {key: read(found, key) for key in found}
    if not isinstance(found, h5py.Dataset):
        raise KeyError(f"{name!r} is neither an array nor a group of arrays")
    check_stored(found.id, name)
    return found[()]
