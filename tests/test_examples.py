"""The examples run as a user runs them."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_main_example_at_a_small_budget(tmp_path: pathlib.Path) -> None:
    out = run("examples/01_train_and_run.py", "--total-timesteps", "90", "--episodes", "2", "--out", str(tmp_path))
    assert re.search(r"data +-19\.\d+ +mean return of its 300 episodes", out)
    assert re.search(r"behaviour cloning +Reacher-v5: return", out) and re.search(r"SRPO +Reacher-v5: return", out)
    assert (tmp_path / "srpo.zip").stat().st_size > 100_000
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_main_example_takes_any_file_and_environment(tmp_path: pathlib.Path) -> None:
    """The same script on arrays in a .npz, with two seeds."""
    import numpy as np
    from toy import line_data

    data = line_data(600, obs_dim=3, act_dim=1)
    np.savez(tmp_path / "mine.npz", **{**data, "actions": 2 * data["actions"]})
    arguments = ["--dataset", str(tmp_path / "mine.npz"), "--env", "Pendulum-v1", "--seeds", "0", "1", "--total-timesteps", "9"]
    out = run("examples/01_train_and_run.py", *arguments, "--episodes", "1", "--out", str(tmp_path))
    assert re.search(r"2 seeds, mean ± std over seeds .*\n  data .*behaviour cloning .* ± .*SRPO .* ± ", out)


def test_own_data_example() -> None:
    out = run("examples/02_your_own_data.py", "--episodes", "3", "--total-timesteps", "30")
    assert "SRPO: Pendulum-v1: return" in out
