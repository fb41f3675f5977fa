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


def test_comparison_of_all_algorithms(tmp_path: pathlib.Path) -> None:
    """Every registered algorithm gets its line; asked again, what is there is not done again."""
    import diffagents

    out_file = tmp_path / "compare.json"
    small = [f"{name}.n_support_states=50" for name in ("QGPO", "SfBC")]
    command = ["examples/04_compare.py", "--steps", "12", "--episodes", "1", "--out", str(out_file), "--set", *small]
    table = run(*command).split("algorithm ")[-1]
    for name in diffagents.AGENTS:
        assert re.search(rf"^{name} +-?\d+\.\d\d ± +0\.00 +1 +\w+ \d", table, re.MULTILINE), table
    before = out_file.read_text()
    assert run(*command).split("algorithm ")[-1] == table and out_file.read_text() == before


def test_noisy_circle(tmp_path: pathlib.Path) -> None:
    arguments = ["--steps", "9", "--points", "300", "--samples", "50", "--out", str(tmp_path / "c.png")]
    out = run("examples/05_noisy_circle.py", *arguments)
    for name in ("AWR", "TD3BC", "DiffusionQL", "SfBC", "DiffusionBC", "DiffCPS"):
        assert re.search(rf"^{name} +on [01]\.\d\d, around [01]\.\d\d, radius", out, re.MULTILINE)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_paths_of_bdpo(tmp_path: pathlib.Path) -> None:
    lengths = ["--behavior-steps", "3", "--train-steps", "3", "--diffusion-steps", "6", "--points", "500"]
    command = ["examples/06_bdpo_paths.py", "--task", "moons", *lengths, "--out", str(tmp_path / "b.png")]
    out = run(*command)
    assert re.search(r"^target +mean reward 0\.9\d+$|^target +mean reward 1\.0", out, re.MULTILINE), out
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert run(*command).count("gradient steps") == 0  # the kept agent is used again


def test_toy_metric_of_bdpo(tmp_path: pathlib.Path) -> None:
    lengths = ["--behavior-steps", "3", "--train-steps", "3", "--diffusion-steps", "6", "--points", "500"]
    out = run("zoo/benchmarks/bdpo_toy.py", *lengths, "--out", str(tmp_path / "t.json"))
    free = float(re.search(r'"free energy of the rewards": ([\d.]+)', out)[1])  # type: ignore[index]
    assert 0.85 < free < 0.9  # eta log mean exp(k / 7 / eta) over eight equal parts, eta 0.06: 0.8811


def test_finetune_online(tmp_path: pathlib.Path) -> None:
    """The shipped set, trained for a moment, then online; then its own result, pulled from the file, without old data."""
    first = ["--offline-steps", "60", "--steps", "60", "--points", "2", "--episodes", "2", "--out", str(tmp_path)]
    out = run("examples/03_finetune_online.py", *first)
    assert re.search(r"after 0 env.*after 30 env.*after 60 env.*\noffline -?\d+\.\d\d, fine-tuned -?\d", out, re.DOTALL)
    assert (tmp_path / "finetune.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "finetuned_buffer.safetensors").is_file()
    out = run("examples/03_finetune_online.py", "--policy", str(tmp_path / "finetuned.zip"), *first[2:])
    assert "after 120 environment steps" in out
