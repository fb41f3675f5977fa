"""A stage's whole step as a CUDA graph: batch, draws, losses, gradients, optimisers, targets and metric sums, one launch.

What is due together is captured together, so a stage with a part every second step has two graphs. The generators are
registered with each graph: replays draw new numbers and move their states on, as eager steps would.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from diffagents.training.updates import Runner

WARM_UP = 3
"""Eager steps before a capture: lazy initialisations must not fall into it. They are steps of the training like any other."""


class GraphRunner:
    """A `Runner` on a CUDA device whose steps are captured once and then replayed."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._stream = torch.cuda.Stream(runner.device)  # type: ignore[no-untyped-call]

    def step(self, k: int) -> None:
        """As `Runner.step`."""
        due = tuple(self.runner.due(k))
        if due not in self._graphs:
            if self._seen[due] < WARM_UP:
                self._seen[due] += 1
                self._on_the_side(due)
                return
            self._graphs[due] = self._capture(due)
        self._graphs[due].replay()
        for j in due:
            self.runner.sums[j].count += 1

    @property
    def failed(self) -> bool:
        """As `Runner.failed`; the graph then holds eager kernels."""
        return self.runner.failed

    def means(self) -> dict[str, float]:
        """As `Runner.means`."""
        return self.runner.means()

    def each_means(self) -> list[dict[str, float]]:
        """As `Runner.each_means`."""
        return self.runner.each_means()

    def _on_the_side(self, due: Sequence[int]) -> None:
        """A step on the stream that captures will use."""
        here = torch.cuda.current_stream(self.runner.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            self.runner.run(due)
        here.wait_stream(self._stream)

    def _capture(self, due: Sequence[int]) -> torch.cuda.CUDAGraph:
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
