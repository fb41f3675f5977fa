"""Grids of runs: algorithms x datasets x seeds from one YAML file, on one core or on many machines.

    seeds: [0, 1, 2]                # of every block without its own
    episodes: 20                    # in the evaluation of each last policy
    settings:                       # arguments of the classes, for all blocks
      SRPO: {preset: auto, beta: 0.1}
    runs:
      - {algorithms: [SRPO, IQL], datasets: [mujoco/hopper/medium-v0], steps: 100000}
      - {algorithms: [DiffusionQL], datasets: [mujoco/hopper/medium-v0], seeds: [0], settings: {DiffusionQL: {eta: 0.5}}}

Without `preset:` in its settings an algorithm takes the default one, "fast"; `preset: null` is the paper's algorithm. If one
algorithm runs on one dataset with two settings, a `label:` of the blocks distinguishes them. Each run has a folder of
its own, whose name contains a hash of everything that the file says about the run (of the dataset only its name). A finished
run is not repeated, an interrupted run resumes from its checkpoint (bit for bit on a CPU), and a run that another process is
working on is skipped: the same command may be started in several shells, or on several machines that share a folder.
"""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch

from diffagents.config.checks import check_choice
from diffagents.errors import ArtifactError, one_line, printable, short
from diffagents.evaluation.d4rl import d4rl_score_of_mean
from diffagents.evaluation.evaluate import Evaluation, evaluate
from diffagents.files import replacing
from diffagents.registry import AGENTS, agent_class
from diffagents.storage import artifact
from diffagents.training import provenance
from diffagents.version import __version__

if TYPE_CHECKING:
    from diffagents.agent import Agent

RESULTS, PROGRESS, ERROR = "results.json", "progress.json", "error.txt"
CHECKPOINT, POLICY, LOCK = "checkpoint.zip", "policy", ".lock"
SAVE_EVERY = 60.0  # seconds between checkpoints, the most that a kill or Ctrl-C can lose
_MOST_BYTES, _MOST_VALUES, _MOST_LEVELS, _MOST_RUNS = 256 << 10, 100_000, 100, 10_000
"""Bounds of a grid file: its size, its values and their nesting with aliases and merge keys written out, its runs."""
_DATA_FILES = (".npz", ".hdf5", ".h5")
_TOP = {"seeds", "settings", "runs", "episodes", "points", "point_episodes", "deterministic"}
_BLOCK = _TOP - {"runs"} | {"algorithms", "datasets", "steps", "env", "label"}


class Busy(RuntimeError):
    """Another process is working on this run."""


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """One run: everything that determines its result.

    Attributes:
        algorithm: name of the algorithm.
        dataset: anything that `load_dataset` reads, by name.
        seed: seed of the agent.
        settings: arguments of the algorithm's class, except the seed.
        steps: `total_timesteps` of `learn`. Default: the `*_steps` in the settings.
        env: id of the environment for evaluations. Default: the environment of the dataset.
        episodes: episodes in the evaluation of the last policy, with resets seeded 1000, 1001, ...
        points: number of evaluations, evenly spaced over the stage that makes the policy; the last of them is the evaluation of
            the last policy.
        point_episodes: episodes of each evaluation before the last, the first of the same resets.
        deterministic: whether the policy acts deterministically in evaluations. Default: as it is meant to act.
        label: distinguishes two settings of one algorithm on one dataset.
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
    deterministic: bool | None = None
    label: str = ""

    @property
    def cell(self) -> str:
        """Algorithm, label and dataset as a name, `srpo-hopper-medium-v0`. Runs of a cell differ only in their seeds."""
        data = self.dataset.removeprefix("hf://").removeprefix("diffagents/")
        if data.lower().endswith(_DATA_FILES) or "\\" in data or data.startswith(("/", "~", ".")):
            data = PureWindowsPath(data).stem  # it knows both separators; names are shown and published, folders are private
        return re.sub(r"[^-.\w]+", "-", "-".join(filter(None, (self.algorithm, self.label, data)))).lower()

    @property
    def name(self) -> str:
        """Name of the run's folder: cell, seed and a hash of all fields."""
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key != "label" or value}
        # Runs keep the names that they had while the default was true.
        fields["deterministic"] = {None: True, True: "always", False: False}[self.deterministic]
        text = json.dumps(fields, sort_keys=True, default=list)
        return f"{self.cell}-seed{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def read_grid(path: str | Path) -> list[RunSpec]:
    """Read the runs of a grid file.

    Args:
        path: a YAML file in the form shown at the top of this module.

    Returns:
        The runs in the order in which they are made: block by block, and seed by seed within a block.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has another form, or names an unknown algorithm, hyperparameter or value; names the block.
    """
    grid = _read_yaml(path)
    if not isinstance(grid, dict) or not isinstance(grid.get("runs"), list):
        raise ValueError(f"{path} must be a mapping with a list `runs:` of blocks")
    _only_known(grid, _TOP, str(path))
    specs: dict[str, RunSpec] = {}
    cells: dict[str, tuple[RunSpec, str]] = {}
    n_runs = 0
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
        seeds = _listed({"seeds": 0, **both}, "seeds", int, where)
        n_runs += len(seeds) * len(datasets) * len(algorithms)
        if n_runs > _MOST_RUNS:
            raise ValueError(f"{where}: the grid has more than {_MOST_RUNS:,} runs; split it into several files")
        for seed in seeds:
            for dataset in datasets:
                for algorithm in algorithms:
                    check_choice(f"algorithms ({where})", algorithm, AGENTS)
                    settings = _settings(algorithm, grid.get("settings"), str(path)) | _settings(
                        algorithm, block.get("settings"), where
                    )
                    spec = RunSpec(algorithm, dataset, seed, settings, **rest)
                    _check(spec, where)
                    first, first_place = cells.setdefault(spec.cell, (spec, where))
                    if dataclasses.replace(first, seed=seed) != spec:
                        raise ValueError(
                            f"{where} and {first_place} both define {spec.cell}, with different settings: give one a `label:`"
                        )
                    specs.setdefault(spec.name, spec)
    return list(specs.values())


def _read_yaml(path: str | Path) -> Any:
    """The content of a YAML file, which is measured before anything is constructed: a few lines can stand for gigabytes."""
    import yaml

    with Path(path).expanduser().open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path} is larger than {_MOST_BYTES >> 10} KB, which no grid needs: split it into several files")
    try:
        loader = yaml.SafeLoader(data.decode("utf-8"))
        try:
            node = loader.get_single_node()
            problem = None if node is None else _too_much(node)
            if problem is not None:
                raise ValueError(f"{path} {problem}")
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not YAML: it is no text in UTF-8") from None
    except (yaml.YAMLError, KeyError, AttributeError, IndexError, TypeError, OverflowError) as error:  # of odd tags too
        raise ValueError(f"{path} is not YAML: {printable(one_line(error))}") from None


def _too_much(root: Any) -> str | None:
    """What is wrong with the size of a YAML tree in which whatever aliases and merge keys (`<<`) repeat is written out."""
    sizes: dict[int, tuple[int, int]] = {}  # by id of a node: values, levels; (0, 0) while its parts are being counted
    waiting = [(root, False)]
    while waiting:
        node, counted = waiting.pop()
        pairs = isinstance(node.value, list)
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))] if pairs else []
        if counted:
            inner = [sizes[id(part)] for part in parts]
            sizes[id(node)] = 1 + sum(n for n, _ in inner), 1 + max((level for _, level in inner), default=0)
            if sizes[id(node)][0] > _MOST_VALUES:
                return f"has more than {_MOST_VALUES:,} values once its aliases are written out"
            if sizes[id(node)][1] > _MOST_LEVELS:
                return "is nested too deeply"
        elif id(node) not in sizes:
            sizes[id(node)] = 0, 0
            waiting += [(node, True), *((part, False) for part in parts)]
        elif sizes[id(node)] == (0, 0):
            return "has an alias that contains itself"
    return None


def imports(specs: Iterable[RunSpec]) -> list[str]:
    """The modules that making the runs will import, because the id of an environment begins with them, as in `module:Id-v0`."""
    return sorted({spec.env.partition(":")[0] for spec in specs if spec.env is not None and ":" in spec.env})


def _only_known(table: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := set(table) - known:
        raise ValueError(f"{where} has the unknown keys {sorted(map(str, unknown))}; valid are {sorted(known)}")


def _settings(algorithm: str, table: Any, where: str) -> dict[str, Any]:
    """The settings of one algorithm; 3 becomes 3.0 for a float, so that both spellings are one setting."""
    if table is None:
        return {}
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise ValueError(f"{where}: settings must be a mapping of an algorithm to a mapping of its arguments")
    _only_known(table, set(AGENTS), f"{where}, settings")
    defaults = {field.name: field.default for field in dataclasses.fields(_class(algorithm).Config)}
    return {
        name: float(value) if type(value) is int and abs(value) < 10**300 and isinstance(defaults.get(name), float) else value
        for name, value in table.get(algorithm, {}).items()
    }


def _listed(block: Mapping[str, Any], name: str, kind: type, where: str) -> list[Any]:
    """An entry of a block that may be a single value or a list."""
    entry = block.get(name)
    values = entry if isinstance(entry, list) else [entry]
    if not values or any(type(value) is not kind for value in values):
        raise ValueError(f"{where} needs {name}, a {kind.__name__} or a list of them, not {short(repr(entry))}")
    return values


def _check(spec: RunSpec, where: str) -> None:
    """Check what can be checked without the data, importing nothing that the file names and building no environment or network.

    A grid is also read to be looked at, and both may take long or much memory. The run itself checks them first.
    """
    if not isinstance(spec.env, str | None):
        raise ValueError(f"{where}: env has an invalid value: {short(repr(spec.env))}")
    try:
        _new_agent(dataclasses.replace(spec, env=None), "cpu")
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from None
    for name, least in (("episodes", 1), ("points", 0), ("point_episodes", 1), ("seed", 0), ("steps", 1)):
        value = getattr(spec, name)
        if not (name == "steps" and value is None) and (type(value) is not int or value < least):
            raise ValueError(f"{where}: {name} must be a whole number of at least {least}, not {value!r}")
    if spec.points > 1 and spec.point_episodes > spec.episodes:  # with fewer points the last evaluation is the only one
        raise ValueError(f"{where}: point_episodes={spec.point_episodes} must not exceed episodes={spec.episodes}")
    for name, kind in (("deterministic", bool | None), ("label", str)):
        if not isinstance(getattr(spec, name), kind):
            raise ValueError(f"{where}: {name} has an invalid value: {short(repr(getattr(spec, name)))}")


def _class(algorithm: str) -> Any:
    """The class of an algorithm, as Any: constructor arguments come from a file."""
    return agent_class(algorithm)


def _new_agent(spec: RunSpec, device: str) -> "Agent":
    cls = _class(spec.algorithm)
    agent: Agent = cls(env=spec.env, seed=spec.seed, device=device, verbose=0, **spec.settings)
    return agent


def _resumed(spec: RunSpec, checkpoint: Path, device: str) -> "Agent":
    """The agent of a run that was interrupted, meant to act as a new one: checkpoints of earlier versions do not say how."""
    agent: Agent = _class(spec.algorithm).load(checkpoint, device=device, verbose=0)
    meant = _new_agent(dataclasses.replace(spec, env=None), "cpu").acts_deterministically
    if agent.acts_deterministically != meant:
        agent.config = dataclasses.replace(agent.config, deterministic=meant)
    return agent


# ---- one run ---------------------------------------------------------------------------------------------------------


def run_one(
    spec: RunSpec, root: str | Path, *, device: str = "auto", threads: int | None = None, command: str | None = None
) -> dict[str, Any]:
    """Train, evaluate and save one run, unless it is finished.

    Writes `<root>/<spec.name>/`: results.json, policy/ (the folder that `push_to_hub` uploads) and checkpoint.zip (from which
    an interrupted run resumes).

    Args:
        spec: the run.
        root: folder of all runs.
        device: where to train: "auto", "cpu", "cuda", ...
        threads: threads of torch, set for the whole process. Default: unchanged.
        command: the command shown on the policy's card. Default: none.

    Returns:
        The content of results.json.

    Raises:
        Busy: if another process is working on the run.
        Exception: whatever training or evaluation raises; its traceback is written to error.txt.
    """
    folder = Path(root).expanduser() / spec.name
    if (folder / RESULTS).exists():
        return artifact.read_json(folder, RESULTS)
    if threads is not None:
        torch.set_num_threads(threads)
    with _locked(folder, timeout=5.0):  # `status` holds the lock only for a moment
        if (folder / RESULTS).exists():
            return artifact.read_json(folder, RESULTS)
        (folder / ERROR).unlink(missing_ok=True)
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
    from diffagents.data.load import load_dataset

    checkpoint, version = folder / CHECKPOINT, commit()
    agent = _resumed(spec, checkpoint, device) if checkpoint.exists() else _new_agent(spec, device)
    data = load_dataset(spec.dataset, env=spec.env, obs_keys=agent.obs_keys, verbose=0)
    if agent.dataset_info is not None and agent.dataset_info["sha256"] != data.info["sha256"]:
        raise ValueError(f"{spec.dataset} is not the dataset of {checkpoint}: delete that file to start again")
    env = spec.env or data.info.get("env_spec")
    if env is None:
        raise ValueError(f"no environment is stored with {spec.dataset}: add `env:` to the block of the grid")
    seconds, started = float(agent.provenance.get("seconds", 0.0)), time.perf_counter()
    saved = reported = time.monotonic()

    def save() -> None:
        agent.provenance["seconds"] = seconds + time.perf_counter() - started  # of this session and earlier ones
        agent.save(checkpoint)

    def on_step(local: dict[str, Any], _: dict[str, Any]) -> bool:
        nonlocal saved, reported
        plan = agent.plan
        assert plan is not None
        done, length = (counts.get(agent.POLICY_STAGE, 0) for counts in (plan.done, plan.lengths))
        if done and done < length and done in _evaluation_steps(length, spec.points):
            _note(agent, evaluate_as(spec, agent, env, spec.point_episodes).mean_return)
        now = time.monotonic()
        if now - saved > SAVE_EVERY:
            save()
            saved = now
        if now - reported > 2:
            _report_progress(folder, agent)
            reported = now
        return True

    _report_start(folder)
    # No checkpoint on Ctrl-C: it may come in the middle of an update.
    agent.learn(data, None if checkpoint.exists() else spec.steps, on_step, reset_num_timesteps=not checkpoint.exists())
    save()
    last = evaluate_as(spec, agent, env, spec.episodes)
    if spec.points:
        _note(agent, last.mean_return)
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
        "curve": [row | {"score": d4rl_score_of_mean(last.env_id, row["mean_return"])} for row in curve],
        "data": {name: data.info[name] for name in ("id", "sha256", "n_steps", "n_episodes", "mean_return")}
        | {"score": d4rl_score_of_mean(last.env_id, mean)},
        "stage_steps": agent.stage_steps,
        "seconds": agent.provenance["seconds"],
        "machine": agent.provenance["machine"],
        "threads": torch.get_num_threads(),
        "versions": {"diffagents": __version__, "torch": torch.__version__},
        "commit": version,
    }


def evaluate_as(spec: RunSpec, policy: Any, env: Any, n_episodes: int) -> Evaluation:
    """Evaluate a policy like every run of a grid: resets seeded 1000, 1001, ..., up to ten environments in parallel.

    Args:
        spec: the run; it decides whether the policy acts deterministically, unless that is left to the policy.
        policy: an agent, or any object with SB3's `predict`.
        env: environment, or its id.
        n_episodes: number of episodes.
    """
    return evaluate(policy, env, n_episodes, seed=1000, n_envs=min(n_episodes, 10), deterministic=spec.deterministic)


def _evaluation_steps(length: int, points: int) -> set[int]:
    """`points` steps evenly spaced over a stage of `length` steps, its last one included."""
    return {round(length * k / points) for k in range(1, points + 1)}


def _note(agent: "Agent", mean_return: float) -> None:
    provenance.note_evaluation(agent.provenance, agent.num_timesteps, mean_return)


def commit() -> str | None:
    """The commit of the checkout that contains this code, with "-dirty" if files were changed; None if it is installed."""
    here = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=here, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here:
            return None  # installed inside another project's checkout
        return git("describe", "--always", "--abbrev=12", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _report_start(folder: Path) -> None:
    """Write the first progress.json of a run."""
    if not (folder / PROGRESS).exists():
        _write(folder / PROGRESS, json.dumps({"step": 0, "total": None, "stage": "starting", "last": None}))


def _report_progress(folder: Path, agent: "Agent") -> None:
    """Write progress.json, which `status` reads."""
    plan, rows = agent.plan, agent.provenance.get("evaluations")
    assert plan is not None
    stage = next((name for name, length in plan.lengths.items() if plan.done.get(name, 0) < length), "evaluation")
    progress = {"step": plan.total - plan.remaining, "total": plan.total, "stage": stage}
    _write(folder / PROGRESS, json.dumps(progress | {"last": rows[-1]["mean_return"] if rows else None}))


def _write(path: Path, text: str) -> None:
    """Write a file atomically."""
    with replacing(path, path.name) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def _locked(folder: Path, timeout: float = 0.0) -> Any:
    """Hold the lock of a run. Raises Busy if another process holds it after `timeout` seconds."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise Busy(f"another process is working on {folder.name}") from None
    try:
        yield
    finally:
        lock.release()


def status(spec: RunSpec, root: str | Path) -> dict[str, Any]:
    """The progress of a run.

    Args:
        spec: the run.
        root: folder of all runs.

    Returns:
        "state": "done", "failed", "running", "interrupted", "waiting", or "unreadable" if one of its files is damaged or cannot
        be opened; and, as far as they are known, "step", "total", "stage", "last" (the newest mean return), "score" (the same
        on the D4RL scale) and "seconds".
    """
    folder = Path(root).expanduser() / spec.name
    if not folder.exists():
        return {"state": "waiting"}
    try:
        if os.path.lexists(folder / RESULTS):
            return {"state": "done", **_finished(artifact.read_json(folder, RESULTS))}
        progress = _progress(folder)
        try:
            with _locked(folder):
                state = "failed" if (folder / ERROR).exists() else "interrupted" if progress else "waiting"
        except Busy:
            state = "running"
    except (OSError, ValueError, TypeError, KeyError):
        return {"state": "unreadable"}
    return {"state": state, **progress}


def _finished(results: Mapping[str, Any]) -> dict[str, Any]:
    """What `status` says of a results.json. Raises KeyError, TypeError or ValueError for another form."""
    last, seconds = results["last"], _number(results["seconds"])
    score = None if last["score"] is None else _number(last["score"])
    return {"last": _number(last["mean_return"]), "score": score, "seconds": seconds}


def _progress(folder: Path) -> dict[str, Any]:
    """The content of progress.json, empty if there is none. Raises KeyError, TypeError or ValueError for another form."""
    try:
        found = artifact.read_json(folder, PROGRESS)
    except ArtifactError:
        if os.path.lexists(folder / PROGRESS):
            raise
        return {}
    total, last = found["total"], found.get("last")
    return {
        "step": _number(found["step"]),
        "total": None if total is None else _number(total),
        "stage": short(found["stage"]),
        "last": None if last is None else _number(last),
    }


def _number(value: Any) -> float:
    """A number from a file. Raises TypeError or ValueError for anything else, or one that no run can reach."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{short(value)} is no number")
    if not abs(value) < 1e15:
        raise ValueError(f"{short(value)} is no number of a run")
    return value
