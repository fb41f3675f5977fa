"""Grids of runs: algorithms x datasets x seeds, out of one YAML file, on one core or on many machines.

    seeds: [0, 1, 2]                # of every block that names none
    episodes: 20                    # of the evaluation of each last policy
    settings:                       # arguments of the classes, wherever they run
      SRPO: {preset: auto, beta: 0.1}
    runs:
      - {algorithms: [SRPO, IQL], datasets: [mujoco/hopper/medium-v0], steps: 100000}
      - {algorithms: [DiffusionQL], datasets: [mujoco/hopper/medium-v0], seeds: [0], settings: {DiffusionQL: {eta: 0.5}}}

Every run has a folder of its own, whose name holds a hash of all that decides its result. A finished run is never made
again, one that was cut goes on where it was (bit for bit on a CPU), and a run that another process is at is left to it: the
same command may be started in several shells, or on several machines with a shared folder.
"""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import diffagents
from diffagents import artifact, provenance
from diffagents.evaluation import Evaluation, d4rl_score, evaluate
from diffagents.knobs import check_choice

if TYPE_CHECKING:
    from diffagents.agent import Agent

RESULTS, PROGRESS, ERROR, CHECKPOINT, POLICY, LOCK = (
    *("results.json", "progress.json", "error.txt", "checkpoint.zip", "policy", ".lock"),
)
SAVE_EVERY = 120.0  # seconds between checkpoints: what a kill can lose
_CARRIED = ("MINARI_DATASETS_PATH", "DIFFAGENTS_CACHE", "MUJOCO_GL", "HF_HOME", "HF_HUB_OFFLINE")  # to a cluster's workers
_TOP = {"seeds", "settings", "runs", "episodes", "points", "point_episodes", "deterministic"}
_BLOCK = _TOP - {"runs"} | {"algorithms", "datasets", "steps", "env"}


class Busy(RuntimeError):
    """Another process is at this run."""


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """One run: everything that decides its result.

    settings: arguments of the algorithm's class, but for the seed. steps: `total_timesteps` of `learn`; None: the `*_steps`
    in the settings. env: where to evaluate; None: the dataset's own. episodes: of the evaluation of the last policy, resets
    seeded 1000, 1001, ... points, point_episodes: how many evaluations on the way, evenly over the stage that makes the policy
    (the last one comes at its end), and their episodes, the first of the same resets.
    """

    algorithm: str
    dataset: str
    seed: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int | None = None
    env: str | None = None
    episodes: int = 20
    points: int = 5
    point_episodes: int = 5
    deterministic: bool = True

    @property
    def cell(self) -> str:
        """Algorithm and dataset, as a name: `srpo-hopper-medium-v0`. Runs of a cell differ in their seeds."""
        data = self.dataset.removeprefix("hf://").removeprefix("diffagents/")
        return re.sub(r"[^-.\w]+", "-", f"{self.algorithm}-{data}").lower()

    @property
    def name(self) -> str:
        """The folder's name."""
        told = json.dumps(dataclasses.asdict(self), sort_keys=True, default=list)
        return f"{self.cell}-seed{self.seed}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def read_grid(path: str | Path) -> list[RunSpec]:
    """The runs of a grid file in the order in which they are to be made: block by block, in each seed by seed.

    Raises FileNotFoundError; ValueError for a file of another shape, an unknown algorithm, knob or value, naming the block.
    """
    import yaml

    try:
        grid = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(grid, dict) or not isinstance(grid.get("runs"), list):
        raise ValueError(f"{path} must be a mapping with a list `runs:` of blocks")
    _only_known(grid, _TOP, str(path))
    specs: dict[str, RunSpec] = {}
    for number, block in enumerate(grid["runs"], start=1):
        where = f"{path}, block {number} of runs"
        if not isinstance(block, dict):
            raise ValueError(f"{where} must be a mapping with `algorithms:` and `datasets:`")
        _only_known(block, _BLOCK, where)
        both = {name: value for name, value in grid.items() if name not in ("runs", "settings")} | block
        algorithms, datasets = (_listed(both, name, str, where) for name in ("algorithms", "datasets"))
        rest = {
            name: value for name, value in both.items() if name in {f.name for f in dataclasses.fields(RunSpec)} - {"settings"}
        }
        for seed in _listed({"seeds": 0, **both}, "seeds", int, where):
            for dataset in datasets:
                for algorithm in algorithms:
                    check_choice(f"algorithms ({where})", algorithm, diffagents.AGENTS)
                    settings = {
                        name: value
                        for table in (grid.get("settings"), block.get("settings"))
                        for name, value in ((table or {}).get(algorithm) or {}).items()
                    }
                    spec = RunSpec(algorithm, dataset, seed, settings, **rest)
                    _check(spec, where)
                    specs.setdefault(spec.name, spec)
    return list(specs.values())


def _only_known(table: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := set(table) - known:
        raise ValueError(f"{where} has {sorted(map(str, unknown))}; it may have {sorted(known)}")


def _listed(block: Mapping[str, Any], name: str, kind: type, where: str) -> list[Any]:
    values = block.get(name)
    found = values if isinstance(values, list) else [values]
    if not found or any(type(value) is not kind for value in found):
        raise ValueError(f"{where} needs {name}, one or a list of {kind.__name__}, not {values!r}")
    return found


def _check(spec: RunSpec, where: str) -> None:
    """Everything that can be wrong without the data."""
    try:
        _new_agent(spec, "cpu")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    for name, least in (("episodes", 1), ("points", 0), ("point_episodes", 1), ("seed", 0), ("steps", 1)):
        value = getattr(spec, name)
        if not (name == "steps" and value is None) and (type(value) is not int or value < least):
            raise ValueError(f"{where}: {name} must be a whole number, at least {least}, not {value!r}")


def _new_agent(spec: RunSpec, device: str) -> "Agent":
    cls = getattr(diffagents, spec.algorithm)
    agent: Agent = cls(env=spec.env, seed=spec.seed, device=device, verbose=0, **spec.settings)
    return agent


# ---- one run ---------------------------------------------------------------------------------------------------------


def run_one(
    spec: RunSpec, root: str | Path, *, device: str = "auto", threads: int | None = None, command: str | None = None
) -> dict[str, Any]:
    """Make one run under `root` unless it is finished, and return what its results.json holds.

    Leaves `<root>/<spec.name>/`: results.json, policy/ (the folder that `push_to_hub` uploads) and checkpoint.zip (to go on
    from). threads: of torch, in this process from now on. command: what the card shows; None: what started this process.
    Raises Busy where another process is at it; what learning and evaluating raise, kept in error.txt.
    """
    folder = Path(root) / spec.name
    if (folder / RESULTS).exists():
        return artifact.read_json(folder, RESULTS)
    if threads is not None:
        torch.set_num_threads(threads)
    with _locked(folder):
        try:
            results = _run(spec, folder, device, command)
        except Exception:
            _write(folder / ERROR, traceback.format_exc())
            raise
        _write(folder / RESULTS, json.dumps(artifact.to_json_safe(results, "results"), indent=1) + "\n")
        for name in (ERROR, PROGRESS):
            (folder / name).unlink(missing_ok=True)
    return artifact.read_json(folder, RESULTS)


def _run(spec: RunSpec, folder: Path, device: str, command: str | None) -> dict[str, Any]:
    from diffagents.datasets import load_dataset

    data = load_dataset(spec.dataset, env=spec.env, verbose=0)
    env = spec.env or data.info.get("env_spec")
    if env is None:
        raise ValueError(f"no environment is stored with {spec.dataset}: give the block of the grid an `env:`")
    checkpoint = folder / CHECKPOINT
    cls, version = getattr(diffagents, spec.algorithm), commit()
    agent: Agent = cls.load(checkpoint, device=device, verbose=0) if checkpoint.exists() else _new_agent(spec, device)
    saved = told = time.monotonic()

    def on_step(local: dict[str, Any], _: dict[str, Any]) -> bool:
        nonlocal saved, told
        plan = agent.plan
        assert plan is not None
        done, length = (counts.get(agent.POLICY_STAGE, 0) for counts in (plan.done, plan.lengths))
        if done and done < length and done in _moments(length, spec.points):
            _note(agent, evaluate_as(spec, agent, env, spec.point_episodes).mean_return)
        now = time.monotonic()
        if now - saved > SAVE_EVERY:
            agent.save(checkpoint)
            saved = now
        if now - told > 2:
            _tell(folder, agent)
            told = now
        return True

    _tell_first(folder)
    try:
        agent.learn(data, None if checkpoint.exists() else spec.steps, on_step, reset_num_timesteps=not checkpoint.exists())
    except KeyboardInterrupt:
        agent.save(checkpoint)
        raise
    agent.save(checkpoint)
    last = evaluate_as(spec, agent, env, spec.episodes)
    if spec.points:  # the last point: the same resets as those before
        _note(agent, float(np.mean(last.returns[: spec.point_episodes])))
    if command is not None:
        agent.provenance["commands"] = [command]
    agent.save_pretrained(folder / POLICY, eval_env=last)
    curve = agent.provenance.get("evaluations", [])
    mean = float(data.info["mean_return"])
    return {
        "name": spec.name,
        "cell": spec.cell,
        "spec": dataclasses.asdict(spec),
        "last": last.to_json(),
        "best": max(curve, key=lambda row: row["mean_return"]) if curve else None,
        "curve": [row | {"score": d4rl_score(last.env_id, [row["mean_return"]])} for row in curve],
        "data": {name: data.info[name] for name in ("id", "sha256", "n_steps", "n_episodes", "mean_return")}
        | {"score": d4rl_score(last.env_id, [mean])},
        "stage_steps": agent.stage_steps,
        "seconds": agent.provenance["seconds"],
        "machine": agent.provenance["machine"],
        "threads": torch.get_num_threads(),
        "versions": {"diffagents": diffagents.__version__, "torch": torch.__version__},
        "commit": version,
    }


def evaluate_as(spec: RunSpec, policy: Any, env: Any, n_episodes: int) -> Evaluation:
    """As every run of a grid is evaluated: resets seeded 1000, 1001, ..., ten environments side by side."""
    return evaluate(policy, env, n_episodes, seed=1000, n_envs=min(n_episodes, 10), deterministic=spec.deterministic)


def _moments(length: int, points: int) -> set[int]:
    return {round(length * k / points) for k in range(1, points + 1)}


def _note(agent: "Agent", mean_return: float) -> None:
    provenance.note_evaluation(agent.provenance, agent.num_timesteps, mean_return)


def commit() -> str | None:
    """The commit of the checkout that this code lies in, marked where it has changes; None where it is installed."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _tell_first(folder: Path) -> None:
    if not (folder / PROGRESS).exists():
        _write(folder / PROGRESS, json.dumps({"step": 0, "total": None, "stage": "starts", "last": None}))


def _tell(folder: Path, agent: "Agent") -> None:
    plan, rows = agent.plan, agent.provenance.get("evaluations")
    assert plan is not None
    stage = next((name for name, length in plan.lengths.items() if plan.done.get(name, 0) < length), "evaluation")
    told = {"step": plan.total - plan.remaining, "total": plan.total, "stage": stage}
    _write(folder / PROGRESS, json.dumps(told | {"last": rows[-1]["mean_return"] if rows else None}))


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@contextmanager
def _locked(folder: Path) -> Any:
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise Busy(f"another process is at {folder.name}") from None
    try:
        yield
    finally:
        lock.release()


def status(spec: RunSpec, root: str | Path) -> dict[str, Any]:
    """How far a run is: {"state": "done" | "failed" | "running" | "cut" | "waiting", ...what is known}."""
    folder = Path(root) / spec.name
    if (folder / RESULTS).exists():
        found = artifact.read_json(folder, RESULTS)
        return {
            "state": "done",
            "last": found["last"]["mean_return"],
            "score": found["last"]["score"],
            "seconds": found["seconds"],
        }
    try:
        told = json.loads((folder / PROGRESS).read_text())
    except (OSError, ValueError):
        told = {}
    if not folder.exists():
        return {"state": "waiting"}
    try:
        with _locked(folder):
            state = "failed" if (folder / ERROR).exists() else "cut" if told else "waiting"
    except Busy:
        state = "running"
    return {"state": state, **told}


# ---- all of them -----------------------------------------------------------------------------------------------------

Done = Callable[[RunSpec, BaseException | None], None]


def run_serially(specs: Sequence[RunSpec], root: str | Path, done: Done, *, device: str, threads: int | None) -> None:
    """One after the other, in this process. `done` is told of each; a failed one stops no other, Ctrl-C all."""
    for spec in specs:
        try:
            run_one(spec, root, device=device, threads=threads)
        except Exception as error:
            done(spec, error)
        else:
            done(spec, None)


def run_with_ray(
    specs: Sequence[RunSpec],
    root: str | Path,
    done: Done,
    *,
    device: str,
    threads: int | None,
    cpus: float = 1,
    gpus: float = 0,
    address: str | None = None,
) -> None:
    """Side by side on all that Ray has: this machine, or the cluster at `address` (then `root` must be a folder all share).

    cpus, gpus: what a run takes, so that gpus=0.25 puts four on a card. A run whose worker dies is started again, and goes
    on from its checkpoint. Raises ImportError without Ray.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
    except ImportError:
        raise ImportError('the Ray executor needs Ray: pip install "diffagents[sweep]"') from None

    carried = {name: os.environ[name] for name in _CARRIED if name in os.environ}
    elsewhere: dict[str, Any] = (
        {"runtime_env": {"env_vars": carried}} if address else {}
    )  # workers started here inherit them anyway
    ray.init(address=address, include_dashboard=False, log_to_driver=False, **elsewhere)
    try:
        remote: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(run_one)
        place, how = str(Path(root).resolve()), {"device": device, "threads": threads, "command": provenance.command_line()}
        running = {remote.remote(spec, place, **how): spec for spec in specs}
        while running:
            ready, _ = ray.wait(list(running), timeout=1.0)
            for reference in ready:
                spec, error = running.pop(reference), None
                try:
                    ray.get(reference)
                except ray.exceptions.RayTaskError as raised:
                    error = raised.cause if isinstance(raised.cause, Exception) else raised
                except ray.exceptions.RayError as raised:
                    error = raised
                done(spec, error)
    finally:
        ray.shutdown()
