"""What speed.py and speed_gpu.py share: agents on random data of Hopper's sizes, their steps, timing in turns, the machine.

Imports torch, numpy and diffagents only, so that it runs where the rest of our dependencies is missing.
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

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports each start and stop of its own
HERE = pathlib.Path(__file__).resolve().parent
OBS_DIM, ACT_DIM, BATCH = 11, 3, 256
FIRST = 10_000  # the step that a stage is taken up at: all its parts are due from time to time, and a cycle begins here
Call = Callable[[], Any]
Bursts = dict[str, list[float]]  # seconds per call, one number for each burst


# ---- what is measured ------------------------------------------------------------------------------------------------
def synthetic_data(n: int = 50_000) -> Transitions:
    """Random transitions of Hopper's sizes, in episodes of 500 steps, actions in [-1, 1]."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (n, ACT_DIM)).astype(np.float32)
    actions[:2] = [[-1.0] * ACT_DIM, [1.0] * ACT_DIM]
    ends = np.arange(1, n + 1) % 500 == 0
    arrays = {
        "observations": rng.standard_normal((n, OBS_DIM), np.float32),
        "actions": actions,
        "rewards": rng.uniform(0, 4, n).astype(np.float32),
        "terminations": ends & (np.arange(n) % 1000 < 500),
        "truncations": ends & (np.arange(n) % 1000 >= 500),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about bounds taken from the data
        return diffagents.load_dataset(arrays)


def make_agent(name: str, data: Transitions, device: str = "cpu", seed: int = 0, **knobs: Any) -> Any:
    """An agent with the paper's networks that knows the data and is not trained."""
    cls = getattr(diffagents, name)
    sizes = {"batch_size": BATCH, "behavior_batch_size": BATCH, "n_support_states": BATCH, "n_critics": 10, "n_samples": 10}
    known = {field.name for field in dataclasses.fields(cls.Config)}
    knobs = {**{knob: value for knob, value in sizes.items() if knob in known}, **knobs}
    agent = cls(seed=seed, verbose=0, device=device, compile="eager", **knobs)
    prepare.adopt(agent, data)
    return agent


def stage_sampler(agent: Any, stage: Stage, data: Transitions) -> Sampler:
    """The data as the stage samples them."""
    sampler = data.sampler(agent.device, agent.reward_transform, agent.obs_normalizer)
    return sampler if stage.prepare is None else stage.prepare(sampler, offline.stage_generator(agent, stage))


def cycle_length(stage: Stage) -> int:
    """Steps after which the same parts are due again."""
    return math.lcm(*(update.every for update in stage.updates))


def stepper(runner: Any, n: int) -> Call:
    """Runs the runner's next n steps at each call. Raises RuntimeError where compiling failed, so that they run eagerly."""
    steps = itertools.count(FIRST)

    def call() -> None:
        for _ in range(n):
            runner.step(next(steps))
        if runner.failed:
            raise RuntimeError("compiling failed (the warning says why): what runs is not what was to be measured")

    return call


def plain_stepper(name: str, stage: Stage, sampler: Sampler, device: str, n: int) -> Call:
    """The same n steps in straightforward PyTorch, batches included."""
    late = {"ema_start": 0} if name in ("DiffusionQL", "DiffCPS") else {}
    module = straightforward if hasattr(straightforward, f"Plain{name}") else straightforward_baselines
    plain = getattr(module, f"Plain{name}")(OBS_DIM, ACT_DIM, device, **late)
    names = (f"update_{stage.name}", "update", "update_critic")  # SfBC's planning is its critic's update on other goals
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
    """Until all is compiled and, on a GPU, captured: what is due together is captured at its fourth time."""
    for _ in range(8 if torch.cuda.is_available() and torch.cuda.is_initialized() else 1):
        call()


def interleave(calls: dict[str, Call], args: argparse.Namespace) -> Bursts:
    """`--repeats` bursts of about `--seconds` of each call, in turns, after two calls to warm up (the first may compile)."""
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
    """Microseconds of single calls, p50 and p99, in turns as above; n: how many calls."""
    times: Bursts = {name: [] for name in calls}
    for name, call in [*calls.items()] * (args.repeats + 1):
        end = time.perf_counter() + args.seconds
        while (start := time.perf_counter()) < end:
            call()
            times[name].append(time.perf_counter() - start)
    skip = {name: len(some) // (5 * (args.repeats + 1)) for name, some in times.items()}  # while warming up
    return {
        name: {"p50": 1e6 * np.percentile(t[skip[name] :], 50), "p99": 1e6 * np.percentile(t[skip[name] :], 99), "n": len(t)}
        for name, t in times.items()
    }


def numbers_of(code: str) -> list[float]:
    """What Python prints last, running `code` in a fresh process."""
    # By way of a small process: on Linux a child's ru_maxrss begins at the size of the parent it was started from.
    small = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    done = subprocess.run([sys.executable, "-c", small, code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def milliseconds(times: list[float], per: int = 1) -> dict[str, float]:
    """The median, and half the range in percent of it."""
    median = statistics.median(times)
    return {"ms": 1e3 * median / per, "spread_percent": 50 * (max(times) - min(times)) / median}


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster, the median over the bursts."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def show(*cells: Any) -> None:
    print("  ".join(f"{cell:<36}" if k == 0 else f"{cell:>13}" for k, cell in enumerate(cells)), flush=True)


def machine() -> dict[str, Any]:
    """What it was measured on; asked before measuring, for the load."""
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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "commit": git("rev-parse", "HEAD") or None,
        "changed_files": len(git("status", "--porcelain", "--untracked-files=no").splitlines()),
    }
