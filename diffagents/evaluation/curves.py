"""`draw_curves`: how a training went, in one picture: the return of the policy, and under it the losses.

Under each curve one sentence says what a healthy one looks like. The sentences here hold for every algorithm that has a metric
of that name; an algorithm has its own in `HEALTHY`.
"""

import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from diffagents.errors import printable

MAX_PANELS = 24
"""The most panels of a picture of curves: drawing more takes long, and nobody reads them."""
LOG_FROM = 30.0
"""A loss whose largest value is so many times its smallest is drawn on a logarithmic axis."""
RETURN = "return"
"""The name of the evaluations among the metrics of `HEALTHY`."""
HEALTHY = {
    RETURN: "It ends above the mean of the data and above the clone. Single points swing: each is the mean of few episodes.",
    "behavior_loss": "The error of the predicted noise falls quickly and then hardly changes. It does not reach 0.",
    "clone_loss": "It falls quickly and then hardly changes; it contains a log-likelihood and may be below 0.",
    "bc_loss": "It falls quickly and then hardly changes. It may rise again a little, as Q leads away from the data.",
    "return_loss": "The error of Q to the returns of the data falls quickly, then slowly. It does not reach 0.",
    "critic_loss": "The error to the target falls, then stays at a level above 0. Growth without end is divergence.",
    "q_loss": "The error of Q to its target falls, then stays at a level above 0. Growth without end is divergence.",
    "v_loss": "The error of V to its target falls, then stays at some level above 0.",
    "q": "The mean of Q on the data reaches a level and then drifts slowly. Growth without end is divergence.",
    "v": "The mean of V on the data reaches a level and then drifts slowly, as Q does.",
    "policy_loss": "Its gradient moves the policy; its level says little, since it moves with Q. In the end it changes slowly.",
    "lambda": "The weight between cloning and Q: it settles at some level, or at a bound.",
    "weight": "The mean weight of the data's actions stays of the order of 1. At its maximum all actions are cloned alike.",
    "train_return": "The return of the exploring policy, with its noise: it rises, but for a dip at the beginning.",
}
"""By metric: what a healthy curve looks like."""


def draw_curves(agent: Any, *, clone_return: float | None = None) -> bytes | None:
    """Draw the training of an agent: at the top the returns in evaluations on the way, below them each metric of the losses.

    The returns are those of a `CurveCallback` or of SB3's EvalCallback, next to the mean return of the dataset.

    Args:
        agent: An agent of this library.
        clone_return: Mean return of a clone of the data, e.g. of `BC`, to be drawn with the returns.

    Returns:
        A PNG of at most MAX_PANELS panels, which says so if there are more; None if no curve has two points.

    Raises:
        ImportError: matplotlib is not installed.
    """
    mean = (agent.dataset_info or {}).get("mean_return")
    return draw(
        agent.history,
        agent.provenance.get("evaluations", ()),
        levels={"mean of the data": (mean, ":"), "clone of the data": (clone_return, "--")},
        healthy={**HEALTHY, **agent.HEALTHY},
    )


def draw(
    history: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    *,
    levels: Mapping[str, tuple[float | None, str]],
    healthy: Mapping[str, str],
) -> bytes | None:
    """`draw_curves` of rows.

    Args:
        history: `Agent.history`: rows with num_timesteps, stage, stage_step and metrics.
        evaluations: Rows with num_timesteps and mean_return.
        levels: Returns to compare with: what it is, and its value (None: not known) and style of line.
        healthy: By metric: a sentence.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    sentences: dict[str, str] = {}
    for row in history:
        for metric, value in row.items():
            if metric not in ("num_timesteps", "stage", "stage_step") and isinstance(value, float):
                name = printable(" ".join(f"{row.get('stage')}: {metric}".split()))[:60]
                curves.setdefault(name, []).append((row.get("num_timesteps", 0), value))
                sentences[name] = healthy.get(metric, "")
    every = {name: points for name, points in curves.items() if len(points) > 1}
    returns = [(row["num_timesteps"], row["mean_return"]) for row in evaluations]
    returns = returns if len(returns) > 1 else []
    shown = dict(itertools.islice(every.items(), MAX_PANELS - bool(returns)))
    if not shown and not returns:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    columns = max(1, min(4, len(shown)))
    rows = -(-len(shown) // columns)
    heights = [1.25] * bool(returns) + [1.0] * rows
    figure = Figure(figsize=(max(6.4, 3.2 * columns), 2.7 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    if returns:
        axis = figure.add_subplot(grid[0, :])
        axis.plot(*zip(*returns, strict=True), marker="o", label="the policy")
        for name, (level, style) in levels.items():
            if level is not None:
                axis.axhline(level, linestyle=style, color="black" if style == "--" else "gray", label=f"{name}: {level:,.1f}")
        axis.legend(fontsize=8)
        _label(axis, "return of the policy, in evaluations on the way", healthy.get(RETURN, ""), 40 * columns)
    for i, (name, points) in enumerate(shown.items()):
        axis = figure.add_subplot(grid[bool(returns) + i // columns, i % columns])
        axis.plot(*zip(*points, strict=True))
        values = [value for _, value in points]
        is_log = name.endswith("loss") and min(values) > 0 and max(values) > LOG_FROM * min(values)
        if is_log:
            axis.set_yscale("log")
        _label(axis, f"{name} (logarithmic)" if is_log else name, sentences[name], 48)
    if len(shown) < len(every):
        figure.suptitle(f"the first {len(shown)} of {len(every)} curves", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _label(axis: Any, title: str, sentence: str, width: int) -> None:
    """The title of a panel, its axis of steps, and under it the sentence, in lines of at most `width` characters."""
    axis.set_title(title, fontsize=9, parse_math=False)
    axis.tick_params(labelsize=7)
    axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    lines = ["steps", *textwrap.wrap(f"Healthy: {sentence[0].lower()}{sentence[1:]}", width)] if sentence else ["steps"]
    axis.set_xlabel("\n".join(lines), fontsize=7)
