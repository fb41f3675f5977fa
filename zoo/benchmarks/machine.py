"""How fast this machine multiplies matrices, the unit in which the zoo states its budgets.

python zoo/benchmarks/machine.py     # prints GFLOP/s of one core

The median of repeated products of 256 x 256 matrices in float32 on one thread: 2 * 256^3 floating-point operations each.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import statistics
import time

import torch

N, REPEATS, SECONDS = 256, 50, 3.0


def main() -> None:
    torch.set_num_threads(1)
    a, b = torch.randn(N, N), torch.randn(N, N)
    rates, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(REPEATS):
            a @ b
        rates.append(REPEATS * 2 * N**3 / (time.perf_counter() - start) / 1e9)
    print(f"{statistics.median(rates):.0f} GFLOP/s on one core")


if __name__ == "__main__":
    main()
