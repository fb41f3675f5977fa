"""A stage's whole step as a CUDA graph: batch, draws, losses, gradients, optimisers, targets and metric sums, one launch.

What is due together is captured together, so a stage with a part every second step has two graphs. The generator is
registered with each graph: replays draw new numbers and move its state on, as eager steps would.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from diffagents.engine import Runner

WARM_UP = 3
"""Eager steps before a capture: lazy initialisations must not fall into it. They are steps of the training like any other."""


class GraphRunner(Runner):
    """A `Runner` on a CUDA device whose steps are captured once and then replayed."""

    def step(self, k: int) -> None:
        due = tuple(j for j, part in enumerate(self.parts) if part.due(k))
        if not hasattr(self, "_graphs"):
            self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
            self._seen: Counter[tuple[int, ...]] = Counter()
            self._stream = torch.cuda.Stream(self.sampler.device)  # type: ignore[no-untyped-call]
        if due not in self._graphs:
            if self._seen[due] < WARM_UP:
                self._seen[due] += 1
                self._on_the_side(due)
                return
            self._graphs[due] = self._capture(due)
        self._graphs[due].replay()
        for j in due:
            if self.sums[j].has_metrics:
                self.sums[j].count += 1

    def _on_the_side(self, due: Sequence[int]) -> None:
        """A step on the stream that captures will use."""
        here = torch.cuda.current_stream(self.sampler.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            self.run(due)
        here.wait_stream(self._stream)

    def _capture(self, due: Sequence[int]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        counts = [some.count for some in self.sums]
        torch.cuda.synchronize(self.sampler.device)
        with torch.cuda.graph(graph, stream=self._stream):
            self.run(due)  # recorded, not run
        for some, count in zip(self.sums, counts, strict=True):
            some.count = count
        return graph
