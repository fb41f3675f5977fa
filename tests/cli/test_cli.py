"""The command `diffagents`, as a shell sees it: what it prints where, and its exit codes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import Hub
from small_agents import NAMES, small
from toy import line_data

import diffagents
from diffagents.cli import main, policies
from diffagents.config.hyperparameters import describe
from diffagents.config.presets import resolve_preset

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "examples" / "data"
REACHER = "diffagents/reacher/replay-v0"
SMALL = "--net-arch 16 16 --batch-size 16 --quiet --device cpu"


def run(command: str, folder: Path, input: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`command` after `diffagents`, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "diffagents", *shlex.split(command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MINARI_DATASETS_PATH": str(SHIPPED), **environment},
        input=input,
        capture_output=True,
        text=True,
        timeout=120,
    )


_ONE_PROCESS = """
import contextlib, io, json, os, shlex, sys
from diffagents.cli.main import main
results = []
for command, changes in json.load(sys.stdin):
    os.environ.update(changes)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(shlex.split(command))
    results.append([code, out.getvalue(), err.getvalue()])
json.dump(results, sys.stdout)
"""


def run_all(commands: list[str | tuple[str, dict[str, str]]], folder: Path, **environment: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of several commands, one after the other in one process: starting one takes seconds.

    A command may come with environment variables, which stay set for those after it.
    """
    given = [(one, {}) if isinstance(one, str) else one for one in commands]
    everything = {**os.environ, "PYTHONPATH": str(ROOT), "MINARI_DATASETS_PATH": str(SHIPPED), **environment}
    command = [sys.executable, "-c", _ONE_PROCESS]
    done = subprocess.run(
        command, cwd=folder, env=everything, input=json.dumps(given), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [(code, out, errors) for code, out, errors in json.loads(done.stdout)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(SHIPPED))
    return tmp_path


@pytest.fixture
def data(here: Path) -> Path:
    """Arrays in a file, of Pendulum's shapes."""
    path = here / "pendulum.npz"
    np.savez(path, **line_data(200, obs_dim=3, act_dim=1))
    return path


@pytest.fixture
def trained(here: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder as `train` leaves it."""
    assert main.main(shlex.split(f"train TD3BC {REACHER} --steps 30 {SMALL} --seed 3")) == 0
    return Path(capsys.readouterr().out.strip())


def test_train_evaluates_on_the_way_where_the_dataset_names_an_environment(here: Path) -> None:
    for asked, points in (("--evaluations 3", 3), ("", 8), ("--evaluations 0", 0)):
        folder = Path("runs") / str(points)
        assert main.main(shlex.split(f"train TD3BC {REACHER} --steps 24 {SMALL} --out {folder} {asked}")) == 0
        steps = [row["num_timesteps"] for row in diffagents.load(folder, verbose=0).provenance.get("evaluations", ())]
        assert not points if not steps else (steps[0], steps[-1]) == (24 // points, 24)  # some in between may be too expensive


def test_an_evaluation_without_an_environment_fails_before_training(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for asked, options in (("--eval", "--eval"), ("--eval --video", "--eval and --video")):
        assert main.main(shlex.split(f"train TD3BC {data} --steps 10 {SMALL} --out x {asked}")) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(
            f"diffagents: error: {options} plays episodes, but no environment is stored with {data}: pass --env"
        )
        assert not Path("x").exists()


def test_train_prints_its_folder_and_nothing_else_to_stdout(here: Path) -> None:
    done = run(f"train TD3BC {REACHER} --steps 30 --net-arch 16 16 --eval --episodes 2 --alpha 3 --record-command", here)
    assert done.returncode == 0, done.stderr
    folder = here / done.stdout.strip()
    assert folder.name == "td3bc-diffagents-reacher-replay-v0-seed0"
    assert "train" in done.stderr and "gradient steps" in done.stderr
    agent = diffagents.load(folder)
    assert type(agent).__name__ == "TD3BC" and agent.config.alpha == 3 and agent.num_timesteps == 30
    results = json.loads((folder / "results.json").read_text())
    assert results["n_eval_episodes"] == 2 and results["env_id"] == "Reacher-v5"
    assert f"\nReacher-v5: return {results['mean_reward']:.2f} ± {results['std_reward']:.2f} (2 episodes; " in done.stderr
    assert f"python -m diffagents train TD3BC {REACHER} --steps 30" in (folder / "README.md").read_text()
    assert "--alpha 3" in (folder / "README.md").read_text()


def test_python_spelling_of_a_knob_and_the_right_types(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--out x --steps 6 {SMALL} --behavior_batch_size 8 --subtract_noise false --q-grad-norm l2 --learning_rate=1e-3"
    assert main.main(shlex.split(f"train SRPO {data} --env Pendulum-v1 {words}")) == 0
    config = diffagents.load("x").config
    assert (config.behavior_batch_size, config.subtract_noise, config.q_grad_norm) == (8, False, "l2")
    assert config.learning_rate == 1e-3


def test_threads_of_train(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Any] = []
    monkeypatch.setattr(diffagents.BC, "learn", lambda self, *_, **__: found.append(self.threads) or sys.exit(3))
    for words in ("", "--threads 2", "--threads auto"):
        with pytest.raises(SystemExit):
            main.main(shlex.split(f"train BC {data} --out x {SMALL} {words}"))
    assert found == ["auto", 2, "auto"]
    assert main.main(shlex.split(f"train BC {data} --out x {SMALL} --threads two")) == 1
    assert 'threads=two must be "auto" or a whole number' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "preset"), [("", "fast"), ("--preset none", None), ("--preset hopper-medium", "hopper-medium")]
)
def test_train_takes_the_fast_preset_unless_told(words: str, preset: str | None, data: Path) -> None:
    """Explicit values win over each of them."""
    given = {"behavior_batch_size": 8, "batch_size": 16, "gamma": 0.9}
    options = " ".join(f"--{name} {value}" for name, value in given.items())
    assert (
        main.main(shlex.split(f"train SRPO {data} --out x --steps 6 --net-arch 16 --quiet --device cpu {options} {words}")) == 0
    )
    agent = diffagents.load("x")
    expected = resolve_preset("SRPO", preset, None)[1] if preset else {}
    arguments = {name: value for name, value in expected.items() if name != "policy_kwargs"}
    assert agent.preset == preset and agent.config == diffagents.SRPO.Config(**{**arguments, **given})
    assert agent.policy_kwargs == {**expected.get("policy_kwargs", {}), "net_arch": [16]}
    assert main.main(shlex.split(f"train SRPO {data} --out x --resume --quiet --preset none")) == 1  # the run has its own


def test_ctrl_c_keeps_what_there_is_and_resume_ends_where_an_uninterrupted_run_does(here: Path) -> None:
    words = f"train TD3BC {REACHER} --net-arch 16 16 --batch-size 16 --device cpu"
    command = [sys.executable, "-m", "diffagents", *shlex.split(f"{words} --steps 1500 --out cut --record-command")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MINARI_DATASETS_PATH": str(SHIPPED)}
    process = subprocess.Popen(command, cwd=here, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "critic_loss" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert 0 < diffagents.load(here / "cut").num_timesteps < 1500
    assert main.main(shlex.split(f"train TD3BC {REACHER} --out cut --quiet --resume --device cpu")) == 0
    assert main.main(shlex.split(f"{words} --steps 1500 --out whole --quiet")) == 0
    for name in ("model.safetensors", "learner.safetensors"):
        assert (here / "cut" / name).read_bytes() == (here / "whole" / name).read_bytes()
    assert "--steps 1500" in (here / "cut" / "README.md").read_text()  # the command that planned the run


def test_save_every_leaves_a_folder_that_can_be_resumed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: object, folder: object, *args: object, **kwargs: object) -> None:
        saved = save(self, folder, *args, **kwargs)  # type: ignore[arg-type]
        raise SystemExit(f"killed after writing {saved}")

    from diffagents.agent import Agent

    save = Agent.save_pretrained
    monkeypatch.setattr(Agent, "save_pretrained", killed)
    with pytest.raises(SystemExit, match="killed after writing out"):
        main.main(shlex.split(f"train TD3BC {REACHER} --out out --steps 50 --save-every 20 {SMALL}"))
    monkeypatch.setattr(Agent, "save_pretrained", save)
    assert diffagents.load("out").num_timesteps == 20
    assert main.main(shlex.split(f"train TD3BC {REACHER} --out out --resume --quiet")) == 0
    assert diffagents.load("out").num_timesteps == 50


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"train TD3BC {REACHER} --out there", "there exists"),
        (f"train TD3BC {REACHER} --out new --alpha high", "alpha='high' must be a number"),
        (f"train TD3BC {REACHER} --out new --resume --alpha 3", "omit hyperparameters"),
        (f"train TD3BC {REACHER} --out new --resume", "no artifact at new"),
        (f"train TD3BC {REACHER} --out new --save-every 0", "--save-every must be at least 1"),
        (f"train TD3BC {REACHER} --out new --tensorboard new/tb", "--tensorboard new/tb lies inside --out new"),
        (f"train TD3BC {REACHER} --out new --tensorboard ./there/../new", "lies inside --out new"),
        (f"train TD3BC {REACHER} --out file/new", "file is no folder"),
        (f"tune TD3BC {REACHER} --out new --storage new/search.log", "--storage new/search.log lies inside --out new"),
        ("train TD3BC nothing.npz --out new", "nothing.npz does not exist"),
        ("eval nowhere", "'nowhere' is neither an existing file or folder nor a Hub id"),
        ("eval there", "is not a diffagents artifact"),
        ("pull nowhere", "'nowhere' is neither an existing file or folder nor a Hub id"),
        (
            "pull me/nothing --offline",
            "me/nothing (no such file or folder here; on the Hub, revision main): it is not in the cache, and no request "
            "is made while offline (",
        ),
        ("eval me/nothing --offline", "no request is made while offline (--offline, local_files_only=True, HF_HUB_OFFLINE)"),
        ("eval zoo/nothing", "there is no policy 'zoo/nothing' of the zoo; here are zoo/"),
        ("push there zoo/mine", "is not a diffagents artifact"),
        ("train TD3BC Hopper-v5 --out new", "'Hopper-v5' is an environment, not a dataset"),
        ("push nowhere me/x", "'nowhere' is neither"),
        ("push there me/x", "is not a diffagents artifact"),
        ("enjoy there", "is not a diffagents artifact"),
    ],
)
def test_what_fails_says_why_in_one_line_and_exits_with_1(
    words: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "there").mkdir()
    (here / "file").touch()
    assert main.main(shlex.split(words)) == 1
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith("diffagents: error: ") and said in errors and errors.count("\n") == 1
    assert not (here / "new").exists()


@pytest.mark.parametrize(
    "error",
    [
        KeyError("step"),
        AttributeError("x\ny"),
        IndexError(),
        OverflowError("too large"),
        AssertionError(),
        RecursionError("deep"),
        MemoryError(),
        ZeroDivisionError("\x1b[2J"),
        EOFError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_unexpected_error_is_one_line_too(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(_: Any) -> None:
        raise error

    monkeypatch.setattr(policies, "agent_class", raises)
    assert main.main(["list"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"diffagents: error: {type(error).__name__}") and said[:-1].isprintable()
    assert said.endswith("; this is a bug or a damaged file; --traceback shows where\n")
    assert main.main(["--traceback", "list"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(policies, "agent_class", interrupted)
    assert main.main(["list"]) == 130 and capsys.readouterr().err == "diffagents: interrupted\n"


@pytest.mark.parametrize(
    "words", ["fly", "train", f"train DQN {REACHER}", f"train SRPO {REACHER} --betta 1", "eval x --episodes y"]
)
def test_what_is_not_understood_exits_with_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(shlex.split(words))
    assert stopped.value.code == 2
    assert "usage: diffagents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train SRPO x.npz --betta 1", "--betta 1; did you mean --beta? `diffagents train SRPO --help` lists all options"),
        ("train SRPO x.npz --batch_sise=3", "--batch-sise=3; did you mean --batch-size? `diffagents train SRPO --help`"),
        ("train BC x.npz --steps 3 --sede 1 --quite", "; did you mean --seed and --quiet? `diffagents train BC --help`"),
        ("train BC x.npz --total-timesteps 9 --n-epochs 9 --lr 1", "; did you mean --steps and --learning-rate? `diffagents"),
        ("eval x --epsodes 2", "--epsodes 2; did you mean --episodes? `diffagents eval --help` lists all options"),
        ("eval x --wings", "--wings; `diffagents eval --help` lists all options"),
        ("--wings", "--wings; see `diffagents --help`"),
    ],
)
def test_a_misspelt_option_gets_the_nearest_one(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(shlex.split(words))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("diffagents: error: unrecognized arguments: ") and said in error


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 2
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("train", "eval", "enjoy", "push", "pull", "list"))


@pytest.mark.parametrize("name", NAMES)
def test_help_of_train_explains_every_hyperparameter(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same description, type, range and default as `help()` shows, from the one declaration."""
    with pytest.raises(SystemExit) as stopped:
        main.main(["train", name, "--help"])
    assert stopped.value.code == 0
    shown = "".join(capsys.readouterr().out.split())  # argparse breaks lines at hyphens too
    for one in describe(getattr(diffagents, name).Config):
        option = f"--{one.name.replace('_', '-')} VALUE {one.description} ({one.summary})"
        assert "".join(option.split()) in shown, option


def test_eval_prints_a_line_or_json_and_reads_the_policy_from_a_pipe(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = diffagents.load(trained)
    expected = agent.evaluate(n_episodes=2, seed=5)
    assert main.main(shlex.split(f"eval {trained} --episodes 2 --seed 5")) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    piped = run("eval - --episodes 2 --seed 5 --json", here, input=f"{trained}\n")
    assert json.loads(piped.stdout)["returns"] == list(expected.returns)
    assert main.main(shlex.split(f"eval {trained} --episodes 1 --env-arg reward_dist_weight=0.0 --json")) == 0
    assert json.loads(capsys.readouterr().out)["mean_return"] > expected.mean_return


@pytest.mark.parametrize("meant", [True, False])
def test_a_policy_acts_as_it_is_meant_to_unless_a_flag_says_otherwise(
    meant: bool, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import diffagents.data.collect as collecting
    import diffagents.evaluation.video as video

    told: list[bool | None] = []
    for module, name in ((video, "record_video"), (collecting, "collect")):
        monkeypatch.setattr(module, name, lambda *_, **settings: told.append(settings["deterministic"]))
    folder = small("DiffusionQL", preset=None, env="Pendulum-v1", deterministic=meant).save_pretrained(here / "policy")
    for flag, asked in (("", None), ("--sampled", False), ("--deterministic", True)):
        assert main.main(shlex.split(f"eval {folder} --env Pendulum-v1 --episodes 1 --json {flag}")) == 0
        how = meant if asked is None else asked
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["deterministic"] is how
        assert main.main(shlex.split(f"enjoy {folder} --env Pendulum-v1 --video a.mp4 {flag}")) == 0
        assert main.main(shlex.split(f"collect {folder} --env Pendulum-v1 --id a/b-v0 {flag}")) == 0
        assert told == [asked, asked]
        told.clear()
    for command in ("eval x", "enjoy x", "collect x --id a/b-v0"):
        with pytest.raises(SystemExit):
            main.main(shlex.split(f"{command} --sampled --deterministic"))
        assert "not allowed with argument" in capsys.readouterr().err


def test_list_in_a_pipe_that_closes(here: Path) -> None:
    command = f"{sys.executable} -m diffagents list; echo code $? >&2"
    done = subprocess.run(["bash", "-c", f"({command}) | head -c 1"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "S"
    assert done.stderr in ("code 141\n", "code 0\n")  # 0 where all fitted into the pipe before it closed


def test_list_shows_algorithms_folders_and_scores(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["list"]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == NAMES
    diffagents.load(trained).save(here / "runs" / "more" / "zipped.zip")
    diffagents.load(trained).save_pretrained(here / "runs" / "more" / "scored", eval_env=True, n_eval_episodes=1)
    (here / "runs" / "other").mkdir()
    (here / "runs" / "other" / "config.json").write_text('{"library": "another"}')
    assert main.main(["list", "runs"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [Path(row[0]).name for row in rows] == ["scored", "zipped.zip", trained.name]
    assert all(row[1:3] == ["TD3BC", REACHER] for row in rows)
    assert rows[0][3].startswith("return -") and rows[2][3] == "not evaluated"


def test_enjoy_writes_a_video_or_wants_a_screen(
    trained: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    if sys.platform == "linux":
        assert main.main(["enjoy", str(trained)]) == 1
        assert "no screen" in capsys.readouterr().err
    if main.main(["enjoy", str(trained), "--video", "reacher.mp4"]) == 1:  # nothing here can render
        assert "MUJOCO_GL" in capsys.readouterr().err
    else:
        assert capsys.readouterr().out == "reacher.mp4\n"
        assert (here / "reacher.mp4").read_bytes()[4:8] == b"ftyp"


def test_a_video_without_ffmpeg_is_no_bug(
    trained: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert main.main(["enjoy", str(trained), "--video", "reacher.mp4"]) == 1
    said = capsys.readouterr().err
    assert "pip install moviepy imageio-ffmpeg" in said and "bug" not in said and not (here / "reacher.mp4").exists()


def test_push_pull_list_and_eval_by_a_hub_id(trained: Path, here: Path) -> None:
    with Hub(mode="lfs", folder=here / "cas") as hub:
        pushed, evaluated, pulled, again, listed, offline, nobody = run_all(
            [
                f"push {trained} tester/td3bc-reacher --message hello --license apache-2.0",
                f"push {trained} tester/scored --eval --episodes 1 --private",
                "pull tester/td3bc-reacher --to copy",
                "pull tester/td3bc-reacher --to copy",
                "list tester",
                "eval tester/td3bc-reacher --episodes 1 --offline",
                (f"push {trained} tester/new", {"HF_TOKEN": "hf_wrong"}),
            ],
            here,
            **{**hub.environment(), "HF_HOME": str(here / "home")},
        )
        assert pushed[0] == 0, pushed
        assert pushed[1].startswith(hub.url) and "/commit/" in pushed[1]
        card = hub.files("tester/td3bc-reacher")["README.md"].decode()
        assert 'TD3BC.from_pretrained("tester/td3bc-reacher")' in card
        assert "publishing to tester/td3bc-reacher: config.json, model.safetensors" in pushed[2]
        assert "environment: Reacher-v5" in pushed[2]
        assert evaluated[0] == 0, evaluated
        assert "publishing to tester/scored: " in evaluated[2] and evaluated[1].count("\n") == 1
        assert "results.json" in hub.files("tester/scored") and hub.repository("tester/scored").private
        assert pulled[:2] == (0, "copy\n")
        for name in ("model.safetensors", "learner.safetensors"):
            assert (here / "copy" / name).read_bytes() == (trained / name).read_bytes()
        assert again[0] == 1
        assert "tester/td3bc-reacher\tTD3BC\tReacher-v5" in listed[1].splitlines()
        assert offline[1].startswith("Reacher-v5: return"), offline
        code, _, errors = nobody
        assert code == 1 and "hf auth login" in errors and errors.count("\n") == 1


def test_arguments_of_the_environment_reach_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"eval {trained} --episodes 1 --device cpu --json"
    assert main.main(shlex.split(f"{words} --env-arg max_episode_steps=7 --env-arg render_mode=none")) == 0
    assert json.loads(capsys.readouterr().out)["mean_length"] == 7


def test_collect_makes_a_dataset_that_train_takes(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"collect {trained} --id me/reacher/td3bc-v0 --steps 120 --root {here / 'sets'} --noise gaussian:0.1 --device cpu"
    assert main.main(shlex.split(words)) == 0
    told = capsys.readouterr()
    assert told.out == "me/reacher/td3bc-v0\n" and "120 steps" in told.err
    os.environ["MINARI_DATASETS_PATH"] = str(here / "sets")  # put back by the fixture
    data = diffagents.load_dataset("me/reacher/td3bc-v0", verbose=0)
    assert len(data) == 120 and "gaussian:0.1" in data.info["made"]["description"]
    assert main.main(shlex.split(words)) == 1
    assert "me/reacher/td3bc-v0" in capsys.readouterr().err  # it exists


def test_select_prints_the_best_for_a_pipe_and_the_table_beside_it(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = here / "other"
    assert main.main(shlex.split(f"train DiffusionBC {REACHER} --steps 20 {SMALL} --out {other}")) == 0
    capsys.readouterr()
    words = f"select {trained} {other} --dataset {REACHER} --fqe-steps 30 --max-transitions 300 --n-seeds 1 --device cpu"
    assert main.main(shlex.split(words)) == 0
    told = capsys.readouterr()
    assert told.out.strip() in (str(trained), str(other)) and "0 environment episodes used" in told.err
    assert main.main(shlex.split(f"{words} --json --episodes 2 --top 1")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_env_episodes"] == 2 and sorted(found["order"]) == sorted([str(trained), str(other)])
    assert main.main(shlex.split(f"select {trained} {here / 'nothing'} --dataset {REACHER}")) == 1


def test_tune_leaves_the_best_policy(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    words = f"tune TD3BC {REACHER} --steps 20 --trials 2 --objective return --episodes 1 --out {here / 'best'} --device cpu"
    assert main.main(shlex.split(words)) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(here / "best") and "2 environment episodes" in told.err
    assert type(diffagents.load(here / "best", verbose=0)).__name__ == "TD3BC"
    assert main.main(shlex.split(words)) == 1
    assert "exists" in capsys.readouterr().err


def test_the_old_name_of_an_option_of_tune_still_works_and_warns(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    words = f"tune TD3BC {REACHER} --steps 20 --trials 1 --objective return --episodes 1 --device cpu --low 1 --high 3"
    with warnings.catch_warnings():
        assert main.main(shlex.split(f"{words} --knob alpha --out {here / 'old'}")) == 0
        assert capsys.readouterr().err.count("`knob` is now called `hyperparameter`") == 1
        assert main.main(shlex.split(f"{words} --hyperparameter alpha --out {here / 'new'}")) == 0
        assert "`knob`" not in capsys.readouterr().err


def test_the_command_is_installed() -> None:
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"diffagents": "diffagents.cli.main:main"}


def test_importing_the_command_is_quick() -> None:
    """--help and --version must not wait for torch."""
    code = "import sys, diffagents.cli.main; print('torch' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
    assert time.perf_counter() - start < 30


def test_a_small_agent_of_every_class_can_be_listed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        small(name, env="Pendulum-v1").save_pretrained(here / "zoo" / name)
    assert main.main(["list", "zoo"]) == 0
    assert sorted(line.split("\t")[1] for line in capsys.readouterr().out.splitlines()) == sorted(NAMES)
