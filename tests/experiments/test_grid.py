"""Grids of runs: what a file means, that a run is made once and goes on where it was cut, Ray, and the tables."""

import csv
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import Hub
from scripts import run_script

import diffagents
from diffagents.cli import experiments, main
from diffagents.evaluation.statistics import interquartile_mean
from diffagents.experiments import executors, grid, report
from diffagents.experiments.grid import RunSpec

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "examples" / "data"
REACHER = "diffagents/reacher/replay-v0"
SMALL: dict[str, Any] = {"train_steps": 40, "batch_size": 16, "policy_kwargs": {"net_arch": [16, 16]}}


@pytest.fixture(autouse=True)
def _shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(SHIPPED))
    monkeypatch.chdir(tmp_path)


def spec(algorithm: str = "IQL", seed: int = 0, **changes: Any) -> RunSpec:
    values: dict[str, Any] = {"settings": SMALL, "episodes": 3, "points": 2, "point_episodes": 2, **changes}
    return RunSpec(algorithm, REACHER, seed, **values)


def grid_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "grid.yml"
    path.write_text(text)
    return path


# ---- the file --------------------------------------------------------------------------------------------------------

TWO_BLOCKS = f"""
seeds: [0, 1]
episodes: 3
points: 1
point_episodes: 2
settings:
  IQL: {{train_steps: 30, beta: 2.0}}
  TD3BC: {{train_steps: 20}}
runs:
  - {{algorithms: [IQL, TD3BC], datasets: [{REACHER}, other/data-v0]}}
  - {{algorithms: IQL, datasets: {REACHER}, seeds: 7, steps: 50, label: b5, settings: {{IQL: {{beta: 5}}}}}}
"""


def test_a_grid_is_read_in_its_order_and_settings_of_a_block_win(tmp_path: Path) -> None:
    specs = grid.read_grid(grid_file(tmp_path, TWO_BLOCKS))
    told = [(s.seed, s.dataset, s.algorithm) for s in specs]
    first = [(seed, data, name) for seed in (0, 1) for data in (REACHER, "other/data-v0") for name in ("IQL", "TD3BC")]
    assert told == [*first, (7, REACHER, "IQL")]
    assert specs[0].settings == {"train_steps": 30, "beta": 2.0} and specs[1].settings == {"train_steps": 20}
    assert specs[-1].settings == {"train_steps": 30, "beta": 5.0} and specs[-1].steps == 50
    assert type(specs[-1].settings["beta"]) is float and specs[-1].cell == "iql-b5-reacher-replay-v0"
    assert {(s.episodes, s.points, s.point_episodes) for s in specs} == {(3, 1, 2)}
    assert specs[0].cell == "iql-reacher-replay-v0" and specs[2].cell == "iql-other-data-v0"


def test_without_a_preset_a_run_takes_the_default_and_null_is_none(tmp_path: Path) -> None:
    text = "settings: {IQL: {beta: 2.0, %s}}\nruns: [{algorithms: IQL, datasets: any/data-v0}]"
    found = [one for settings in ("", "preset: null") for one in grid.read_grid(grid_file(tmp_path, text % settings))]
    default, none = (grid._new_agent(one, "cpu") for one in found)
    assert (default.preset, default.config) == ("fast", diffagents.IQL(preset="fast", beta=2.0).config)
    assert (none.preset, none.config) == (None, diffagents.IQL.Config(beta=2.0))
    assert found[0].name != found[1].name


def test_a_run_that_is_asked_for_twice_is_one(tmp_path: Path) -> None:
    text = "settings: {IQL: {train_steps: 9}}\nruns:\n" + 2 * f"  - {{algorithms: IQL, datasets: {REACHER}}}\n"
    assert len(grid.read_grid(grid_file(tmp_path, text))) == 1


def test_everything_that_decides_a_result_is_in_the_name() -> None:
    changed = {"seed": 1, "steps": 7, "env": "Reacher-v5", "episodes": 4, "points": 3, "point_episodes": 1}
    changed |= {
        "label": "x",
        "deterministic": False,
        "settings": {**SMALL, "beta": 1.0},
        "dataset": "a/b-v0",
        "algorithm": "AWR",
    }
    assert set(changed) == {field.name for field in dataclasses.fields(RunSpec)}
    names = {spec().name, *(dataclasses.replace(spec(), **{key: value}).name for key, value in changed.items())}
    assert len(names) == len(changed) + 1
    assert spec().name == spec().name and spec(seed=3).cell == spec().cell


def test_runs_keep_the_names_that_they_had() -> None:
    """Of the time when deterministic=True was the default; one that asks for it is another run now."""
    assert RunSpec("IQL", "a/b-v0", 0).name == "iql-a-b-v0-seed0-6f2f5377"
    assert RunSpec("IQL", "a/b-v0", 0, deterministic=False).name == "iql-a-b-v0-seed0-98e4838a"
    assert len({RunSpec("IQL", "a/b-v0", 0, deterministic=how).name for how in (None, True, False)}) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs: [", "is not YAML"),
        ("seeds: [0]", "list `runs:`"),
        ("runs: [7]", "block 1 of runs must be a mapping"),
        ("sedes: [0]\nruns: []", "sedes"),
        (f"runs:\n  - {{algorithms: IQL, dataset: {REACHER}}}", "dataset"),
        ("runs:\n  - {algorithms: IQL}", "needs datasets"),
        (f"runs:\n  - {{algorithms: IQQL, datasets: {REACHER}}}", "IQQL"),
        (f"settings: {{IQL: {{betta: 3}}}}\nruns:\n  - {{algorithms: IQL, datasets: {REACHER}}}", "betta"),
        (f"settings: {{IQL: {{beta: -3}}}}\nruns:\n  - {{algorithms: IQL, datasets: {REACHER}}}", "beta"),
        (f"runs:\n  - {{algorithms: IQL, datasets: {REACHER}, seeds: [a]}}", "seeds"),
        (f"runs:\n  - {{algorithms: IQL, datasets: {REACHER}, seeds: [-1]}}", "seed"),
        (f"episodes: 0\nruns:\n  - {{algorithms: IQL, datasets: {REACHER}}}", "episodes"),
        (f"runs:\n  - {{algorithms: IQL, datasets: {REACHER}, steps: 1.5}}", "steps"),
        (f"settings: {{IQQL: {{beta: 3}}}}\nruns:\n  - {{algorithms: IQL, datasets: {REACHER}}}", "IQQL"),
        (f"settings: {{IQL: 3}}\nruns:\n  - {{algorithms: IQL, datasets: {REACHER}}}", "mapping of an algorithm"),
        (f"settings: [IQL]\nruns:\n  - {{algorithms: IQL, datasets: {REACHER}}}", "mapping of an algorithm"),
        (f"deterministic: 'no'\nruns:\n  - {{algorithms: IQL, datasets: {REACHER}}}", "deterministic"),
        (f"episodes: 3\nruns:\n  - {{algorithms: IQL, datasets: {REACHER}}}", "point_episodes=5"),
        (
            f"runs:\n  - {{algorithms: IQL, datasets: {REACHER}}}\n"
            f"  - {{algorithms: IQL, datasets: {REACHER}, seeds: 1, settings: {{IQL: {{beta: 1}}}}}}",
            "give one a `label:`",
        ),
    ],
)
def test_a_bad_grid_is_refused_with_its_place(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"grid\.yml") as error:
        grid.read_grid(grid_file(tmp_path, text))
    assert said in str(error.value)


@pytest.mark.parametrize("points", [0, 1])
def test_without_evaluations_during_training_nothing_is_asked_of_their_episodes(points: int, tmp_path: Path) -> None:
    """The default of point_episodes may exceed episodes then, and the report does not speak of such evaluations."""
    text = f"episodes: 3\npoints: {points}\nruns:\n  - {{algorithms: IQL, datasets: {REACHER}}}"
    (one,) = grid.read_grid(grid_file(tmp_path, text))
    assert (one.points, one.episodes) == (points, 3)
    few, many = (run("IQL", 0, 50.0), run("IQL", 0, 50.0))
    few["spec"] = few["spec"] | {"points": points}
    said = "No policy was evaluated during\ntraining, so that the best evaluation is the last."
    cells = [report.details({"iql-reacher": [each]}, "make CELL") for each in (few, many)]
    assert said in cells[0] and "evaluations during training" not in cells[0]
    assert said not in cells[1] and "evaluations during training play" in cells[1]


def bomb(depth: int = 9) -> str:
    """Nested lists of a few hundred bytes, which would be nine to the power of nine numbers if they were written out."""
    lines = ["x0: &x0 [0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize("place", ["seeds: *x8", "label: *x8", "env: *x8", "settings: {IQL: {beta: *x8}}", "unknown: *x8"])
def test_aliases_that_would_fill_the_memory_are_refused(place: str, tmp_path: Path) -> None:
    text = f"{bomb()}\nruns:\n  - {{algorithms: IQL, datasets: {REACHER}, {place}}}"
    with pytest.raises(ValueError, match=r"grid\.yml has more than 100,000 values"):
        grid.read_grid(grid_file(tmp_path, text))


def test_an_alias_that_contains_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains itself"):
        grid.read_grid(grid_file(tmp_path, "runs: &x [*x]"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 25)), "100,000 values"),
        ("x: [&b0 [1]" + "".join(f", &b{i} [*b{i - 1}]" for i in range(1, 3000)) + "]", "nested too deeply"),
        ("".join(f"b{i}: &b{i} {{<<: *b{i - 1}}}\n" if i else "b0: &b0 {k: v}\n" for i in range(3000)), "nested too deeply"),
        ("x: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("x: [" + "1," * 150_000 + "1]", "larger than 256 KB"),
        ("x: &x {<<: *x}", "contains itself"),
        ("x: !!bool perhaps", "is not YAML"),
        ("x: !!timestamp perhaps", "is not YAML"),
        (f"runs:\n  - {{algorithms: IQL, datasets: {REACHER}, seeds: [{'1,' * 10_000} 1]}}", "more than 10,000 runs"),
    ],
    ids=["merges", "aliases", "chain of merges", "brackets", "size", "merge of itself", "bool", "timestamp", "runs"],
)
def test_a_file_that_would_take_long_is_refused_at_once(text: str, said: str, tmp_path: Path) -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"grid\.yml") as error:
        grid.read_grid(grid_file(tmp_path, text))
    assert said in str(error.value) and time.perf_counter() - started < 5


def test_looking_builds_neither_environments_nor_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diffagents.TD3BC, "set_up", lambda *_: pytest.fail("networks were built"))
    monkeypatch.setattr("diffagents.agent.as_vec_env", lambda *_: pytest.fail("an environment was made"))
    settings = "settings: {TD3BC: {policy_kwargs: {net_arch: [20000, 20000]}}}"
    for env in ("Pendulum-v1", "FetchReach-v4"):
        path = grid_file(tmp_path, f"runs: [{{algorithms: TD3BC, datasets: {REACHER}, steps: 1, env: {env}, {settings}}}]")
        assert main.main(["bench", str(path), "--status"]) == 0
    assert "waiting" in capsys.readouterr().out


@pytest.mark.parametrize(
    "dataset", ["/home/alice/clients/acme/churn.NPZ", "~/acme/churn.h5", "C:\\acme\\churn.npz", "../acme/churn", "/acme/churn"]
)
def test_the_name_of_a_run_contains_no_folder_of_its_data(dataset: str) -> None:
    assert RunSpec("IQL", dataset, 0).cell == "iql-churn"


def test_looking_at_a_grid_imports_nothing_and_running_says_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stranger.py").write_text("import pathlib\npathlib.Path('marker').write_text('ran')\n")
    path = grid_file(
        tmp_path, f"runs:\n  - {{algorithms: IQL, datasets: {REACHER}, steps: 10, env: 'stranger:Nothing-v0'}}\nepisodes: 5\n"
    )
    assert main.main(["bench", str(path), "--status"]) == 0
    assert not (tmp_path / "marker").exists() and "stranger" not in sys.modules
    assert main.main(["bench", str(path), "--root", "runs"]) == 1
    assert (tmp_path / "marker").exists()
    assert "diffagents: environments of" in (err := capsys.readouterr().err) and "grid.yml import stranger" in err
    sys.modules.pop("stranger")


def test_the_shipped_grids_can_be_read() -> None:
    for path in (ROOT / "zoo" / "grids").glob("*.yml"):
        assert grid.read_grid(path)


# ---- one run ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_results_and_a_policy_that_acts_so(tmp_path: Path) -> None:
    found = grid.run_one(spec(), tmp_path)
    folder = tmp_path / spec().name
    assert found == json.loads((folder / "results.json").read_text())
    assert found["stage_steps"] == {"train": 40} and found["data"]["id"] == REACHER and found["seconds"] > 0
    assert [row["num_timesteps"] for row in found["curve"]] == [20, 40]
    agent = diffagents.load(folder / "policy", device="cpu", verbose=0)
    again = grid.evaluate_as(spec(), agent, agent.dataset_info["env_spec"], 3)  # type: ignore[index]
    assert list(again.returns) == found["last"]["returns"] and again.seed == 1000
    assert found["curve"][-1]["mean_return"] == pytest.approx(again.mean_return)
    card = json.loads((folder / "policy" / "results.json").read_text())
    assert card["mean_reward"] == found["last"]["mean_return"] and card["n_eval_episodes"] == 3
    assert grid.status(spec(), tmp_path)["state"] == "done" and not (folder / "progress.json").exists()


@pytest.mark.parametrize("meant", [True, False])
def test_a_run_is_evaluated_as_its_policy_is_meant_to_act(meant: bool, tmp_path: Path) -> None:
    """Also where it resumes from a checkpoint that did not store it yet; `deterministic:` in the grid has precedence."""
    settings = {"preset": "fast" if meant else None, "behavior_steps": 4, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}}
    one = spec("DiffusionBC", settings=settings, episodes=1, points=0, point_episodes=1)
    found = grid.run_one(one, tmp_path / "whole")
    assert found["spec"]["deterministic"] is None and found["last"]["deterministic"] is meant
    agent = diffagents.load(tmp_path / "whole" / one.name / "policy", verbose=0)
    assert agent.acts_deterministically is meant
    other = dataclasses.replace(one, deterministic=not meant)
    assert grid.evaluate_as(other, agent, "Reacher-v5", 1).deterministic is not meant
    agent.clone(deterministic=not meant).save(tmp_path / "checkpoint.zip")
    assert grid._resumed(one, tmp_path / "checkpoint.zip", "cpu").acts_deterministically is meant


def test_a_finished_run_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = grid.run_one(spec(), tmp_path)
    monkeypatch.setattr(grid, "_run", lambda *_: pytest.fail("trained again"))
    assert grid.run_one(spec(), tmp_path) == first


@pytest.mark.parametrize("algorithm", ["IQL", "SRPO"])
def test_a_run_that_was_cut_ends_as_if_it_had_not_been(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"batch_size": 16, "policy_kwargs": {"net_arch": [16, 16]}}
    if algorithm == "SRPO":
        settings |= {"critic_steps": 20, "behavior_steps": 10, "policy_steps": 30, "behavior_batch_size": 16}
        settings["policy_kwargs"] = {"net_arch": [16, 16], "behavior_width": 16}
    else:
        settings["train_steps"] = 30
    one = spec(algorithm, settings=settings, points=3)
    whole = grid.run_one(one, tmp_path / "whole")
    evaluate, calls = grid.evaluate_as, []

    def cut_at_the_second_point(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(grid, "evaluate_as", cut_at_the_second_point)
    monkeypatch.setattr(grid, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        grid.run_one(one, tmp_path / "cut")
    assert grid.status(one, tmp_path / "cut")["state"] == "interrupted"
    monkeypatch.setattr(grid, "evaluate_as", evaluate)
    trained = len(calls)
    resumed = grid.run_one(one, tmp_path / "cut")
    assert trained == 2 and resumed["stage_steps"] == whole["stage_steps"]
    assert resumed["last"] == whole["last"] and resumed["curve"] == whole["curve"]
    tensors = [diffagents.load(tmp_path / at / one.name / "policy", verbose=0).get_parameters() for at in ("whole", "cut")]
    for name, module in tensors[0].items():
        for key, tensor in module.items():
            assert torch.equal(tensor, tensors[1][name][key]), (name, key)


@pytest.mark.parametrize("at", [25, 40])
def test_checkpoints_are_written_on_the_way_and_gone_on_from(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "SAVE_EVERY", 0.0)
    whole = grid.run_one(spec(points=0), tmp_path / "whole")
    real, steps = diffagents.IQL.save, []

    def killed(agent: Any, path: Any, *rest: Any) -> Any:
        saved = real(agent, path, *rest)
        steps.append(agent.num_timesteps)
        if agent.num_timesteps == at and steps.count(at) == 1:
            agent.provenance["seconds"] = 0.0  # what is in memory is lost
            raise MemoryError("killed")
        return saved

    monkeypatch.setattr(diffagents.IQL, "save", killed)
    with pytest.raises(MemoryError):
        grid.run_one(spec(points=0), tmp_path / "cut")
    assert (tmp_path / "cut" / spec(points=0).name / "error.txt").read_text().endswith("MemoryError: killed\n")
    assert grid.status(spec(points=0), tmp_path / "cut")["state"] == "failed"
    kept = diffagents.load(tmp_path / "cut" / spec(points=0).name / "checkpoint.zip", verbose=0).provenance["seconds"]
    resumed = grid.run_one(spec(points=0), tmp_path / "cut")
    assert resumed["last"] == whole["last"] and resumed["seconds"] > kept > 0
    assert steps == [*range(1, 41), 40]  # nothing twice
    assert not (tmp_path / "cut" / spec(points=0).name / "error.txt").exists()


def test_a_run_that_fails_stops_no_other_and_says_why(tmp_path: Path) -> None:
    bad = dataclasses.replace(spec(), dataset="diffagents/nowhere/none-v0")
    told: list[tuple[str, BaseException | None]] = []
    executors.run_serially([bad, spec()], tmp_path, lambda s, e: told.append((s.name, e)), device="cpu", threads=1)
    assert [name for name, _ in told] == [bad.name, spec().name] and told[1][1] is None
    assert "nowhere" in str(told[0][1]) and "nowhere" in (tmp_path / bad.name / "error.txt").read_text()
    assert grid.status(bad, tmp_path)["state"] == "failed"


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom diffagents.experiments import grid\n"
        "with grid._locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    held = tmp_path / spec().name
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(held)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert other.stdin is not None and other.stdout is not None
    assert other.stdout.readline() == "held\n"
    assert grid.status(spec(), tmp_path)["state"] == "running"
    with pytest.raises(grid.Busy, match="another process"):
        grid.run_one(spec(), tmp_path)
    other.stdin.close()
    assert other.wait(20) == 0
    assert grid.status(spec(), tmp_path)["state"] == "waiting"


def test_looking_how_far_a_run_is_does_not_keep_it_from_being_made(tmp_path: Path) -> None:
    held = threading.Event()

    def look() -> None:  # as `status` does, only longer
        with grid._locked(tmp_path / spec().name):
            held.set()
            time.sleep(0.5)

    looker = threading.Thread(target=look)
    looker.start()
    held.wait()
    assert grid.run_one(spec(), tmp_path)["cell"] == spec().cell
    looker.join()


def test_who_waited_for_a_run_takes_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = grid.run_one(spec(), tmp_path)
    path = tmp_path / spec().name / "results.json"
    text, exists = path.read_text(), Path.exists
    looks = []

    def not_yet(self: Path, **how: Any) -> bool:
        looks.append(self == path)
        return False if self == path and looks.count(True) == 1 else exists(self, **how)

    monkeypatch.setattr(Path, "exists", not_yet)
    monkeypatch.setattr(grid, "_run", lambda *_: pytest.fail("made again"))
    assert grid.run_one(spec(), tmp_path) == found and path.read_text() == text


def test_other_data_under_the_same_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toy import line_data

    np.savez(tmp_path / "line.npz", **line_data(obs_dim=3, act_dim=1))
    one = dataclasses.replace(spec(), dataset=str(tmp_path / "line.npz"), env="Pendulum-v1", points=0)
    assert one.cell == "iql-line"
    monkeypatch.setattr(grid, "evaluate_as", lambda *_: (_ for _ in ()).throw(OSError("cut")))
    with pytest.raises(OSError, match="cut"):
        grid.run_one(one, tmp_path)
    np.savez(tmp_path / "line.npz", **line_data(obs_dim=3, act_dim=1, seed=1))
    with pytest.raises(ValueError, match=r"is not the dataset of .*checkpoint\.zip"):
        grid.run_one(one, tmp_path)


def test_a_dataset_without_an_environment_is_refused_before_training(tmp_path: Path) -> None:
    from toy import line_data

    np.savez(tmp_path / "line.npz", **line_data())
    with pytest.raises(ValueError, match="`env:`"):
        grid.run_one(dataclasses.replace(spec(), dataset=str(tmp_path / "line.npz")), tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_makes_the_same_runs(tmp_path: Path) -> None:
    """In a process of its own, as a shell would start it: two runs and one that fails, side by side."""
    bad = "  - {algorithms: IQL, datasets: diffagents/nowhere/none-v0}\n"
    text = f"episodes: 2\npoint_episodes: 1\npoints: 0\nsettings: {{IQL: {json.dumps(SMALL)}}}\nruns:\n{bad}"
    path = grid_file(tmp_path, text + f"  - {{algorithms: IQL, datasets: {REACHER}, seeds: [0, 1]}}\n")
    command = [
        sys.executable,
        "-m",
        "diffagents",
        "bench",
        str(path),
        "--root",
        str(tmp_path / "ray"),
        "--executor",
        "ray",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, timeout=540
    )
    assert done.returncode == 1 and "1 of 3 runs failed" in done.stderr and "nowhere" in done.stderr, done.stderr
    for one in grid.read_grid(path)[1:]:
        theirs = json.loads((tmp_path / "ray" / one.name / "results.json").read_text())
        assert theirs["last"] == grid.run_one(one, tmp_path / "serial", threads=1)["last"]
        card = json.loads((tmp_path / "ray" / one.name / "policy" / "config.json").read_text())
        assert "default_worker" not in json.dumps(card["provenance"])  # Ray's own command line says nothing to a reader


DAMAGED: dict[str, tuple[str, str]] = {
    "nested": ("progress.json", "[" * 5000),
    "list": ("progress.json", "[1]"),
    "text": ("progress.json", '{"step": "x", "total": 1, "stage": "train", "last": null}'),
    "no step": ("progress.json", '{"total": 1}'),
    "stage": ("progress.json", '{"stage": []}'),
    "huge": ("progress.json", '{"step": 1, "total": 2, "stage": "train", "last": 1' + "0" * 400 + "}"),
    "not a number": ("progress.json", '{"step": 1, "total": 2, "stage": "train", "last": NaN}'),
    "empty": ("results.json", "{}"),
    "results of a list": ("results.json", '{"last": []}'),
    "results of texts": ("results.json", '{"last": {"mean_return": "x", "score": null}, "seconds": 1}'),
    "huge result": ("results.json", '{"last": {"mean_return": 1' + "0" * 400 + ', "score": null}, "seconds": 1}'),
}


@pytest.mark.parametrize(("name", "text"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_hides_no_other_run(name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, runs = small_grid(tmp_path, "[0]"), tmp_path / "runs"
    bad, other = grid.read_grid(path)
    (runs / bad.name).mkdir(parents=True)
    (runs / bad.name / name).write_text(text)
    assert grid.status(bad, runs) == {"state": "unreadable"} and grid.status(other, runs) == {"state": "waiting"}
    assert main.main(["bench", str(path), "--root", str(runs), "--status"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["unreadable", "waiting"]


def test_a_pipe_in_a_folder_of_runs_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / spec().name).mkdir()
    for name in ("progress.json", "results.json"):
        os.mkfifo(tmp_path / spec().name / name)
        assert grid.status(spec(), tmp_path) == {"state": "unreadable"}


def test_progress_decides_no_state_and_sends_nothing_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, runs = small_grid(tmp_path, "[0]"), tmp_path / "runs"
    one = grid.read_grid(path)[0]
    (runs / one.name).mkdir(parents=True)
    text = {"state": "done", "step": 1, "total": 2, "stage": "\x1b[2J\x1b]0;pwned\x07", "last": 3.0}
    (runs / one.name / "progress.json").write_text(json.dumps(text))
    assert grid.status(one, runs)["state"] == "interrupted"
    assert main.main(["bench", str(path), "--root", str(runs), "--status"]) == 0
    assert (said := capsys.readouterr().out).replace("\n", "").isprintable() and "50 %" in said and "3.00" in said


# ---- tables ----------------------------------------------------------------------------------------------------------


def run(algorithm: str, seed: int, mean: float, *, dataset: str = "a/one-v0", best: float | None = None, **changes: Any) -> Any:
    """What results.json holds; scores are a tenth of returns. best: the score of the first of two evaluations on the way."""
    one, first = RunSpec(algorithm, dataset, seed), best if best is not None else mean
    curve = [{"num_timesteps": at, "mean_return": 10 * x, "score": x} for at, x in ((5, first), (9, mean))]
    last = {"mean_return": 10 * mean, "score": mean, "success_rate": None, "mean_length": 5.0, "deterministic": True}
    last |= {"returns": [10 * mean] * 3, "score_reference": ["table", 0.0, 1000.0]}
    made = {"name": one.name, "cell": one.cell, "spec": dataclasses.asdict(one), "last": last, "curve": curve}
    made |= {"data": {"sha256": "x", "mean_return": 300.0, "score": 30.0}, "stage_steps": {"train": 9}, "seconds": 60.0}
    return made | {"machine": "m", "commit": "c"} | changes


def test_the_median_seed() -> None:
    members = [run("IQL", seed, mean) for seed, mean in enumerate([50.0, 10.0, 30.0])]
    assert report.median_run(members)["spec"]["seed"] == 2
    assert report.median_run(members[:2])["spec"]["seed"] == 1  # of two, the lower


def test_runs_of_different_settings_are_no_cell() -> None:
    one, other = run("IQL", 0, 1.0), run("IQL", 1, 2.0)
    other["spec"]["settings"] = {"beta": 1.0}
    with pytest.raises(ValueError, match="more than their seeds"):
        report.cells_of([one, other])
    other = run("IQL", 1, 2.0)
    other["last"]["deterministic"] = False
    with pytest.raises(ValueError, match="more than their seeds"):
        report.cells_of([one, other])
    earlier = run("IQL", 1, 2.0)
    earlier["spec"]["deterministic"] = True  # the default of earlier versions, which came to the same
    assert report.cells_of([one, earlier]) == {one["cell"]: [one, earlier]}
    with pytest.raises(ValueError, match="same seed"):
        report.cells_of([one, run("IQL", 0, 3.0)])
    with pytest.raises(ValueError, match="more than their seeds"):
        report.cells_of([one, run("IQL", 1, 3.0, data={"sha256": "other", "mean_return": 1.0, "score": 1.0})])


def test_the_report_says_what_there_is_and_what_is_not(tmp_path: Path) -> None:
    runs = [run("SRPO", seed, mean, best=95.0) for seed, mean in enumerate([40.0, 70.0, 70.0])]
    runs += [run("DiffusionBC", 0, 45.0), run("IQL", 0, 20.0)]
    specs = [RunSpec("SRPO", "a/one-v0", 0), RunSpec("BDPO", "a/one-v0", 4), RunSpec("BDPO", "a/one-v0", 5)]
    path = report.write_report(runs, tmp_path / "report", specs=specs, command="make CELL", title="T")
    text = path.read_text()
    assert "| `a/one-v0` | D4RL scale | 30.0 | 45.0 (1) | 20.0 (1) | **60.0 [40.0, 70.0]** |" in text
    assert (
        "| `srpo-a-one-v0` | 3 | 600.0 [400.0, 700.0] | 60.0 [40.0, 70.0] | 40.0, (70.0), 70.0 | 95.0 [95.0, 95.0] | 5, 5, 5 |"
        in text
    )
    assert "IQL (20.0, 1 seed) does not beat the data's mean (30.0) or DiffusionBC (45.0)" in text and "SRPO (60.0" not in text
    assert "* `bdpo-a-one-v0`: seeds 4, 5" in text and "make CELL" in text
    rows = list(csv.DictReader((path.parent / "results.csv").open()))
    assert [(row["cell"], row["seed"], row["last_score"]) for row in rows[2:]] == [
        ("srpo-a-one-v0", "0", "40.0"),
        ("srpo-a-one-v0", "1", "70.0"),
        ("srpo-a-one-v0", "2", "70.0"),
    ]
    assert all((path.parent / name).stat().st_size > 5000 for name in ("curves.png", "iqm.png", "choice.png"))


def test_a_single_seed_takes_no_interval_from_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(report, "_save", lambda figure, _: drawn.append(figure))
    runs = [run("SRPO", seed, mean) for seed, mean in enumerate([40.0, 60.0, 70.0])] + [run("IQL", 0, 20.0)]
    assert report.draw_iqm(report.cells_of(runs), tmp_path / "iqm.png")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["IQL, 1 seed", "SRPO, 3 seeds"]  # the best on top
    (bar,) = axes.patches
    assert (bar.get_x(), bar.get_x() + bar.get_width()) == pytest.approx((40.0, 70.0), abs=5)
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([20.0, float(interquartile_mean([40.0, 60.0, 70.0]))])


def test_names_from_files_are_neither_html_nor_markdown_nor_formulas(tmp_path: Path) -> None:
    bad = run("IQL", 0, 50.0, dataset="d|`<img src=x onerror=alert(1)>`$\\frac$\n# owned")
    bad["cell"] = "c`<script>"
    bad["spec"]["label"] = "[x](http://y) <b>| $\\frac$"
    runs = [bad, run("BC", 0, 40.0), run("IQL", 0, 30.0)]
    text = report.write_report(runs, tmp_path / "report", command="make CELL", title="T").read_text()
    assert "<img" not in text and "<script" not in text and "<b>" not in text and "[x](" not in text
    assert "\n# owned" not in text and "`d\\|'&lt;img" in text
    tables = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(tables) == 5 and {line.replace("\\|", "").count("|") for line in tables} == {7, 12}


BROKEN: dict[str, Any] = {
    "empty": lambda run: run.clear(),
    "no parts": lambda run: run.update(last={}, data={}),
    "seed": lambda run: run["spec"].update(seed="x"),
    "dataset": lambda run: run["spec"].update(dataset=["x"]),
    "returns": lambda run: run["last"].update(returns=[10**400]),
    "reference": lambda run: run["last"].update(score_reference=["t", 1, 1]),
    "no episode": lambda run: run["last"].update(returns=[]),
    "curve": lambda run: run["curve"][0].update(score=None),
    "steps": lambda run: run.update(stage_steps={"train": "x"}),
    "another run": lambda run: run.update(name="iql-other"),
}


@pytest.mark.parametrize("break_it", BROKEN.values(), ids=BROKEN)
def test_a_damaged_result_is_left_out_of_the_tables_with_a_warning(break_it: Any, tmp_path: Path) -> None:
    good, bad = run("BC", 0, 40.0), run("IQL", 0, 50.0)
    for one in (good, bad):
        folder = tmp_path / one["name"]
        folder.mkdir()
        if one is bad:
            break_it(one)
        (folder / "results.json").write_text(json.dumps(one))
    with pytest.warns(UserWarning, match=r"iql-.*results\.json is left out"):
        assert report.read_runs(tmp_path) == [good]


def test_the_shipped_results_are_taken(tmp_path: Path) -> None:
    paths = sorted((ROOT / "zoo" / "results" / "zoo").glob("*.json"))
    for path in paths:
        (tmp_path / path.stem).mkdir()
        shutil.copyfile(path, tmp_path / path.stem / "results.json")
    assert len(report.read_runs(tmp_path)) == len(paths) > 0


def test_success_and_plain_returns_have_their_units() -> None:
    def maze(mean: float, success: float) -> Any:
        last = {"mean_return": mean, "score": None, "success_rate": success, "mean_length": 9.0}
        return run("IQL", 0, 0.0, last=last, data={"sha256": "x", "mean_return": 0.95, "score": None})

    assert report.unit_of([maze(0.8, 0.8)]) == "success %"
    assert report.value_of(maze(0.8, 0.8)["last"], "success %") == pytest.approx(80.0)
    assert report.unit_of([maze(0.8, 0.8), maze(1.5, 0.9)]) == "return"  # one that goes on after the goal: for all
    assert report.unit_of([run("IQL", 0, 5.0)]) == "D4RL scale"
    assert report.value_of(run("IQL", 0, 5.0)["last"], "D4RL scale") == 5.0


def test_the_best_evaluation_counts_the_last_policy_with_all_its_episodes() -> None:
    one = run("IQL", 0, 50.0, best=40.0)
    one["curve"][-1] |= {"mean_return": 1.0, "score": 0.1}  # fewer episodes, as an older version noted it
    assert report.best_of(one) == {"num_timesteps": 9, "mean_return": 500.0, "score": 50.0}
    assert report.best_of(run("IQL", 0, 50.0, best=60.0))["num_timesteps"] == 5
    assert report.best_of(run("IQL", 0, 50.0, curve=[]))["mean_return"] == 500.0


def test_the_clone_is_bc_if_it_was_run() -> None:
    runs = [run("DiffusionBC", 0, 45.0), run("BC", 0, 70.0), run("IQL", 0, 50.0)]
    text = report.verdicts(report.cells_of(runs))
    assert "IQL (50.0, 1 seed) does not beat BC (70.0)" in text and "DiffusionBC (45.0, 1 seed) does not beat BC (70.0)" in text
    assert report.clone_among(["IQL"]) is None


def test_the_mean_over_datasets_is_that_of_algorithms_with_all_of_them() -> None:
    runs = [run("BC", 0, 40.0), run("BC", 0, 60.0, dataset="a/two-v0"), run("IQL", 0, 50.0)]
    text = report.overview(report.cells_of(runs))
    assert "| mean of these 2 | D4RL scale | 30.0 | 50.0 | - |" in text
    assert "mean of these" not in report.overview(report.cells_of(runs[:1]))


def test_verdicts_without_a_baseline_say_so() -> None:
    text = report.verdicts(report.cells_of([run("IQL", 0, 50.0)]))
    assert "DiffusionBC was not run on `a/one-v0`" in text and "and DiffusionBC wherever" not in text


def test_two_settings_of_an_algorithm_are_two_columns() -> None:
    labelled = run("IQL", 0, 50.0)
    labelled["spec"]["label"], labelled["cell"] = "b5", "iql-b5-a-one-v0"
    assert "| IQL | IQL b5 |" in report.overview(report.cells_of([run("IQL", 0, 20.0), labelled]))


def test_the_commit_is_ours_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0 and (ROOT / ".git").exists():
        assert (grid.commit() or "").removesuffix("-dirty") == head.stdout[:12]
    site = tmp_path / "other" / "site-packages" / "diffagents" / "experiments"
    site.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(tmp_path / "other")], check=True)
    monkeypatch.setattr(grid, "__file__", str(site / "grid.py"))
    assert grid.commit() is None


def test_tasks_that_algorithms_share() -> None:
    covered = {"hopper": {"SRPO", "IQL", "BDPO"}, "walker": {"SRPO", "IQL"}, "cheetah": {"IQL", "SRPO"}}
    assert report.shared_tasks(covered) == (["IQL", "SRPO"], ["hopper", "walker", "cheetah"])
    assert report.shared_tasks({}) == ([], [])


# ---- the command and the zoo's scripts -------------------------------------------------------------------------------


def shell(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=settings, timeout=120)


def small_grid(tmp_path: Path, seeds: str = "[0, 1, 2]") -> Path:
    settings = f"settings: {{IQL: {json.dumps(SMALL)}, TD3BC: {json.dumps(SMALL)}}}"
    text = f"episodes: 2\npoint_episodes: 1\npoints: 0\nseeds: {seeds}\n{settings}\n"
    return grid_file(tmp_path, text + f"runs:\n  - {{algorithms: [IQL, TD3BC], datasets: {REACHER}}}\n")


def test_the_command_makes_runs_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_grid(tmp_path, "[0]")
    assert main.main(["bench", str(path), "--root", "out", "--only", "iql"]) == 0
    told = capsys.readouterr()
    assert told.out == f"{Path('out/README.md')}\n" and "iql-reacher-replay-v0-seed0" in told.err and "td3bc" not in told.err
    card = json.loads(next(Path("out").glob("iql*/policy/config.json")).read_text())
    assert "grid.yml" not in json.dumps(card) and not card["provenance"]["commands"]  # nobody asked for the command
    assert "`td3bc-reacher-replay-v0`: seed 0" in Path("out/README.md").read_text()  # not reached
    assert main.main(["bench", str(path), "--root", "out", "--status"]) == 0
    states = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert states == ["done", "waiting"]
    assert main.main(["bench", str(path), "--root", "out", "--only", "nothing"]) == 1
    assert "no run of" in capsys.readouterr().err
    assert main.main(["bench", str(path), "--root", "elsewhere", "--report"]) == 1
    assert "is finished in elsewhere" in capsys.readouterr().err


def test_only_a_grid_of_our_own_is_named_on_cards() -> None:
    assert experiments._public_name(ROOT / "zoo" / "grids" / "zoo.yml") == "zoo/grids/zoo.yml"
    assert experiments._public_name(Path("acme-merger.yml")) is None


def test_a_failed_run_is_the_commands_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"settings: {{IQL: {json.dumps(SMALL)}}}\nepisodes: 2\npoint_episodes: 1\npoints: 0\nruns:\n"
    path = grid_file(tmp_path, text + f"  - {{algorithms: IQL, datasets: [diffagents/nowhere/none-v0, {REACHER}]}}\n")
    assert main.main(["bench", str(path), "--root", "out"]) == 1
    told = capsys.readouterr().err
    assert "--root out --only CELL" in Path("out/README.md").read_text()
    assert "1 of 2 runs failed" in told and "nowhere" in told and "error.txt" in told
    assert Path("out/README.md").exists()  # of what went well


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of zoo/ beside a linked package, so that they write there and not into ours; with six finished runs."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("grids", "tools"):
        (folder / "zoo" / name).mkdir(parents=True)
    for name in ("build.py", "publish.py", "remarks.md"):
        shutil.copyfile(ROOT / "zoo" / "tools" / name, folder / "zoo" / "tools" / name)
    os.symlink(ROOT / "diffagents", folder / "diffagents")
    os.replace(small_grid(folder), folder / "zoo" / "grids" / "zoo.yml")
    os.environ["MINARI_DATASETS_PATH"] = str(SHIPPED)
    for one in grid.read_grid(folder / "zoo" / "grids" / "zoo.yml"):
        grid.run_one(one, folder / ".data" / "zoo")
    return folder


def test_the_zoo_is_built_of_median_seeds(checkout: Path) -> None:
    (checkout / "zoo" / "of-another-grid").mkdir()
    (checkout / "zoo" / "of-another-grid" / "config.json").write_text("{}")
    build = checkout / "zoo" / "tools" / "build.py"
    done = shell([str(build)])  # as a user calls it
    assert done.returncode == 0, done.stderr
    assert not (checkout / "zoo" / "iql-reacher-replay-v0" / "learner.safetensors").exists()  # not of the default --learners
    assert "2 policies" in done.stdout and "left alone without --prune: of-another-grid" in done.stdout
    run_script(build, "--prune", "--learners", "-")
    assert not (checkout / "zoo" / "of-another-grid").exists()
    runs = [json.loads(path.read_text()) for path in (checkout / "zoo" / "results" / "zoo").glob("*.json")]
    assert len(runs) == 6
    for cell, members in report.cells_of(runs).items():
        kept = report.median_run(members)
        agent = diffagents.load(checkout / "zoo" / cell, device="cpu", verbose=0)
        assert agent.seed == kept["spec"]["seed"] and agent.has_training_networks
        card = (checkout / "zoo" / cell / "README.md").read_text()
        assert f'from_pretrained("zoo/{cell}")' in card and f"{kept['last']['mean_return']:.1f}"[:4] in card
    before = (checkout / "zoo" / "README.md").read_text()
    assert "zoo/grids/zoo.yml" in before
    assert "which is left out" in run_script(build, "--max-mb", "0.001")
    agent = diffagents.load(checkout / "zoo" / "iql-reacher-replay-v0", device="cpu", verbose=0)
    assert not agent.has_training_networks and agent.predict(np.zeros(agent.obs_dim, np.float32))[0].shape == (2,)
    run_script(build, "--root", str(checkout / "nowhere"))
    assert (checkout / "zoo" / "README.md").read_text() == before  # of the results that are kept
    shutil.rmtree(checkout / "zoo" / "iql-reacher-replay-v0")
    with pytest.raises(SystemExit, match="iql-reacher-replay-v0"):
        run_script(build, "--root", str(checkout / "nowhere"))


def test_the_zoo_is_published_when_asked_and_only_then(checkout: Path, tmp_path: Path) -> None:
    run_script(checkout / "zoo" / "tools" / "build.py")
    with Hub("lfs", tmp_path / "hub") as hub:
        environment = {**hub.environment(), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        dry = run_script(checkout / "zoo" / "tools" / "publish.py", "org")
        assert "would push iql-reacher-replay-v0 to org/iql-reacher-replay-v0" in dry and "nothing was uploaded" in dry
        assert not hub.repositories
        done = shell([str(checkout / "zoo" / "tools" / "publish.py"), "org", "--upload", "--only", "td3bc"], **environment)
        assert done.returncode == 0, done.stderr
        files = hub.files("org/td3bc-reacher-replay-v0")
        assert {"config.json", "model.safetensors", "README.md", "results.json"} <= set(files)
        assert b'from_pretrained("org/td3bc-reacher-replay-v0")' in files["README.md"]
        (checkout / "zoo" / "iql-reacher-replay-v0" / "model.safetensors").write_bytes(b"broken")
        half = shell([str(checkout / "zoo" / "tools" / "publish.py"), "org", "--upload"], **environment)
        assert half.returncode == 1 and "org/iql-reacher-replay-v0" in half.stderr  # and the other one is there
