"""What the number of CPU threads costs, on a quiet machine and on a busy one: one thread, all of them, and threads="auto".

  python zoo/benchmarks/threads.py [--algorithms SRPO DiffusionQL] [--steps 600] [--repeats 3] [--out zoo/results/threads.json]

Each measurement is one whole `learn` of `--steps` updates by a fresh agent, eagerly, on random data of Hopper's sizes, its
choice of a number included. On the busy machine a second process multiplies matrices with as many threads as torch has here.
All that is compared runs interleaved, in `--repeats` rounds; times are seconds per 100 updates, the median with the range of
the rounds, and ratios are taken within each round. Everything is kept in --out as well.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from speed_parts import machine, show, synthetic_data

import diffagents
from diffagents.data.transitions import Transitions

SPIN = "import torch; torch.set_num_threads({0}); a = torch.randn(512, 512)\nwhile True: a @ a"
KINDS: dict[str, int | str] = {"one": 1, "all": torch.get_num_threads(), "auto": "auto"}


@contextlib.contextmanager
def load(busy: bool) -> Iterator[None]:
    """Keep a second process working meanwhile, if `busy`."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", SPIN.format(torch.get_num_threads())])
    try:
        time.sleep(3)  # until it has imported torch
        yield
    finally:
        process.kill()
        process.wait()


def seconds_per_100(name: str, threads: int | str, args: argparse.Namespace, data: Transitions) -> tuple[float, str]:
    """Seconds per 100 updates of one `learn`, and the numbers of threads of its stages."""
    preset = None if args.preset == "none" else args.preset
    agent = getattr(diffagents, name)(preset=preset, seed=0, verbose=0, device="cpu", compile="eager", threads=threads)
    start = time.perf_counter()
    agent.learn(data, args.steps)
    return 100 * (time.perf_counter() - start) / args.steps, "/".join(map(str, agent.plan.threads.values()))


def spread(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f}-{max(numbers):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=["SRPO", "DiffusionQL"], choices=diffagents.AGENTS)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/threads.json"), help="default: %(default)s")
    args = parser.parse_args()
    print(machine())
    kept: dict[str, Any] = {"machine": machine(), "command": "python " + " ".join(sys.argv), "steps": args.steps, "rows": []}
    data = synthetic_data(5000)
    for name in args.algorithms:
        seconds_per_100(name, 1, args, data)  # imports and the first allocation of memory
        for busy in (False, True):
            found: dict[str, list[float]] = {kind: [] for kind in KINDS}
            chosen = []
            with load(busy):
                for _ in range(args.repeats):
                    for kind, threads in KINDS.items():
                        seconds, numbers = seconds_per_100(name, threads, args, data)
                        found[kind].append(seconds)
                        if kind == "auto":
                            chosen.append(numbers)
            where = f"{name}, {'busy' if busy else 'quiet'}"
            show(f"{where}: seconds per 100 updates", *(f"{kind} {spread(times)}" for kind, times in found.items()))
            for kind in ("one", "all"):
                ratios = [a / b for a, b in zip(found["auto"], found[kind], strict=True)]
                show(f"{where}: auto / {kind}", spread(ratios))
            show(f"{where}: threads of auto's stages", *chosen)
            row = {"algorithm": name, "busy": busy, "seconds_per_100_updates": found, "threads_of_auto": chosen}
            kept["rows"].append(row)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"kept in {args.out}")


if __name__ == "__main__":
    main()
