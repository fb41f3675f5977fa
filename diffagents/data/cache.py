"""The cache of datasets: what was read once is kept as safetensors, so that reading it again is quick."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffagents.data import validation as check
from diffagents.data.transitions import Transitions
from diffagents.errors import one_line
from diffagents.files import replacing

RULES = 4
"""Raised when reading the same source gives another dataset than before."""


def stamp_of(files: Iterable[Path]) -> str:
    """A hash that changes with the name, size or modification time of any of the files, in any order."""
    facts = sorted((file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def cached(name: str, key: Mapping[str, Any], stamp: Mapping[str, Any], read: Callable[[], Transitions]) -> Transitions:
    """Return a dataset from the cache, or read it and store it there.

    There is one file per key, which is replaced if the stamp differs, so that the folder does not grow with every change of a
    dataset. If the file cannot be written, a warning says so.

    Args:
        name: Of the dataset; begins the file's name.
        key: JSON values that identify the source and how it is read.
        stamp: JSON values that change if the content of the source changes.
        read: Reads the dataset.

    Returns:
        The dataset.
    """
    stamp = {**stamp, "rules": RULES}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    slug = re.sub(r"[^-\w]+", "-", name)
    try:
        folder = Path(os.environ.get("DIFFAGENTS_CACHE") or Path.home() / ".cache" / "diffagents")
        path = folder / f"{slug}-{digest}.safetensors"
    except RuntimeError:  # there is no home folder
        return read()
    with contextlib.suppress(Exception):  # absent, stale, truncated, foreign: in any case it is made again
        return Transitions.load(path, extra=stamp)
    data = read()
    try:
        with replacing(path, "the cached dataset") as part:
            data.save(part, extra=stamp)
    except (OSError, ValueError, SafetensorError) as error:
        remedy = "set DIFFAGENTS_CACHE to a folder that can be written, or pass cache=False"
        check.warn(f"{name} is not cached ({one_line(error)}); {remedy}")
    return data
