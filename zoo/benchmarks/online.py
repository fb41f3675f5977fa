"""Online fine-tuning of an offline policy, compared with SB3's SAC from scratch ("SAC") and with preloaded data ("SAC+data").

  python zoo/benchmarks/online.py run --dataset diffagents/hopper/medium-v0 --algorithm SRPO --seeds 0 1 2
  python zoo/benchmarks/online.py plot

`run` first trains the offline agent unless --inits holds it already (the same seed gives the same agent), evaluates it, then
fine-tunes it with evaluations of the deterministic policy, in the same episodes each time. There is one JSON file per dataset
and algorithm, with one row per seed that contains the command. `plot` draws all of them in one picture and prints a table: the
score at step 0, the largest drop below it, and the score at the end.
"""

import argparse
import json
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import diffagents
from diffagents import evaluate, load_dataset
from diffagents.envs.make import make_env
from diffagents.experiments.grid import commit
from diffagents.training.provenance import command_line

# Offline budgets of minutes on one slow CPU core.
OFFLINE: dict[str, dict[str, Any]] = {
    "SRPO": {
        **{"critic_steps": 30_000, "behavior_steps": 15_000, "policy_steps": 10_000},
        **{"learning_rate": 1e-3, "normalize_obs": True, "weight": "alpha_over_sigma"},
        "policy_kwargs": {"behavior_width": 128},
    },
    "IQL": {"train_steps": 50_000},
    "TD3BC": {"train_steps": 30_000},
    "DiffusionQL": {"train_steps": 20_000},
    "DiffCPS": {"train_steps": 20_000},
    "BDPO": {"behavior_steps": 15_000, "train_steps": 15_000, "n_critics": 2},
}
ROOT = pathlib.Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "plot"])
    parser.add_argument("--dataset", default="diffagents/hopper/medium-v0")
    parser.add_argument("--algorithm", default="SRPO", choices=[*OFFLINE, "SAC", "SAC+data"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=20_000, help="environment steps")
    parser.add_argument("--every", type=int, default=2_000, help="environment steps between evaluations")
    parser.add_argument("--episodes", type=int, default=10, help="episodes per evaluation")
    parser.add_argument("--ratio", default=None, help='offline_ratio: a number, or "uniform"; default: that of the algorithm')
    parser.add_argument(
        "--hyperparameters",
        "--knobs",
        type=json.loads,
        default={},
        help='online hyperparameters as JSON, e.g. {"online_noise": 0.2}',
    )
    parser.add_argument("--label", default="", help="added to the name of the algorithm, for other settings")
    parser.add_argument("--inits", type=pathlib.Path, default=ROOT / ".data" / "online")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "zoo" / "results")
    parser.add_argument("--picture", type=pathlib.Path, default=ROOT / "zoo" / "online.png")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "plot":
        plot(args.out, args.picture)
        return
    if (args.hyperparameters or args.ratio) and not args.label:
        parser.error("other settings than the defaults need a --label of their own")
    version = commit()
    for seed in args.seeds:
        started = time.perf_counter()
        curve = sac(args, seed) if args.algorithm.startswith("SAC") else ours(args, seed)
        keep(args, {"seed": seed, "commit": version, "seconds": round(time.perf_counter() - started, 1), "curve": curve})


def short(dataset: str) -> str:
    """The name of a dataset for files and titles."""
    return dataset.removeprefix("diffagents/").replace("/", "-")


class Curve:
    """Evaluations at regular numbers of environment steps, printed at once."""

    def __init__(self, args: argparse.Namespace, env: Any, name: str) -> None:
        self.args, self.env, self.name, self.rows = args, env, name, []  # type: ignore[var-annotated]

    def log(self, policy: Any, env_steps: int) -> None:
        """Evaluate the policy."""
        n = self.args.episodes
        result = evaluate(policy, self.env, n, seed=1000, n_envs=n, deterministic=True)
        keys = ("mean_return", "std_return", "score", "mean_length", "success_rate")
        self.rows.append({"env_steps": env_steps, **{key: getattr(result, key) for key in keys}})
        print(f"{self.name} at {env_steps:>6,}: {result}", flush=True)

    def every(self, policy: Any, env_steps: Callable[[], int]) -> Callable[[Any, Any], bool]:
        """A callback that evaluates at every --every-th environment step."""

        def on_step(local: Any, outer: Any) -> bool:
            if env_steps() % self.args.every == 0:
                self.log(policy, env_steps())
            return True

        return on_step


def ours(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """The curve of an agent of this library."""
    data = load_dataset(args.dataset)
    kind = getattr(diffagents, args.algorithm)
    init = args.inits / f"{args.algorithm}-{short(args.dataset)}-{seed}.zip"
    if not init.exists():
        init.parent.mkdir(parents=True, exist_ok=True)
        kind(seed=seed, preset="auto", **OFFLINE[args.algorithm]).learn(data).save(init)
    agent = kind.load(init, verbose=1, **args.hyperparameters)
    curve = Curve(args, data.info["env_spec"], f"{args.algorithm} {seed}")
    curve.log(agent, 0)
    ratio = float(args.ratio) if args.ratio not in (None, "uniform") else args.ratio
    agent.learn_online(args.steps, dataset=data, offline_ratio=ratio, callback=curve.every(agent, lambda: agent.n_env_steps))
    return curve.rows


def sac(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """The curve of SB3's SAC."""
    from stable_baselines3 import SAC

    data = load_dataset(args.dataset)
    env = make_env(data.info["env_spec"])
    preload = args.algorithm == "SAC+data"
    policy = "MultiInputPolicy" if data.spec.obs_keys else "MlpPolicy"
    model = SAC(policy, env, seed=seed, buffer_size=len(data) + args.steps, learning_starts=0 if preload else 100, device="cpu")
    if preload:
        if data.spec.obs_keys:
            raise SystemExit("SAC+data is written for flat observations")
        buffer: Any = model.replay_buffer
        n = len(data)
        scaled = data.spec.scale_action(data.action.numpy())
        columns = {"observations": data.obs, "next_observations": data.next_obs, "actions": scaled}
        for name, column in {**columns, "rewards": data.rew, "dones": data.done}.items():
            target = getattr(buffer, name)
            target[:n] = np.asarray(column, np.float32).reshape(n, *target.shape[1:])
        buffer.pos = n
    curve = Curve(args, data.info["env_spec"], f"{args.algorithm} {seed}")
    curve.log(model, 0)
    model.learn(args.steps, callback=curve.every(model, lambda: model.num_timesteps))
    return curve.rows


def keep(args: argparse.Namespace, row: dict[str, Any]) -> None:
    """Store the row in its file, replacing an older one of the same seed."""
    name = f"{args.algorithm}{args.label}"
    path = args.out / f"online-{short(args.dataset)}-{name.lower()}.json"
    row |= {
        "command": command_line(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
    }
    cell = json.loads(path.read_text()) if path.exists() else {"dataset": args.dataset, "algorithm": name, "runs": []}
    cell["runs"] = sorted([run for run in cell["runs"] if run["seed"] != row["seed"]] + [row], key=lambda run: run["seed"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cell, indent=1) + "\n")


def plot(folder: pathlib.Path, picture: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("online-*.json"))]
    datasets = sorted({cell["dataset"] for cell in cells}, key=lambda name: ("hopper" not in name, name))
    figure = Figure(figsize=(5.5 * len(datasets), 4.2), layout="constrained")
    print("| data | algorithm | seeds | at step 0 | largest drop below it | at the end | at the end, by seed |")
    print("|---|---|---|---|---|---|---|")
    for i, dataset in enumerate(datasets):
        axis = figure.add_subplot(1, len(datasets), i + 1)
        unit = "score"
        for cell in (cell for cell in cells if cell["dataset"] == dataset):
            unit = "score" if cell["runs"][0]["curve"][0]["score"] is not None else "success_rate"
            length = min(len(run["curve"]) for run in cell["runs"])
            steps = [row["env_steps"] for row in cell["runs"][0]["curve"][:length]]
            scores = np.array([[row[unit] for row in run["curve"][:length]] for run in cell["runs"]])
            mean, spread = scores.mean(0), scores.std(0)
            (line,) = axis.plot(steps, mean, label=f"{cell['algorithm']} ({len(scores)})")
            axis.fill_between(steps, mean - spread, mean + spread, alpha=0.15, color=line.get_color(), linewidth=0)
            fall = (scores[:, :1] - scores).max()
            ends = ", ".join(f"{score:.1f}" for score in scores[:, -1])
            print(
                f"| {short(dataset)} | {cell['algorithm']} | {len(scores)} | {mean[0]:.1f} ± {spread[0]:.1f} | {fall:.1f} | "
                f"{mean[-1]:.1f} ± {spread[-1]:.1f} | {ends} |"
            )
        axis.set_title(short(dataset))
        axis.set_xlabel("environment steps")
        axis.set_ylabel("D4RL scale" if unit == "score" else "success rate")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
    print(f"\nmean ± standard deviation over seeds; {picture.name} shows the curves")


if __name__ == "__main__":
    main()
