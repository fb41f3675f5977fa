"""Execute the runs of a grid: one after the other in this process, or in parallel with Ray."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffagents.experiments.grid import RunSpec, run_one

_CARRIED = (
    "MINARI_DATASETS_PATH",
    "DIFFAGENTS_CACHE",
    "MUJOCO_GL",
    "HF_HOME",
    "HF_HUB_OFFLINE",
)  # environment variables passed to workers
Done = Callable[[RunSpec, BaseException | None], None]
"""Called after each run with the error that it raised, or None."""


def _command(grid_name: str | None, spec: RunSpec) -> str | None:
    """The command that repeats a run, for its card."""
    return None if grid_name is None else f"diffagents bench {grid_name} --only {spec.name}"


def run_serially(
    specs: Sequence[RunSpec],
    root: str | Path,
    done: Done,
    *,
    device: str,
    threads: int | None,
    grid_name: str | None = None,
) -> None:
    """Make runs one after the other in this process. A run that fails does not stop the others; Ctrl-C stops all.

    Args:
        specs: the runs.
        root: folder of all runs.
        done: called after each run.
        device: where to train: "auto", "cpu", "cuda", ...
        threads: threads of torch. Default: unchanged.
        grid_name: name of the grid's file, for the cards of the policies.
    """
    for spec in specs:
        try:
            run_one(spec, root, device=device, threads=threads, command=_command(grid_name, spec))
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
    grid_name: str | None = None,
) -> None:
    """Make runs in parallel with Ray, on this machine or on a cluster.

    A run whose worker dies is started again and resumes from its checkpoint.

    Args:
        specs: the runs.
        root: folder of all runs; on a cluster a folder that all machines share.
        done: called after each run.
        device: where to train: "auto", "cpu", "cuda", ...
        threads: threads of torch in each worker. Default: unchanged.
        cpus: CPUs reserved for each run.
        gpus: GPUs reserved for each run: 0.25 puts four runs on one GPU, 0 uses the CPU. Default: 1 if there is a GPU.
        address: address of a running Ray cluster. Default: $RAY_ADDRESS, else this machine.
        grid_name: name of the grid's file, for the cards of the policies.

    Raises:
        ImportError: if Ray is not installed.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
    except ImportError:
        raise ImportError("the Ray executor needs Ray: pip install ray") from None

    address = address or os.environ.get("RAY_ADDRESS")
    carried = {name: os.environ[name] for name in _CARRIED if name in os.environ}
    carried |= {name: os.path.abspath(carried[name]) for name in _CARRIED[:2] if name in carried}
    elsewhere: dict[str, Any] = {"runtime_env": {"env_vars": carried}} if address else {}  # local workers inherit them
    if gpus is None:
        gpus = 1 if device != "cpu" and torch.cuda.is_available() else 0
    device = "cpu" if device == "auto" and not gpus else device  # a worker that reserves no GPU must not look for one
    ray.init(address=address, include_dashboard=False, log_to_driver=False, **elsewhere)
    try:
        remote: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(run_one)
        place, how = (
            str(Path(root).expanduser().resolve()),
            {"device": device, "threads": threads},
        )
        running = {remote.remote(spec, place, command=_command(grid_name, spec), **how): spec for spec in specs}
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
