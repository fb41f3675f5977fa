"""The picture of a training: returns at the top, losses below, and what a healthy curve looks like."""

from typing import Any

import pytest
from matplotlib.figure import Figure
from small_agents import NAMES, small
from toy import line_data

from diffagents.evaluation.curves import HEALTHY, RETURN, draw, draw_curves
from diffagents.registry import agent_class


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, instead of their files."""
    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: kept.append(self))
    return kept


def rows(n_metrics: int) -> list[dict[str, Any]]:
    return [{"stage": "train", "num_timesteps": k, **{f"m{i}": 0.5 for i in range(n_metrics)}} for k in (1, 2)]


def test_at_most_24_curves_are_drawn_and_the_picture_says_so(figures: list[Figure]) -> None:
    for n in (24, 150):
        draw(rows(n), (), levels={}, healthy={})
    few, many = figures
    assert len(few.axes) == len(many.axes) == 24 and few.get_suptitle() == ""
    assert many.get_suptitle() == "the first 24 of 150 curves"
    returns = [{"num_timesteps": k, "mean_return": 1.0} for k in (1, 2)]
    draw(rows(24), returns, levels={}, healthy={})
    assert len(figures[-1].axes) == 24 and figures[-1].get_suptitle() == "the first 23 of 24 curves"
    assert draw([], returns[:1], levels={}, healthy={}) is None and len(figures) == 3


def test_the_return_is_at_the_top_with_the_mean_of_the_data_and_the_clone(figures: list[Figure]) -> None:
    agent = small("TD3BC").learn(line_data(), log_interval=1)
    agent.provenance["evaluations"] = [{"num_timesteps": k, "mean_return": 10.0 * k} for k in (1, 2, 3)]
    draw_curves(agent, clone_return=12.5)
    top, *below = figures[0].axes
    curve, data, clone = top.get_lines()
    assert curve.get_xydata().tolist() == [[1, 10], [2, 20], [3, 30]]
    assert set(data.get_ydata()) == {agent.dataset_info["mean_return"]} and data.get_linestyle() == ":"
    assert set(clone.get_ydata()) == {12.5} and clone.get_linestyle() == "--"
    assert [text.get_text().partition(":")[0] for text in top.get_legend().get_texts()] == [
        "the policy",
        "mean of the data",
        "clone of the data",
    ]
    boxes = [axis.get_position() for axis in figures[0].axes]
    assert all(boxes[0].y0 > box.y1 for box in boxes[1:]) and boxes[0].width > 1.5 * boxes[1].width
    assert {axis.get_title().partition(" (")[0] for axis in below} >= {"train: critic_loss", "train: policy_loss", "train: q"}
    figures.clear()
    draw_curves(agent)
    assert len(figures[0].axes[0].get_lines()) == 2  # no clone is known


@pytest.mark.parametrize("preset", ["fast", None])
@pytest.mark.parametrize("name", NAMES)
def test_every_curve_says_what_a_healthy_one_looks_like(name: str, preset: str | None, figures: list[Figure]) -> None:
    agent: Any = small(name, preset=preset).learn(line_data(), log_interval=2)
    agent.provenance["evaluations"] = [{"num_timesteps": k, "mean_return": 10.0 * k} for k in (1, 2)]
    draw_curves(agent)
    known = {**HEALTHY, **agent_class(name).HEALTHY}
    for axis in figures[0].axes:
        metric = axis.get_title().partition(" (")[0].partition(": ")[2] or RETURN
        said = " ".join(axis.get_xlabel().split("\n"))
        assert said.lower() == f"steps healthy: {known[metric]}".lower(), (metric, said)
        assert known[metric].endswith(".") and len(known[metric]) <= 120


def test_a_loss_of_many_sizes_is_logarithmic(figures: list[Figure]) -> None:
    history = [{"stage": "a", "num_timesteps": k, "q_loss": 10.0**-k, "q": 10.0**-k, "v_loss": 1.0 + k} for k in range(4)]
    draw(history, (), levels={}, healthy={})
    assert {axis.get_title(): axis.get_yscale() for axis in figures[0].axes} == {
        "a: q_loss (logarithmic)": "log",
        "a: q": "linear",
        "a: v_loss": "linear",
    }
