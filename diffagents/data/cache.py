"""Datasets that were read once are kept as safetensors, so that reading them again is quick."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffagents.data.transitions import Transitions
from diffagents.data.validation import warn
from diffagents.errors import one_line


def _stamp(files: Iterable[Path]) -> str:
    """Changes when a file's name, size or time of writing does."""
    facts = sorted((file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _cached(name: str, key: Mapping[str, Any], stamp: Mapping[str, Any], read: Callable[[], Transitions]) -> Transitions:
    """What `read` gives, from the cache file of `key` if that carries `stamp`, else read and put there.

    One file per key, replaced when the stamp is another, so that the folder does not grow with every change of a set.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    slug = re.sub(r"[^-\w]+", "-", name)
    try:
        folder = Path(os.environ.get("DIFFAGENTS_CACHE") or Path.home() / ".cache" / "diffagents")
        path = folder / f"{slug}-{digest}.safetensors"
    except RuntimeError:  # nobody's home
        return read()
    with contextlib.suppress(Exception):  # absent, stale, truncated, foreign: whatever it is, it is made again
        return Transitions.load(path, extra=stamp)
    data = read()
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
        data.save(temporary, extra=stamp)
        os.replace(temporary, path)
    except (OSError, ValueError, SafetensorError) as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        cure = "set DIFFAGENTS_CACHE to a folder that can be written, or pass cache=False"
        warn(f"{name} is not cached ({one_line(error)}); {cure}")
    return data
