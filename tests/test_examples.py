"""The examples at a small budget: what they print and what they leave. One runs as a user runs it, in a process of its own."""

import dataclasses
import pathlib
import re
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from scripts import ROOT, run_script
from toy import line_data

import diffagents


def test_main_example_at_a_small_budget(tmp_path: pathlib.Path) -> None:
    out = run_script("examples/01_train_and_run.py", "--total-timesteps", "90", "--episodes", "2", "--out", str(tmp_path))
    assert re.search(r"data +-19\.\d+ +mean return of its 300 episodes", out)
    assert re.search(r"behaviour cloning +Reacher-v5: return", out) and re.search(r"SRPO +Reacher-v5: return", out)
    assert (tmp_path / "srpo.zip").stat().st_size > 100_000
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_main_example_takes_any_file_and_environment(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same script on arrays in a .npz, with two seeds."""
    pendulum = gymnasium.spec("Pendulum-v1")
    monkeypatch.setitem(gymnasium.registry, "Short-v0", dataclasses.replace(pendulum, id="Short-v0", max_episode_steps=20))
    data = line_data(600, obs_dim=3, act_dim=1)
    np.savez(tmp_path / "mine.npz", **{**data, "actions": 2 * data["actions"]})
    arguments = ["--dataset", str(tmp_path / "mine.npz"), "--env", "Short-v0", "--seeds", "0", "1", "--total-timesteps", "9"]
    out = run_script("examples/01_train_and_run.py", *arguments, "--episodes", "1", "--out", str(tmp_path))
    assert re.search(r"2 seeds, mean ± std over seeds .*\n  data .*behaviour cloning .* ± .*SRPO .* ± ", out)


def test_own_data_example() -> None:
    command = [sys.executable, "examples/02_your_own_data.py", "--episodes", "3", "--total-timesteps", "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SRPO: Pendulum-v1: return" in done.stdout


def test_comparison_of_all_algorithms(tmp_path: pathlib.Path) -> None:
    """Every registered algorithm gets its line; asked again, what is there is not done again."""
    out_file = tmp_path / "compare.json"
    small = [f"{name}.n_support_states=50" for name in ("QGPO", "SfBC")]
    command = ["examples/04_compare.py", "--steps", "12", "--episodes", "1", "--out", str(out_file), "--set", *small]
    table = run_script(*command).split("algorithm ")[-1]
    for name in diffagents.AGENTS:
        assert re.search(rf"^{name} +-?\d+\.\d\d ± +0\.00 +1 +\w+ \d", table, re.MULTILINE), table
    before = out_file.read_text()
    assert run_script(*command).split("algorithm ")[-1] == table and out_file.read_text() == before


# ---- figures on 2-D toys; the gallery makes two of its three by calling 05 and 06 ------------------------------------
def run_gallery(
    figure: str, monkeypatch: pytest.MonkeyPatch, *arguments: str, of_the_other_script: tuple[str, ...] = ()
) -> str:
    """`of_the_other_script`: arguments added to those that the gallery passes on, for a smaller budget."""

    def in_this_process(command: list[str], check: bool) -> None:
        assert command[0] == sys.executable and check
        print(run_script(*command[1:], *of_the_other_script))

    monkeypatch.setattr(subprocess, "run", in_this_process)
    return run_script("examples/07_gallery.py", "--figure", figure, *arguments)


def test_srpo_figure(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run_gallery("srpo", monkeypatch, "--tasks", "8gaussians", "--scale", "0.008", "--out", str(tmp_path))
    distance = [float(x) for x in re.findall(r"1/beta [\d.]+  distance ([\d.]+)", out)]
    assert len(distance) == 11 and distance[-1] < 0.9 * distance[0]
    assert (tmp_path / "srpo.png").read_bytes().startswith(b"\x89PNG")


def test_noisy_circle(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--points", "300", "--samples", "50")
    out = run_gallery("circle", monkeypatch, "--scale", "0.0015", "--out", str(tmp_path), of_the_other_script=small)
    for name in ("AWR", "TD3BC", "DiffusionQL", "SfBC", "DiffusionBC", "DiffCPS"):
        assert re.search(rf"^{name} +on [01]\.\d\d, around [01]\.\d\d, radius", out, re.MULTILINE)
    assert (tmp_path / "circle.png").read_bytes().startswith(b"\x89PNG")


def test_paths_of_bdpo(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--task", "moons", "--diffusion-steps", "6", "--points", "500")
    out = run_gallery("bdpo", monkeypatch, "--scale", "0.0004", "--out", str(tmp_path), of_the_other_script=small)
    assert re.search(r"^target +mean reward 0\.9\d+$|^target +mean reward 1\.0", out, re.MULTILINE), out
    assert (tmp_path / "bdpo.png").read_bytes().startswith(b"\x89PNG")
    again = run_script("examples/06_bdpo_paths.py", *small, "--out", str(tmp_path / "bdpo.png"))
    assert "gradient steps" in out and "gradient steps" not in again  # the agent that lies beside the figure is used again


def test_toy_metric_of_bdpo(tmp_path: pathlib.Path) -> None:
    lengths = ["--behavior-steps", "3", "--train-steps", "3", "--diffusion-steps", "6", "--points", "500"]
    out = run_script("zoo/benchmarks/bdpo_toy.py", *lengths, "--out", str(tmp_path / "t.json"))
    free = float(re.search(r'"free energy of the rewards": ([\d.]+)', out)[1])  # type: ignore[index]
    assert 0.85 < free < 0.9  # eta log mean exp(k / 7 / eta) over eight equal parts, eta 0.06: 0.8811


def test_finetune_online(tmp_path: pathlib.Path) -> None:
    """The shipped set, trained for a moment, then online; then its own result, pulled from the file, without old data."""
    first = ["--offline-steps", "60", "--steps", "60", "--points", "2", "--episodes", "2", "--out", str(tmp_path)]
    out = run_script("examples/03_finetune_online.py", *first)
    assert re.search(r"after 0 env.*after 30 env.*after 60 env.*\noffline -?\d+\.\d\d, fine-tuned -?\d", out, re.DOTALL)
    assert (tmp_path / "finetune.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "finetuned_buffer.safetensors").is_file()
    out = run_script("examples/03_finetune_online.py", "--policy", str(tmp_path / "finetuned.zip"), *first[2:])
    assert "after 120 environment steps" in out
