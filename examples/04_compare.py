"""Every algorithm on one dataset, in one table.

  python examples/04_compare.py --algorithms SRPO IQL DiffusionBC --steps 6000          # minutes
  python examples/04_compare.py --seeds 0 1 --out out/compare.json                      # all of them, hours on two cores
  python examples/04_compare.py --dataset mujoco/hopper/medium-v0 --steps 200000        # any Minari id, .npz or .hdf5

The algorithms are those of the papers (preset=None). Each gets the same number of gradient steps, split over its stages in its
paper's proportion, and plays the same episodes: Gaussian policies act by their mean, diffusion policies by the rule of their
papers. The table shows the LAST policy. Each result is added to --out at once: repeating the command continues an interrupted
comparison.
"""

import argparse
import json
import os
import pathlib
import time
from typing import Any

import numpy as np
import torch

import diffagents

HERE = pathlib.Path(__file__).resolve().parent
SHIPPED = "diffagents/reacher/replay-v0"
# Differences from the defaults, chosen for a CPU and the reward scale of the included dataset; not tuned per seed.
SETTINGS: dict[str, dict[str, Any]] = {
    "SRPO": {"beta": 0.1, "policy_kwargs": {"behavior_width": 128}},
    "DiffusionQL": {"policy_kwargs": {"net_arch": [128, 128]}},
    "DiffCPS": {"policy_kwargs": {"net_arch": [128, 128]}},
    "BDPO": {"n_critics": 2, "n_samples": 4, "learning_rate": 1e-4, "policy_kwargs": {"net_arch": [128, 128]}},
    "QGPO": {"n_support_states": 2000, "policy_kwargs": {"behavior_width": 128, "net_arch": [128, 128]}},
    "SfBC": {"n_support_states": 2000, "policy_kwargs": {"behavior_width": 128}},
    "IDQL": {"policy_kwargs": {"behavior_width": 128}, "batch_size": 256},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=SHIPPED, help="a Minari id, .npz or .hdf5 (default: %(default)s)")
    parser.add_argument("--env", default=None, help="environment id, if the dataset names none")
    parser.add_argument("--algorithms", nargs="+", default=list(diffagents.AGENTS), choices=list(diffagents.AGENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=24_000, help="gradient steps of each run, over all its stages")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--set", nargs="*", default=[], metavar="ALGORITHM.HYPERPARAMETER=VALUE", help="e.g. SRPO.beta=0.05")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/compare.json"))
    args = parser.parse_args()
    if args.dataset == SHIPPED:
        os.environ["MINARI_DATASETS_PATH"] = str(HERE / "data")
    if args.threads:
        torch.set_num_threads(args.threads)

    data = diffagents.load_dataset(args.dataset, env=args.env)
    env = args.env or data.info["env_spec"]
    runs: list[dict[str, Any]] = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    hyperparameters = {name: dict(SETTINGS.get(name, {})) for name in args.algorithms}
    for setting in args.set:
        name, _, rest = setting.partition(".")
        key, _, value = rest.partition("=")
        hyperparameters.setdefault(name, {})[key] = json.loads(value)
    for seed in args.seeds:
        for name in args.algorithms:
            settings = {
                "algorithm": name,
                "seed": seed,
                "steps": args.steps,
                "dataset": data.info["id"],
                "knobs": hyperparameters[name],
            }
            if any(settings.items() <= run.items() for run in runs):
                continue
            agent = getattr(diffagents, name)(seed=seed, preset=None, **hyperparameters[name])
            start = time.perf_counter()
            agent.learn(data, total_timesteps=args.steps)
            seconds = time.perf_counter() - start
            result = diffagents.evaluate(agent, env, args.episodes, n_envs=args.episodes)  # sampled or not as in the papers
            print(f"== {name}, seed {seed}: {result}; {seconds:.0f} s", flush=True)
            runs.append(settings | {"seconds": seconds, "stages": agent.stage_steps, "result": result.to_json()})
            info = {key: data.info[key] for key in ("id", "n_steps", "n_episodes", "mean_return", "sha256")}
            machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
            args.out.write_text(json.dumps({"data": info, "machine": machine, "runs": runs}, indent=1))

    print(f"\n{data.info['id']}: mean return of its {data.info['n_episodes']} episodes {data.info['mean_return']:.2f}")
    print(f"{'algorithm':<12} {'return, mean ± std over seeds':>30}  seeds  {'updates':<40} seconds")
    for name in args.algorithms:
        rows = [
            run
            for run in runs
            if run["algorithm"] == name and run["steps"] == args.steps and run["knobs"] == hyperparameters[name]
        ]
        returns = [run["result"]["mean_return"] for run in rows]
        stages = ", ".join(f"{stage} {steps:,}" for stage, steps in rows[0]["stages"].items())
        mean_seconds = np.mean([run["seconds"] for run in rows])
        print(f"{name:<12} {np.mean(returns):21.2f} ± {np.std(returns):6.2f}  {len(rows):>5}  {stages:<40} {mean_seconds:7.0f}")


if __name__ == "__main__":
    main()
