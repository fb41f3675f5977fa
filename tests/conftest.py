"""What every test process needs before the first import: one thread, folders of its own, no network, a renderer."""

import ctypes.util
import os
import socket
import sys
import tempfile
from typing import Any

_scratch = tempfile.TemporaryDirectory(prefix="diffagents-tests-")

os.environ["OMP_NUM_THREADS"] = "1"  # small networks; pytest-xdist has one process per core
os.environ["DIFFAGENTS_CACHE"] = os.path.join(_scratch.name, "cache")
os.environ["MINARI_DATASETS_PATH"] = os.path.join(_scratch.name, "minari")
os.environ["HF_HOME"] = os.path.join(_scratch.name, "hf")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test with a server of its own sets these two anew in its subprocess
os.environ["MPLBACKEND"] = "agg"
headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
if headless and ctypes.util.find_library("EGL"):
    os.environ.setdefault("MUJOCO_GL", "egl")

import torch  # noqa: E402  (after the environment variables, which it reads)

torch.set_num_threads(1)

_connect = socket.socket.connect


def _connect_to_this_machine_only(self: socket.socket, address: Any) -> None:
    """Refuse every other machine, so that a test that would need the network fails here and not only elsewhere."""
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise RuntimeError(f"a test tried to reach {address[0]}: tests have no network")
    _connect(self, address)


socket.socket.connect = _connect_to_this_machine_only  # type: ignore[method-assign, assignment]


def pytest_unconfigure() -> None:
    _scratch.cleanup()
