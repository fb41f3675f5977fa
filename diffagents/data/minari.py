"""Episodes of a Minari set in HDF5, read by h5py's low-level calls.

Minari's own iterator spends most of its time on the objects that h5py's high-level calls make, some two milliseconds an
episode; this reads the same arrays in less than half (zoo/benchmarks/data_loading.py prints both). Infos are not read.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_COLUMNS = (b"observations", b"actions", b"rewards", b"terminations", b"truncations")


def read_episodes(folder: Path, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The episodes `indices` of the set in `folder` (its `data` folder): column name -> array, or dict of arrays.

    Raises OSError or KeyError where the file or an episode is damaged.
    """
    import h5py

    def read(group: Any, name: bytes) -> Any:
        found = h5py.h5o.open(group, name)
        if isinstance(found, h5py.h5g.GroupID):  # a Dict observation
            return {key.decode(): read(found, key) for key in found}
        array = np.empty(found.shape, found.dtype)
        found.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
        return array

    with h5py.File(folder / "main_data.hdf5", "r") as file:
        for index in indices:
            group = h5py.h5g.open(file.id, f"episode_{index}".encode())
            yield {name.decode(): read(group, name) for name in _COLUMNS}
