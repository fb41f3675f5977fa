"""What every test process needs before the first import: one thread, folders of its own, no network, a renderer.

Two shortcuts save a quarter of the tests' time: the pictures for files' cards are not drawn, and YAML is read by its C parser.
"""

import ctypes.util
import functools
import gc
import io
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

import pytest  # noqa: E402
import torch  # noqa: E402  (after the environment variables, which it reads)
import yaml  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

torch.set_num_threads(1)
yaml.safe_load = functools.partial(yaml.load, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@functools.wraps(Figure.savefig)
def _save_a_blank(self: Figure, target: Any, *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` draws the curves of training into memory, which takes longer than the training in these tests."""
    if isinstance(target, io.BytesIO):
        target.write(b"\x89PNG\r\n\x1a\n")
    else:
        _save_a_blank.__wrapped__(self, target, *args, **kwargs)  # type: ignore[attr-defined]


Figure.savefig = _save_a_blank  # type: ignore[method-assign, assignment]


@pytest.fixture
def real_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test of the pictures themselves."""
    monkeypatch.setattr(Figure, "savefig", Figure.savefig.__wrapped__)  # type: ignore[attr-defined]


_connect = socket.socket.connect


def _connect_to_this_machine_only(self: socket.socket, address: Any) -> None:
    """Refuse every other machine, so that a test that would need the network fails here and not only elsewhere."""
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise RuntimeError(f"a test tried to reach {address[0]}: tests have no network")
    _connect(self, address)


socket.socket.connect = _connect_to_this_machine_only  # type: ignore[method-assign, assignment]


def pytest_collection_finish() -> None:
    """What is there before the first test stays: the garbage collector need not walk through it again and again."""
    gc.freeze()


def pytest_unconfigure() -> None:
    _scratch.cleanup()
