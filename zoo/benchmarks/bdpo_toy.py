"""BDPO on 2-D toy tasks: does the value of pure noise equal the soft optimum of the reward under the data?

  python zoo/benchmarks/bdpo_toy.py --task 8gaussians --seeds 0 1

In theory V_T(a_T) = eta log E_nu[ exp(Q / eta) ] for every a_T once the policy is optimal: the free energy under regularisation
by the behaviour nu. Printed are the mean of V_T over a_T ~ N(0, I), aggregated like the targets, the free energy computed from
the rewards of the data and from the learned Q on samples of the learned behaviour, and the relative errors.
"""

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
import bandits

from diffagents import BDPO


def free_energy(values: torch.Tensor, eta: float) -> float:
    """eta log mean exp(values / eta)."""
    return float(eta * (torch.logsumexp(values.double() / eta, 0) - torch.log(torch.tensor(float(len(values))))))


def check(agent: BDPO, rewards: torch.Tensor, n: int = 4000) -> dict[str, float]:
    """Compare V_T at noise with the free energy of the data's rewards, and with that of Q on samples of the behaviour.

    Args:
        agent: A trained agent.
        rewards: Rewards of the data.
        n: Number of samples.
    """
    generator = torch.Generator().manual_seed(0)
    obs, eta = torch.zeros(n, agent.obs_dim), agent.config.eta
    with torch.no_grad():
        noise = torch.randn(n, agent.act_dim, generator=generator)
        last = torch.full((n,), agent.config.n_diffusion_steps - 1)
        value = agent.aggregate(agent.value_target(obs, noise, last), {}).mean().item()
        samples = agent.behavior_ema.sample(obs, agent.behavior_ema.noises((n,), generator))
        q = agent.aggregate(agent.critic_target(torch.cat([obs, samples], -1)), {})
    data, learned = free_energy(rewards, eta), free_energy(q, eta)
    return {
        "V_T": value,
        "free energy of the rewards": data,
        "relative error": abs(value - data) / abs(data),
        "free energy of Q": learned,
        "relative error to Q": abs(value - learned) / abs(learned),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="8gaussians")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--eta", type=float, default=0.06)
    parser.add_argument("--points", type=int, default=50_000)
    parser.add_argument("--behavior-steps", type=int, default=5000)
    parser.add_argument("--train-steps", type=int, default=12_000)
    parser.add_argument("--diffusion-steps", type=int, default=50)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="HYPERPARAMETER=VALUE", help="other hyperparameters, with values in JSON"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bdpo_toy.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hyperparameters: dict[str, Any] = {
        "eta": args.eta,
        "gamma": 0.0,  # episodes have one step: there is no next state
        "rho": 0.0,
        "n_critics": 2,
        "n_samples": 4,
        "tau": 0.02,  # the value passes through 50 steps, each with a delay
        "clip_x0": False,
        "n_diffusion_steps": args.diffusion_steps,
        "reward_transform": "none",
        "learning_rate": 3e-4,
        "batch_size": 128,
        "policy_kwargs": {"net_arch": [128, 128, 128]},
        "behavior_steps": args.behavior_steps,
        "train_steps": args.train_steps,
        **{name: json.loads(value) for name, _, value in (setting.partition("=") for setting in args.set)},
    }
    data = bandits.dataset(args.task, args.points)
    rewards, results = torch.from_numpy(data["rewards"]), []
    for seed in args.seeds:
        start = time.perf_counter()

        def log(local: dict[str, Any], _: Any) -> bool:
            done = local["self"].plan.done.get("train", 0)
            if done and done % 1000 == 0:
                print({name: round(value, 4) for name, value in check(local["self"], rewards).items()}, flush=True)
            return True

        agent = BDPO("MlpPolicy", bandits.Bandit(args.task), preset=None, seed=seed, **hyperparameters)
        agent.learn(data, callback=log)
        results.append({"seed": seed, "seconds": time.perf_counter() - start, **check(agent, rewards)})
        print(json.dumps(results[-1]), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"command": "python " + " ".join(sys.argv), "knobs": hyperparameters, "runs": results}, indent=1)
        )


if __name__ == "__main__":
    main()
