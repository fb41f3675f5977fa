"""Who makes the runs of a grid: this process, one after the other, or Ray, side by side."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffagents.experiments.grid import RunSpec, run_one
from diffagents.training import provenance

_CARRIED = ("MINARI_DATASETS_PATH", "DIFFAGENTS_CACHE", "MUJOCO_GL", "HF_HOME", "HF_HUB_OFFLINE")  # to a cluster's workers
Done = Callable[[RunSpec, BaseException | None], None]


def run_serially(specs: Sequence[RunSpec], root: str | Path, done: Done, *, device: str, threads: int | None) -> None:
    """One after the other, in this process. `done` is told of each; a failed one stops no other, Ctrl-C all."""
    for spec in specs:
        try:
            run_one(spec, root, device=device, threads=threads)
        except Exception as error:
            done(spec, error)
        else:
            done(spec, None)


def run_with_ray(
    specs: Sequence[RunSpec],
    root: str | Path,
    done: Done,
    *,
    device: str,
    threads: int | None,
    cpus: float = 1,
    gpus: float | None = None,
    address: str | None = None,
) -> None:
    """Side by side on all that Ray has: this machine, or the cluster at `address` (then `root` must be a folder all share).

    cpus, gpus: what a run takes, so that gpus=0.25 puts four on a card; None: a whole one where there are any;
    0: the CPU. A run whose worker dies is started again, and goes on from its checkpoint. Raises ImportError without Ray.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
    except ImportError:
        raise ImportError('the Ray executor needs Ray: pip install "diffagents[sweep]"') from None

    address = address or os.environ.get("RAY_ADDRESS")
    carried = {name: os.environ[name] for name in _CARRIED if name in os.environ}
    carried |= {name: os.path.abspath(carried[name]) for name in _CARRIED[:2] if name in carried}
    elsewhere: dict[str, Any] = {"runtime_env": {"env_vars": carried}} if address else {}  # workers here inherit them anyway
    if gpus is None:
        gpus = 1 if device != "cpu" and torch.cuda.is_available() else 0
    device = "cpu" if device == "auto" and not gpus else device  # a worker without a share sees all cards, or none
    ray.init(address=address, include_dashboard=False, log_to_driver=False, **elsewhere)
    try:
        remote: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(run_one)
        place, how = str(Path(root).resolve()), {"device": device, "threads": threads, "command": provenance.command_line()}
        running = {remote.remote(spec, place, **how): spec for spec in specs}
        while running:
            ready, _ = ray.wait(list(running), timeout=1.0)
            for reference in ready:
                spec, error = running.pop(reference), None
                try:
                    ray.get(reference)
                except ray.exceptions.RayTaskError as raised:
                    error = raised.cause if isinstance(raised.cause, Exception) else raised
                except ray.exceptions.RayError as raised:
                    error = raised
                done(spec, error)
    finally:
        ray.shutdown()
