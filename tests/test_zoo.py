"""The policies in zoo/: each loads, acts in its environment, and is as good as its card says, by the program on its card."""

import json
import random
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffagents
from diffagents.agent import Agent
from diffagents.cli import main
from diffagents.envs.make import make_env
from diffagents.evaluation.evaluate import Evaluation
from diffagents.experiments import grid, report
from diffagents.storage import artifact, card

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "zoo"
CELLS = sorted(path.parent.name for path in ZOO.glob("*/config.json"))
QUICK = [cell for cell in CELLS if cell in ("srpo-hopper-medium-expert-v0", "td3bc-hopper-medium-expert-v0")]
SHORT = [cell for cell in CELLS if cell in ("bc-hopper-medium-v0", "bc-walker2d-medium-replay-v0")]
"""Policies that fall soon: their episodes take a second."""
MOST_MB = 110


def runs() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((ZOO / "results" / "zoo").glob("*.json"))]


def test_there_is_a_zoo_and_it_is_small() -> None:
    files = [path for cell in CELLS for path in (ZOO / cell).iterdir()]
    assert len(CELLS) >= 10
    assert sum(path.stat().st_size for path in files) < MOST_MB * 1e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png", ".mp4"}  # no pickle
    assert all((ZOO / cell / name).is_file() for cell in CELLS for name in ("README.md", "results.json", "model.safetensors"))


@pytest.mark.parametrize("cell", CELLS)
def test_a_policy_loads_from_a_checkout_and_acts_in_its_environment(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    agent = diffagents.load(f"zoo/{cell}", device="cpu", verbose=0)
    assert type(agent).from_pretrained(f"zoo/{cell}", device="cpu", verbose=0).seed == agent.seed
    env = make_env((agent.dataset_info or {})["env_spec"])
    obs, _ = env.reset(seed=0)
    action, _ = agent.predict(obs, deterministic=True)
    assert env.action_space.contains(action)
    env.step(action)
    env.close()


def test_the_policies_of_readme_and_zoo_page_can_be_trained_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("srpo-hopper-medium-expert-v0", "srpo-hopper-medium-replay-v0"):
        assert any(name in (ROOT / page).read_text() for page in ("README.md", "zoo/tools/remarks.md"))
        agent = diffagents.load(f"zoo/{name}", device="cpu", verbose=0)
        assert agent.learn_online(4, env="Hopper-v5", learning_starts=2).num_timesteps > 0


@pytest.mark.parametrize("cell", CELLS)
def test_a_policy_is_the_median_seed_of_its_runs(cell: str) -> None:
    members = [run for run in runs() if run["cell"] == cell]
    kept = report.median_run(members)
    config, results = (artifact.read_json(ZOO / cell, name) for name in ("config.json", "results.json"))
    assert config["seed"] == kept["spec"]["seed"] and config["dataset"]["sha256"] == kept["data"]["sha256"]
    assert results["returns"] == kept["last"]["returns"]
    assert f"zoo/{cell}" in (ZOO / cell / "README.md").read_text()


def test_the_tables_are_those_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_curves", lambda *_: False)
    monkeypatch.setattr(report, "draw_iqm", lambda *_: False)
    specs = grid.read_grid(ZOO / "grids" / "zoo.yml")
    assert {run["name"] for run in runs()} <= {spec.name for spec in specs}
    path = report.write_report(runs(), tmp_path, specs=specs, command="", title="The zoo")
    shipped = (ZOO / "README.md").read_text()
    rows = [line for line in path.read_text().splitlines() if line.startswith(("|", "*"))]
    assert len(rows) > len(CELLS) and all(row in shipped for row in rows)
    cells = report.cells_of(runs())
    assert report.overview(cells) in shipped
    build = runpy.run_path(str(ZOO / "tools" / "build.py"))
    assert report.overview(build["front_cells"](cells)) in (ROOT / "README.md").read_text()
    assert (tmp_path / "results.csv").read_text() == (ZOO / "results.csv").read_text()


def test_list_zoo_shows_every_policy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main.main(["list", "--zoo"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == [f"zoo/{cell}" for cell in CELLS]
    assert all(row[1] in diffagents.AGENTS and row[2].startswith("diffagents/") and "return" in row[3] for row in rows)


@pytest.mark.parametrize("cell", CELLS)
def test_a_card_is_what_the_library_writes_today(cell: str) -> None:
    """Otherwise `python zoo/tools/build.py` has to write it anew."""
    config, results = (artifact.read_json(ZOO / cell, name) for name in ("config.json", "results.json"))
    pictures = [name for name in artifact.COMPANIONS if (ZOO / cell / name).is_file()]
    notes = [] if (ZOO / cell / "learner.safetensors").is_file() else [card.ACTS_ONLY]
    made = card.make_card(config, results, name=f"zoo/{cell}", pictures=pictures, notes=notes)
    assert made == (ZOO / cell / "README.md").read_text()


def is_as_good_as(returns: Any, found: float, n_episodes: int) -> None:
    """A mean over new episodes is within what as many of the card's own would give, in 998 of 1000 cases.

    That no episode of the card falls does not say that none ever does (Laplace's rule of succession): one with a return of 0 is
    added to them.
    """
    of_card, rng = np.array(returns), np.random.default_rng(0)
    means = rng.choice(np.append(of_card, 0.0), (20_000, n_episodes)).mean(axis=1)
    if set(of_card) <= {0.0, 1.0}:  # successes
        means = rng.binomial(n_episodes, (of_card.sum() + 1) / (len(of_card) + 2), 20_000) / n_episodes
    low, high = np.quantile(means, [0.001, 0.999])
    slack = 0.01 * np.ptp(of_card) + 1e-6 * abs(of_card).max()
    assert low - slack <= found <= high + slack, f"{found:.1f} is outside [{low:.1f}, {high:.1f}]"


def reaches_its_card(cell: str, n_episodes: int) -> None:
    """By episodes that were not used for the card."""
    agent = diffagents.load(ZOO / cell, device="cpu", verbose=0)
    results = artifact.read_json(ZOO / cell, "results.json")
    how = {"deterministic": results["is_deterministic"], "n_envs": n_episodes}
    found = diffagents.evaluate(agent, (agent.dataset_info or {})["env_spec"], n_episodes, seed=5000, **how)
    is_as_good_as(results["returns"], found.mean_return, n_episodes)


def run_the_card(cell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the program of a card in a checkout, with fewer of the card's own episodes, and compare with what the card says.

    The same resets give the same episodes, but the last digits of a network's output depend on the machine and on how many
    observations it is given at once (here ten, as in the evaluations of the zoo). Some gaits turn a last digit into several per
    cent of the return, some into a fall. Therefore most of the episodes, not all, must have the card's return.
    """
    monkeypatch.chdir(ROOT)
    results, n_episodes = artifact.read_json(ZOO / cell, "results.json"), 10
    (program,) = re.findall(r"```python\n(.*?)```", (ZOO / cell / "README.md").read_text(), re.DOTALL)
    said, done, evaluate = f"n_episodes={results['n_eval_episodes']}", [], Agent.evaluate

    def noted(self: Agent, *arguments: Any, **settings: Any) -> Evaluation:
        done.append(evaluate(self, *arguments, **settings))
        return done[-1]

    monkeypatch.setattr(Agent, "evaluate", noted)
    assert program.count(f"{said},") == program.count("n_envs=10") == 1
    names: dict[str, Any] = {}
    exec(compile(program.replace(said, f"n_episodes={n_episodes}"), cell, "exec"), names)
    (found,) = done
    assert capsys.readouterr().out == f"{found}\n" and names["agent"].action_space.contains(names["action"])
    assert (found.env_id, found.seed, found.deterministic) == tuple(results[x] for x in ("env_id", "seed", "is_deterministic"))
    expected = np.array(results["returns"][:n_episodes])
    apart = np.abs(found.returns - expected) / np.maximum(np.abs(expected), 1e-3 * np.abs(results["returns"]).max())
    assert np.median(apart) < 0.05, f"returns {found.returns} where the card has {expected}"
    is_as_good_as(results["returns"], found.mean_return, n_episodes)


@pytest.mark.parametrize("cell", [*SHORT, *QUICK])
def test_the_program_of_a_card_reaches_its_score(
    cell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_the_card(cell, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_the_program_of_every_card_reaches_its_score(
    cell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_the_card(cell, monkeypatch, capsys)


@pytest.mark.parametrize("cell", QUICK)
def test_a_policy_reaches_its_cards_score(cell: str) -> None:
    reaches_its_card(cell, 4)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_every_policy_reaches_its_cards_score(cell: str) -> None:
    reaches_its_card(cell, 10)


def test_a_ruined_policy_does_not_reach_its_card() -> None:
    """What the check above is worth: the card of one policy, the actions of nobody."""
    cell = QUICK[0]
    agent = diffagents.load(ZOO / cell, device="cpu", verbose=0)
    results = artifact.read_json(ZOO / cell, "results.json")
    for parameter in agent.policy.parameters():
        parameter.data.mul_(0.0)
    found = diffagents.evaluate(agent, "Hopper-v5", 4, seed=1000, n_envs=4)
    assert found.mean_return < min(results["returns"])


@pytest.mark.slow
def test_one_cell_is_made_anew_within_its_interval(tmp_path: Path) -> None:
    """A cell drawn anew each time, on this machine. Needs the datasets of zoo/recipes in $MINARI_DATASETS_PATH."""
    run = random.choice([run for run in runs() if run["seconds"] < 600])
    spec = next(spec for spec in grid.read_grid(ZOO / "grids" / "zoo.yml") if spec.name == run["name"])
    found = grid.run_one(spec, tmp_path, threads=1)
    low, high = run["last"]["interval"]
    assert low <= found["last"]["mean_return"] <= high, (spec.name, low, found["last"]["mean_return"], high)
