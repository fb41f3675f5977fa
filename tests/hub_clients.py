"""Processes in which the real huggingface_hub client runs: it reads its environment when it is imported.

Each is forked from a process that has torch, and neither diffagents, huggingface_hub nor any dataset library, so a new one
is there in a fraction of a second. What it is to do is a function of a test module; `kept` is its memory between calls.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hub_server import Hub, RequestHandler

kept: dict[str, Any] = {}
RequestHandler.disable_nagle_algorithm = True  # it sends head and body apart: 40 ms for each answer without this
NOT_FOR_ACTING = ("minari", "h5py", "mujoco", "gymnasium_robotics", "stable_baselines3", "matplotlib", "moviepy", "imageio")
_PRELOAD = ["torch", "torch._dynamo", "numpy", "gymnasium", "safetensors.torch", "yaml", "pytest"]


class Refused(NamedTuple):
    """An exception of the client's process: the names of its classes, innermost first, and its text."""

    kinds: tuple[str, ...]
    text: str

    def says(self, kind: str, *words: str) -> None:
        """It is of this type of ours, one line, has these words and no token."""
        assert kind in self.kinds, self
        assert len(self.text.splitlines()) == 1 and len(self.text) < 700, self
        assert not any(token in self.text for token in (Hub.token, Hub.read_only_token, Hub.stranger_token)), self
        for word in words:
            assert word in self.text, self


def attempt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the call returns, or how it refuses."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return Refused(tuple(kind.__name__ for kind in type(error).__mro__), str(error))


class Client:
    """A process with an HF_HOME of its own. `client(function, *args)` calls the function there."""

    def __init__(self, hub: Hub, home: Path, blocked: Sequence[str] = (), **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self.pipe, theirs = context.Pipe()
        everything = {**hub.environment(), "HF_HOME": str(home), "TQDM_DISABLE": "1", **environment}
        self.process = context.Process(target=_serve, args=(theirs, everything, tuple(blocked)), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.pipe.send((function, args, kwargs))
        assert self.pipe.poll(120), f"{function.__name__} does not end"
        done, result = self.pipe.recv()
        assert done, result
        return result

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


@contextmanager
def client(hub: Hub, home: Path, blocked: Sequence[str] = (), **environment: str) -> Iterator[Client]:
    made = Client(hub, home, blocked, **environment)
    try:
        yield made
    finally:
        made.close()


def _serve(pipe: Any, environment: dict[str, str], blocked: Sequence[str]) -> None:
    assert not {"huggingface_hub", "diffagents", *blocked} & set(sys.modules)
    os.environ.update(environment)
    for name in blocked:
        sys.modules[name] = None  # type: ignore[assignment]
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.005))  # the client waits between its attempts
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, function(*args, **kwargs)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
