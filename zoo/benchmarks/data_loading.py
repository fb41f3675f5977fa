"""Seconds from a Minari set of a million Hopper-like steps to tensors: first load, load from the cache, and `describe`.

    python zoo/benchmarks/data_loading.py [--steps 1000000] [--root FOLDER]

The set (obs 11, act 3, episodes of 523 steps on average) is random numbers: only its size matters here. Each load runs
in a process of its own; the first one's time includes importing minari. The files have just been written: a warm disk.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

GOALS = {"first": 4.0, "cached": 0.2, "describe": 10.0}  # seconds per million steps
ID = "benchmark/hopper-like-v0"
LOAD = """
import json, sys, time
start = time.perf_counter()
from diffagents.data.load import load_dataset
imported, cpu = time.perf_counter(), time.process_time()
data = load_dataset(sys.argv[1], download=False)
loaded, cpu = time.perf_counter(), time.process_time() - cpu
sampler = data.sampler("cpu")
done = time.perf_counter()
print(json.dumps({"import": imported - start, "load": loaded - imported, "sampler": done - loaded, "n": len(data),
                  "cpu": cpu, "minari": "minari" in sys.modules}))
"""

DESCRIBE = """
import json, sys, time
from diffagents import describe, load_dataset
data = load_dataset(sys.argv[1], download=False)
start, cpu = time.perf_counter(), time.process_time()
describe(data, quick=True)
quick, cpu_quick = time.perf_counter() - start, time.process_time() - cpu
start, cpu = time.perf_counter(), time.process_time()
describe(data)
print(json.dumps({"load": time.perf_counter() - start, "cpu": time.process_time() - cpu, "quick": quick,
                  "cpu_quick": cpu_quick, "n": len(data)}))
"""

# What Minari alone needs to bring every array into memory: no loader built on its iterator can be quicker.
ITERATE = """
import json, sys, time
import minari
dataset = minari.load_dataset(sys.argv[1])
start, cpu = time.perf_counter(), time.process_time()
n = sum(len(episode.rewards) for episode in dataset.iterate_episodes())
print(json.dumps({"load": time.perf_counter() - start, "cpu": time.process_time() - cpu, "n": n}))
"""


def main() -> None:
    """Make the set if it is not there, load it, print the seconds and the facts of the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--root", type=Path, help="keep the set (and its cache) here; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = (args.root or Path(temporary)).resolve()
        os.environ |= {"MINARI_DATASETS_PATH": str(root / "minari"), "DIFFAGENTS_CACHE": str(root / "cache")}
        (root / "minari").mkdir(parents=True, exist_ok=True)
        if not (root / "minari" / ID).exists():
            start = time.perf_counter()
            make_set(args.steps)
            print(f"made {args.steps:,} steps in {time.perf_counter() - start:.1f} s")
        for file in (root / "cache").glob("*"):
            file.unlink()
        floor = load(ITERATE)
        results = {name: load(LOAD) for name in ("first", "cached", "cached again")}
        described = load(DESCRIBE)
    print(f"Minari's iterator alone: {floor['load']:.3f} s, {floor['cpu']:.3f} s of CPU")
    for name, r in results.items():
        million, imported = r["load"] / r["n"] * 1e6, "yes" if r["minari"] else "no"
        print(
            f"{name:>12}: load {r['load']:.3f} s ({million:.3f} s per million, {r['cpu']:.3f} s of CPU), "
            f"then the sampler {r['sampler']:.3f} s; import diffagents {r['import']:.2f} s; minari imported: {imported}"
        )
    print(
        f"describe: {described['load']:.2f} s ({described['cpu']:.2f} s of CPU), without clone and timing "
        f"{described['quick']:.2f} s ({described['cpu_quick']:.2f} s)"
    )
    print("goals in seconds per million steps:", ", ".join(f"{name} under {goal:g}" for name, goal in GOALS.items()))
    print(describe_machine())


def make_set(n_steps: int) -> None:
    """Write random episodes of 100 to 946 steps as a Minari HDF5 set."""
    import minari
    import numpy as np
    from gymnasium import spaces
    from minari.data_collector.episode_buffer import EpisodeBuffer

    rng = np.random.default_rng(0)
    buffers = []
    left = n_steps
    while left > 0:
        n = min(int(rng.integers(100, 947)), left)
        left -= n
        ends = np.arange(n) == n - 1
        buffers.append(
            EpisodeBuffer(
                id=len(buffers),
                observations=rng.standard_normal((n + 1, 11)),
                actions=rng.uniform(-1, 1, (n, 3)).astype(np.float32),
                rewards=rng.uniform(0, 4, n),
                terminations=ends & (n < 900),
                truncations=ends & (n >= 900),
                infos={},
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an author and an environment that this set does not have
        minari.create_dataset_from_buffers(
            ID,
            buffers,
            observation_space=spaces.Box(-np.inf, np.inf, (11,), np.float64),
            action_space=spaces.Box(-1.0, 1.0, (3,), np.float32),
        )


def load(code: str) -> dict[str, float]:
    """Run `code` on the set in a new process and return the numbers it prints."""
    found = subprocess.run([sys.executable, "-c", code, ID], capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(found.stderr)
    result: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return result


def describe_machine() -> str:
    """Python, library versions, processor and its cores, in one line."""
    from importlib.metadata import version

    libraries = ("torch", "numpy", "minari", "h5py", "safetensors")
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    load_average = f"load average {os.getloadavg()[0]:.1f}"
    return f"Python {platform.python_version()}, {versions}; {cpu}, {os.cpu_count()} cores, {load_average}"


if __name__ == "__main__":
    main()
