"""What a run will do and how far it has come: the stages of `learn`, the run of `learn_online`."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

MODES = ("eager", "compiled", "graph")
"""How a stage's updates run: as they are written, compiled, or compiled and inside a CUDA graph."""


@dataclass
class Plan:
    """The stages of one `learn` call and how far each has come; fixed at the start, kept with the trainer state."""

    lengths: dict[str, int]
    done: dict[str, int] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)  # of MODES, by stage, once it has begun: a resumed run keeps it

    @property
    def total(self) -> int:
        return sum(self.lengths.values())

    @property
    def remaining(self) -> int:
        return self.total - sum(self.done.values())

    def to_json(self) -> dict[str, Any]:
        return {"lengths": dict(self.lengths), "done": dict(self.done), "modes": dict(self.modes)}

    @classmethod
    def from_json(cls, data: dict[str, Any], stages: Iterable[str]) -> Self:
        """What `to_json` gave. Raises ValueError unless it is a plan over some of `stages`."""
        plan = cls(dict(data["lengths"]), dict(data["done"]), dict(data.get("modes", {})))
        known = set(stages)
        for name, length in plan.lengths.items():
            done = plan.done.get(name, 0)
            if name not in known or not all(type(n) is int for n in (length, done)) or not 0 <= done <= length:
                raise ValueError(f"the plan's stage {name!r} ({done!r} of {length!r} steps) cannot be")
        if not set(plan.done) | set(plan.modes) <= set(plan.lengths):
            raise ValueError("the plan has done stages that it does not have")
        if not set(plan.modes.values()) <= set(MODES):
            raise ValueError(f"the plan's modes {sorted(set(plan.modes.values()))} are not of {MODES}")
        return plan

    @staticmethod
    def split(total: int, shares: dict[str, int]) -> dict[str, int]:
        """`total` steps over the stages in proportion to `shares`; every stage gets at least one, the sum is exact.

        Raises ValueError when there are fewer steps than stages.
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


@dataclass(frozen=True)
class OnlineSettings:
    """How a `learn_online` run goes, as its arguments say; fixed at its start and kept with it."""

    offline_ratio: float | str | None = None  # None: the algorithm's own
    learning_starts: int | None = None
    utd: float = 1.0
    buffer_size: int | None = None  # None: what there is, else a million
    calibrate: bool = False


@dataclass
class OnlineRun:
    """One `learn_online` run of `total` environment steps, and how far it has come; kept with the trainer state."""

    total: int
    settings: OnlineSettings
    starts: int  # environment steps before the first update
    random: bool = False  # in these, actions are drawn uniformly: the agent has learnt nothing yet
    settled: bool = True  # whether there is an offline policy, which is to be changed slowly
    data: str | None = None  # sha256 of the offline data; None: there are none
    done: int = 0
    n_updates: int = 0
    n_episodes: int = 0  # finished, those of earlier runs included

    @property
    def owed(self) -> int:
        """Updates that are due by now and were not made."""
        return int(max(0, self.done - self.starts) * self.settings.utd) - self.n_updates

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `to_json` gave. Raises KeyError, TypeError, ValueError where it is malformed."""
        run = cls(**{**data, "settings": OnlineSettings(**data["settings"])})
        settings, ratio = run.settings, run.settings.offline_ratio
        counts = [run.total, run.starts, run.done, run.n_updates, run.n_episodes]
        sizes = [settings.learning_starts or 0, 1 if settings.buffer_size is None else settings.buffer_size]
        shares: list[Any] = [settings.utd, 0.0 if ratio in (None, "uniform") else ratio]
        sound = all(type(n) is int and 0 <= n < 2**53 for n in [*counts, *sizes]) and sizes[1] > 0
        sound = sound and (run.data is None or type(run.data) is str)
        flags = (run.random, run.settled, settings.calibrate)
        if (
            not sound
            or not all(type(flag) is bool for flag in flags)
            or not all(type(x) in (int, float) and 0 <= x <= 1000 for x in shares)
        ):
            raise ValueError("the online run is not one that could be")
        return run
