"""Our replay buffer and that of SB3: microseconds to add a transition and to draw a batch of 256, and their ratio.

  python zoo/benchmarks/replay.py

Both return the batch as tensors on the CPU. Measurements are interleaved; the median of --rounds is reported. Ours also draws a
mixture with as many offline transitions, for which SB3 has no counterpart.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

from diffagents.data.replay_buffer import Mixture, Replay
from diffagents.data.sampler import Sampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| observation, action | what | ours, us | SB3, us | SB3 / ours |\n|---|---|---|---|---|")
    for obs_dim, act_dim in ((11, 3), (105, 8)):
        rng = np.random.default_rng(0)
        obs = rng.normal(size=(args.rows, 1, obs_dim)).astype(np.float32)
        act = rng.uniform(-1, 1, (args.rows, 1, act_dim)).astype(np.float32)
        zero, one = np.zeros(1, np.float32), torch.zeros(1)
        tensors = [(torch.from_numpy(o), torch.from_numpy(a)) for o, a in zip(obs, act, strict=True)]

        def fill_ours() -> Replay:
            replay = Replay(obs_dim, act_dim, args.rows, "cpu")  # noqa: B023
            for o, a in tensors:  # noqa: B023
                replay.add(o, a, one, one, o, zero > 0)  # noqa: B023
            return replay

        def fill_sb3() -> ReplayBuffer:
            box = spaces.Box(-np.inf, np.inf, (obs_dim,)), spaces.Box(-1, 1, (act_dim,))  # noqa: B023
            buffer = ReplayBuffer(args.rows, *box, device="cpu")
            for o, a in zip(obs, act, strict=True):  # noqa: B023
                buffer.add(o, o, a, zero, zero, [{}])  # noqa: B023
            return buffer

        ours, theirs = fill_ours(), fill_sb3()
        generator = torch.Generator().manual_seed(0)
        half = Mixture(Sampler(torch.randn(args.rows, 2 * obs_dim + act_dim + 2), obs_dim, act_dim), ours, 0.5)
        alone = Mixture(None, ours, 0.5)
        sampling: list[tuple[str, Callable[[], Any], Callable[[], Any] | None]] = [
            ("draw 256", lambda: alone.sample(256, generator), lambda: theirs.sample(256)),  # noqa: B023
            ("draw 128 + 128 old", lambda: half.sample(256, generator), None),  # noqa: B023
        ]
        show(obs_dim, act_dim, "add", *(seconds(fill_ours, 1, args.rounds), seconds(fill_sb3, 1, args.rounds)), args.rows)
        for what, us, them in sampling:
            show(
                obs_dim, act_dim, what, seconds(us, 1000, args.rounds), seconds(them, 1000, args.rounds) if them else None, 1000
            )


def seconds(function: Callable[[], Any], times: int, rounds: int) -> float:
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(times):
            function()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def show(obs_dim: int, act_dim: int, what: str, ours: float, theirs: float | None, per: int) -> None:
    other = f"{1e6 * theirs / per:.1f} | {theirs / ours:.2f}" if theirs is not None else "- | -"
    print(f"| {obs_dim}, {act_dim} | {what} | {1e6 * ours / per:.1f} | {other} |", flush=True)


if __name__ == "__main__":
    main()
