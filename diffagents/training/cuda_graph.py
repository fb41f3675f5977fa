"""A whole training step as a CUDA graph: batch, noise, losses, gradients, optimisers, target networks and sums of metrics.

A graph is launched as one operation, instead of hundreds of small kernels. Updates that are due together are
captured together, so a stage with an update every second step has two graphs. The random generators are registered with each
graph: replays draw new numbers and advance the generators as eager steps would.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from diffagents.training.updates import Runner

WARM_UP = 3
"""Eager steps before a capture, which must not contain lazy initialisation. They count as ordinary training steps."""


class GraphRunner:
    """Runs the steps of a `Runner` on a CUDA device, captured once and then replayed.

    Args:
        runner: Its tensors (networks, optimisers, data) must stay in the same memory from the first capture on.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._stream = torch.cuda.Stream(runner.device)  # type: ignore[no-untyped-call]

    def step(self, k: int) -> None:
        """Take step k of the stage, counted from 0, as `Runner.step` does."""
        due = tuple(self.runner.due(k))
        if due not in self._graphs:
            if self._seen[due] < WARM_UP:
                self._seen[due] += 1
                self._warm_up(due)
                return
            self._graphs[due] = self._capture(due)
        self._graphs[due].replay()
        for j in due:
            self.runner.sums[j].count += 1

    @property
    def failed(self) -> bool:
        """As `Runner.failed`. In that case the graphs contain the kernels of eager steps."""
        return self.runner.failed

    def means(self) -> dict[str, float]:
        """As `Runner.means`: waits for the device and resets the sums."""
        return self.runner.means()

    def each_means(self) -> list[dict[str, float]]:
        """As `Runner.each_means`."""
        return self.runner.each_means()

    def _warm_up(self, due: Sequence[int]) -> None:
        """An eager step, on the stream that captures will use."""
        here = torch.cuda.current_stream(self.runner.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            self.runner.run(due)
        here.wait_stream(self._stream)

    def _capture(self, due: Sequence[int]) -> torch.cuda.CUDAGraph:
        """Capture the graph of a step, without computing anything."""
        graph = torch.cuda.CUDAGraph()
        for generator in self.runner.generators:
            graph.register_generator_state(generator)
        counts = [some.count for some in self.runner.sums]
        torch.cuda.synchronize(self.runner.device)
        with torch.cuda.graph(graph, stream=self._stream):
            self.runner.run(due)  # recorded, not run
        for some, count in zip(self.runner.sums, counts, strict=True):
            some.count = count
        return graph
