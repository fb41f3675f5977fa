"""Compare SRPO with its own behaviour cloning and the data: learning curves over seeds and betas, stored with the command.

  python zoo/benchmarks/learning.py --dataset diffagents/halfcheetah/medium-v0 --seeds 0 1 2 --betas 0.05 0.2 --out results.json

For each seed, critic and behaviour model are trained once; each beta then extracts a policy from them, which is evaluated
`--points` times during training, in the same episodes each time. The result, printed at the end, is the mean and standard
deviation over seeds of the mean return of the LAST policy; the JSON file has the whole curves. Critic and behaviour model are
stored next to --out and reused by the same command.
"""

import argparse
import json
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch

from diffagents import SRPO, evaluate, load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a Minari id, .npz or .hdf5")
    parser.add_argument("--env", help="environment id, if the dataset names none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.05])
    parser.add_argument("--critic-steps", type=int, default=20_000)
    parser.add_argument("--behavior-steps", type=int, default=8_000)
    parser.add_argument("--policy-steps", type=int, default=8_000)
    parser.add_argument("--behavior-batch-size", type=int, default=256)
    parser.add_argument("--behavior-width", type=int, default=256)
    parser.add_argument("--reward-transform", default="auto")
    parser.add_argument("--points", type=int, default=4, help="evaluations along the policy stage")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/learning.json"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    data = load_dataset(args.dataset, env=args.env)
    env = args.env or data.info["env_spec"]
    result: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "data": {key: data.info[key] for key in ("id", "n_steps", "n_episodes", "mean_return", "std_return", "sha256")},
        "runs": [],
    }
    for seed in args.seeds:
        stem = args.out.with_suffix("")
        base_file = pathlib.Path(f"{stem}-seed{seed}-base.zip")
        start = time.perf_counter()
        if base_file.exists():
            base = SRPO.load(base_file)
        else:
            base = SRPO(
                preset=None,
                seed=seed,
                critic_steps=args.critic_steps,
                behavior_steps=args.behavior_steps,
                behavior_batch_size=args.behavior_batch_size,
                reward_transform=args.reward_transform,
                policy_kwargs={"behavior_width": args.behavior_width},
            ).learn(data, stages=("critic", "behavior"))
            base.save(base_file)
        seconds = time.perf_counter() - start
        cloned = evaluate(base.behavior_policy(), env, args.episodes, n_envs=args.episodes, deterministic=False)
        print(f"seed {seed}: critic and behaviour in {seconds:.0f} s; behaviour cloning {cloned}", flush=True)
        for beta in args.betas:
            start = time.perf_counter()
            agent = base.clone(beta=beta, fresh=("policy",), policy_steps=args.policy_steps)
            curve: list[dict[str, Any]] = []
            every = max(1, args.policy_steps // args.points)

            def log(local: dict[str, Any], _: Any) -> bool:
                done = local["self"].plan.done["policy"]
                if done % every == 0:  # noqa: B023
                    result = evaluate(local["self"], env, args.episodes, n_envs=args.episodes)
                    curve.append({"policy_step": done, **result.to_json()})  # noqa: B023
                    print(f"  beta {beta} at {done}: {result}", flush=True)  # noqa: B023
                return True

            agent.learn(data, stages=("policy",), callback=log)
            agent.save(f"{stem}-seed{seed}-beta{beta}.zip", include_trainer_state=False)
            result["runs"].append(
                {
                    "seed": seed,
                    "beta": beta,
                    "base_seconds": seconds,
                    "policy_seconds": time.perf_counter() - start,
                    "behavior_cloning": cloned.to_json(),
                    "curve": curve,
                }
            )
            args.out.write_text(json.dumps(result, indent=1))
    print(f"\n{data.info['id']}: data {data.info['mean_return']:.1f}; below: mean return of {args.episodes} episodes,")
    print("mean ± std over seeds")
    cloned_returns = {run["seed"]: run["behavior_cloning"]["mean_return"] for run in result["runs"]}
    show("behaviour cloning", list(cloned_returns.values()))
    for beta in args.betas:
        show(f"SRPO beta {beta}", [run["curve"][-1]["mean_return"] for run in result["runs"] if run["beta"] == beta])


def show(name: str, values: list[float]) -> None:
    print(f"  {name:<20} {np.mean(values):10.1f} ± {np.std(values):8.1f}   seeds: {', '.join(f'{v:.1f}' for v in values)}")


if __name__ == "__main__":
    main()
