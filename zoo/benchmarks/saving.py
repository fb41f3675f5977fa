"""Milliseconds of saving and loading an SRPO agent and a replay buffer, and their ratios to another version of this library.

    python zoo/benchmarks/saving.py [--against CHECKOUT] [--rounds 5]

Each version works in processes of its own, in turn, so that both meet the same moments of a busy machine. The figures are
processor time, the least of all rounds, without waiting for the disk: what the disk needs is the same for both.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[2]
ONE_ROUND = """
import json, os, pathlib, tempfile, time, warnings
warnings.simplefilter("ignore")
os.fsync = lambda handle: None
import gymnasium as gym, numpy as np, torch
import diffagents
from diffagents.data.replay_buffer import Replay
from diffagents.types import Spec
torch.set_num_threads(1)
spec = Spec.from_spaces(gym.spaces.Box(-9, 9, (17,)), gym.spaces.Box(-1, 1, (6,)))
agent = diffagents.SRPO(verbose=0, device="cpu", seed=0)
agent.set_up(spec)
buffer = Replay(17, 6, 100_000, "cpu")
for _ in range(100):
    zeros = torch.zeros(1000)
    buffer.add(torch.randn(1000, 17), torch.zeros(1000, 6), zeros, zeros, torch.randn(1000, 17), np.zeros(1000, bool))
with tempfile.TemporaryDirectory() as place:
    place = pathlib.Path(place)
    calls = {
        "save a zip file": lambda: agent.save(place / "a.zip"),
        "save a folder": lambda: agent.save_pretrained(place / "folder"),
        "load a zip file": lambda: diffagents.load(place / "a.zip", device="cpu", verbose=0),
        "load a folder": lambda: diffagents.load(place / "folder", device="cpu", verbose=0),
        "save a replay buffer of 100,000 steps": lambda: buffer.save(place / "buffer", {}),
        "load that replay buffer": lambda: Replay.load(place / "buffer", spec, torch.device("cpu"), {}),
    }
    least = {}
    for name, call in calls.items():
        for _ in range(30):
            started = time.process_time()
            call()
            least[name] = min(least.get(name, 9e9), time.process_time() - started)
print(json.dumps(least))
"""


def one_round(version: Path) -> dict[str, float]:
    """Seconds of each call in a new process that imports the library from `version`."""
    environment = {**os.environ, "PYTHONPATH": str(version), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_ROUND], env=environment, cwd=version, capture_output=True, text=True, check=True
    )
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    """Measure the versions in turn and print a line for each call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    versions = [HERE, *([args.against.resolve()] if args.against else [])]
    rounds = [[one_round(version) for version in versions] for _ in range(args.rounds)]
    print(f"torch {torch.__version__}, one thread; least of {args.rounds} rounds of 30 calls, ms of processor time")
    for name in rounds[0][0]:
        least = [min(each[i][name] for each in rounds) * 1e3 for i in range(len(versions))]
        against = f"; other version {least[1]:6.1f}, ratio {least[0] / least[1]:.2f}" if len(least) == 2 else ""
        print(f"{name:38} {least[0]:6.1f}{against}")


if __name__ == "__main__":
    main()
