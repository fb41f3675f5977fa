"""Settings and progress of a run: the plan of `learn`, the run of `learn_online`. Saved in the trainer state."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

MODES = ("eager", "compiled", "graph")
"""How the updates of a stage run: eagerly, compiled, or compiled and inside a CUDA graph."""


@dataclass
class Plan:
    """The stages of one `learn` call; fixed at its start.

    Args:
        lengths: Gradient steps of each stage, in order.
        done: Gradient steps that each stage has taken.
        modes: One of MODES for each stage, once chosen; a resumed run keeps it.
        threads: The number of CPU threads of each stage, once chosen; a resumed run keeps it.
    """

    lengths: dict[str, int]
    done: dict[str, int] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Gradient steps of all stages."""
        return sum(self.lengths.values())

    @property
    def remaining(self) -> int:
        """Gradient steps that are left."""
        return self.total - sum(self.done.values())

    @property
    def progress(self) -> str:
        """The gradient steps of each stage, taken and planned, as text."""
        return ", ".join(f"{name} {self.done.get(name, 0):,}/{length:,}" for name, length in self.lengths.items())

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {name: dict(getattr(self, name)) for name in ("lengths", "done", "modes", "threads")}

    @classmethod
    def from_json(cls, data: dict[str, Any], stages: Iterable[str]) -> Self:
        """The plan that `to_json` described. Raises ValueError unless it is a plan over some of `stages`."""
        plan = cls(dict(data["lengths"]), dict(data["done"]), dict(data.get("modes", {})), dict(data.get("threads", {})))
        known = set(stages)
        for name, length in plan.lengths.items():
            done = plan.done.get(name, 0)
            if name not in known:
                raise ValueError(f"invalid plan: there is no stage {name!r}")
            if not all(type(n) is int for n in (length, done)) or not 0 <= done <= length:
                raise ValueError(f"invalid plan: the stage {name!r} has done {done!r} of {length!r} steps")
        if not set(plan.done) | set(plan.modes) | set(plan.threads) <= set(plan.lengths):
            raise ValueError("invalid plan: it lists steps, modes or threads of a stage that it does not have")
        if not set(plan.modes.values()) <= set(MODES):
            raise ValueError(f"invalid plan: the modes {sorted(set(plan.modes.values()))} are not among {MODES}")
        if not all(type(count) is int and count > 0 for count in plan.threads.values()):
            raise ValueError(f"invalid plan: the threads {str(plan.threads)[:80]} are not positive whole numbers")
        return plan

    @staticmethod
    def split(total: int, shares: dict[str, int]) -> dict[str, int]:
        """Split `total` steps over the stages in proportion to `shares`; every stage gets at least one, and the sum is exact.

        Raises:
            ValueError: There are fewer steps than stages.
        """
        if total < len(shares):
            raise ValueError(
                f"total_timesteps={total} is fewer than the {len(shares)} stages {list(shares)}: give each at least one"
            )
        weight = sum(shares.values())
        lengths = {name: max(1, total * share // weight) for name, share in shares.items()}
        longest = max(lengths, key=lambda name: lengths[name])
        lengths[longest] += total - sum(lengths.values())
        return lengths


def opening_steps(share: float, plan: Plan | None, stage: str, stage_steps: dict[str, int]) -> int:
    """The steps of an opening phase of a stage, which only the first plan has that trains it.

    Args:
        share: Share of the stage, in [0, 1].
        plan: The plan; None: there is none yet.
        stage: Name of the stage.
        stage_steps: Steps of each stage in all plans so far.

    Returns:
        The number of steps; 0 if an earlier plan has trained the stage.
    """
    planned, done = (0, 0) if plan is None else (d.get(stage, 0) for d in (plan.lengths, plan.done))
    return 0 if stage_steps[stage] > done else round(share * planned)


@dataclass(frozen=True)
class OnlineSettings:
    """The settings of a `learn_online` run, as `Agent.learn_online` documents them; fixed at its start and saved with it."""

    offline_ratio: float | str | None = None  # None: the algorithm's own
    learning_starts: int | None = None
    utd: float = 1.0
    buffer_size: int | None = None  # None: the current capacity, or 1,000,000
    calibrate: bool = False


@dataclass
class OnlineRun:
    """One `learn_online` run and its progress.

    Args:
        total: Environment steps of the run.
        settings: The arguments of `learn_online`.
        starts: Environment steps before the first update.
        random: Whether actions are uniformly random until then, because the agent has not learned yet.
        settled: Whether there is an offline policy, which is then changed slowly.
        data: The sha256 of the offline data; None without any.
        done: Environment steps taken.
        n_updates: Updates made.
        n_episodes: Finished episodes, including those of earlier runs.
    """

    total: int
    settings: OnlineSettings
    starts: int
    random: bool = False
    settled: bool = True
    data: str | None = None
    done: int = 0
    n_updates: int = 0
    n_episodes: int = 0

    @property
    def owed(self) -> int:
        """Updates that are due but have not been made yet."""
        return int(max(0, self.done - self.starts) * self.settings.utd) - self.n_updates

    def to_json(self) -> dict[str, Any]:
        """The run as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The run that `to_json` described. Raises KeyError, TypeError or ValueError if it is malformed."""
        run = cls(**{**data, "settings": OnlineSettings(**data["settings"])})
        settings, ratio = run.settings, run.settings.offline_ratio
        for name in ("total", "starts", "done", "n_updates", "n_episodes"):
            _check(name, getattr(run, name), _is_count)
        for name in ("random", "settled"):
            _check(name, getattr(run, name), lambda value: type(value) is bool)
        _check("data", run.data, lambda value: value is None or type(value) is str)
        _check("offline_ratio", ratio, lambda value: value is None or value == "uniform" or _is_number(value))
        _check("utd", settings.utd, _is_number)
        _check("learning_starts", settings.learning_starts, lambda value: value is None or _is_count(value))
        _check("buffer_size", settings.buffer_size, lambda value: value is None or (_is_count(value) and value > 0))
        _check("calibrate", settings.calibrate, lambda value: type(value) is bool)
        return run


def _check(name: str, value: Any, holds: Any) -> None:
    if not holds(value):
        raise ValueError(f"invalid online run: {name} is {str(value)[:40]!r}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1000
