"""Shared by speed.py and speed_gpu.py: agents on random data of Hopper's sizes, their steps, interleaved timing, the machine.

Imports only torch, numpy and diffagents, so that it runs without the other dependencies.
"""

import argparse
import dataclasses
import itertools
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import straightforward
import straightforward_baselines
import torch

import diffagents
from diffagents.data.sampler import Sampler
from diffagents.data.transitions import Transitions
from diffagents.training import offline, prepare
from diffagents.training.updates import Stage

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler quiet
HERE = pathlib.Path(__file__).resolve().parent
OBS_DIM, ACT_DIM, BATCH = 11, 3, 256
FIRST = 10_000  # the first step that is measured: by then all updates of a stage take place, and a cycle begins
Call = Callable[[], Any]
Bursts = dict[str, list[float]]  # seconds per call, one number for each burst


# ---- what is measured ------------------------------------------------------------------------------------------------
def synthetic_data(n: int = 50_000, obs_dim: int = OBS_DIM, act_dim: int = ACT_DIM) -> Transitions:
    """Random transitions, by default of Hopper's sizes, in episodes of 500 steps, actions in [-1, 1]."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (n, act_dim)).astype(np.float32)
    actions[:2] = [[-1.0] * act_dim, [1.0] * act_dim]
    ends = np.arange(1, n + 1) % 500 == 0
    arrays = {
        "observations": rng.standard_normal((n, obs_dim), np.float32),
        "actions": actions,
        "rewards": rng.uniform(0, 4, n).astype(np.float32),
        "terminations": ends & (np.arange(n) % 1000 < 500),
        "truncations": ends & (np.arange(n) % 1000 >= 500),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about action bounds inferred from the data
        return diffagents.load_dataset(arrays)


def make_agent(name: str, data: Transitions, device: str = "cpu", seed: int = 0, **hyperparameters: Any) -> Any:
    """An untrained agent with the networks of the paper, prepared for the data."""
    cls = getattr(diffagents, name)
    sizes = {"batch_size": BATCH, "behavior_batch_size": BATCH, "n_support_states": BATCH, "n_critics": 10, "n_samples": 10}
    known = {field.name for field in dataclasses.fields(cls.Config)}
    hyperparameters = {**{key: value for key, value in sizes.items() if key in known}, **hyperparameters}
    agent = cls(preset=None, seed=seed, verbose=0, device=device, compile="eager", **hyperparameters)
    prepare.adopt(agent, data)
    return agent


def stage_sampler(agent: Any, stage: Stage, data: Transitions) -> Sampler:
    """The sampler of a stage."""
    sampler = data.sampler(agent.device, agent.reward_transform, agent.obs_normalizer)
    return sampler if stage.prepare is None else stage.prepare(sampler, offline.stage_generator(agent, stage))


def cycle_length(stage: Stage) -> int:
    """Number of steps after which the pattern of updates repeats."""
    return math.lcm(*(update.every for update in stage.updates))


def stepper(runner: Any, n: int) -> Call:
    """A function that runs the next n steps at each call. It raises RuntimeError if compiling failed."""
    steps = itertools.count(FIRST)

    def call() -> None:
        for _ in range(n):
            runner.step(next(steps))
        if runner.failed:
            raise RuntimeError("compiling failed, as the warning explains: the measurement would be that of eager updates")

    return call


def plain_stepper(name: str, stage: Stage, sampler: Sampler, device: str, n: int) -> Call:
    """A function that runs n steps in straightforward PyTorch, including the batches."""
    late = {"ema_start": 0} if name in ("DiffusionQL", "DiffCPS") else {}
    module = straightforward if hasattr(straightforward, f"Plain{name}") else straightforward_baselines
    plain = getattr(module, f"Plain{name}")(OBS_DIM, ACT_DIM, device, **late)
    names = (f"update_{stage.name}", "update", "update_critic")  # SfBC plans with the update of its critic on other targets
    update = next(getattr(plain, update) for update in names if hasattr(plain, update))
    columns = [column.contiguous() for column in sampler.all()[:5]]
    tables = list(sampler.tables.values())

    def call() -> None:
        for _ in range(n):
            rows = torch.randint(0, len(sampler), (stage.batch_size,), device=device)
            update(tuple(column[rows] for column in columns), *(table[rows] for table in tables))

    return call


# ---- measuring -------------------------------------------------------------------------------------------------------
def synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def warm_up(call: Call) -> None:
    """Call until everything is compiled and, on a GPU, captured, which happens at the fourth occurrence of a combination."""
    for _ in range(8 if torch.cuda.is_available() and torch.cuda.is_initialized() else 1):
        call()


def interleave(calls: dict[str, Call], args: argparse.Namespace) -> Bursts:
    """Interleaved: `--repeats` bursts of about `--seconds` of each call, after a warm-up in which it may compile."""
    counts: dict[str, int] = {}
    found: Bursts = {name: [] for name in calls}
    for name, call in calls.items():
        warm_up(call)
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        counts[name] = max(1, round(args.seconds / (time.perf_counter() - start)))
    for _ in range(args.repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            synchronize()
            found[name].append((time.perf_counter() - start) / counts[name])
    return found


def latencies(calls: dict[str, Call], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Microseconds of single calls, interleaved as above: p50, p99 and the number n of calls."""
    times: Bursts = {name: [] for name in calls}
    for name, call in [*calls.items()] * (args.repeats + 1):
        end = time.perf_counter() + args.seconds
        while (start := time.perf_counter()) < end:
            call()
            times[name].append(time.perf_counter() - start)
    skip = {name: len(some) // (5 * (args.repeats + 1)) for name, some in times.items()}  # the warm-up
    return {
        name: {"p50": 1e6 * np.percentile(t[skip[name] :], 50), "p99": 1e6 * np.percentile(t[skip[name] :], 99), "n": len(t)}
        for name, t in times.items()
    }


def fastest(calls: dict[str, Call], args: argparse.Namespace) -> Bursts:
    """The fastest call of each burst, interleaved as above, after a burst of each for the warm-up."""
    found: Bursts = {name: [] for name in calls}
    for name, call in [*calls.items()] * (args.repeats + 1):
        best, end = float("inf"), time.perf_counter() + args.seconds
        while (start := time.perf_counter()) < end:
            call()
            best = min(best, time.perf_counter() - start)
        found[name].append(best)
    return {name: times[1:] for name, times in found.items()}


def numbers_of(code: str) -> list[float]:
    """Run `code` in a new Python process and return the numbers on its last line of output."""
    # Through a small process: on Linux ru_maxrss of a child starts at the size of its parent.
    small = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    done = subprocess.run([sys.executable, "-c", small, code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def milliseconds(times: list[float], per: int = 1) -> dict[str, float]:
    """The median in milliseconds, and half the range in percent of it."""
    median = statistics.median(times)
    return {"ms": 1e3 * median / per, "spread_percent": 50 * (max(times) - min(times)) / median}


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster, the median over the bursts."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def show(*cells: Any) -> None:
    print("  ".join(f"{cell:<36}" if k == 0 else f"{cell:>13}" for k, cell in enumerate(cells)), flush=True)


def machine() -> dict[str, Any]:
    """A description of the machine; call it before measuring, for the load average."""
    cpu = platform.processor() or platform.machine()
    if pathlib.Path("/proc/cpuinfo").exists():
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),  # of numpy, and of torch where it is not told otherwise
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "commit": git("rev-parse", "HEAD") or None,
        "changed_files": len(git("status", "--porcelain", "--untracked-files=no").splitlines()),
    }
