"""BDPO's own check on 2-D toys: does the value of pure noise equal the soft optimum of the reward under the data?

  python zoo/benchmarks/bdpo_toy.py --task 8gaussians --seeds 0 1

By theory V_T(a_T) = eta log E_nu[ exp(Q / eta) ] for every a_T once the policy is optimal: the free energy that regularisation
by the behaviour nu leaves. Printed: the mean of V_T over a_T ~ N(0, I), aggregated as the targets are, that free energy
from the data's rewards and from the learned Q on samples of the learned behaviour, and the relative errors.
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
    """V_T at noise against the free energy of the data's rewards, and of Q on the behaviour's samples."""
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
    parser.add_argument("--set", nargs="*", default=[], metavar="KNOB=VALUE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bdpo_toy.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    knobs: dict[str, Any] = {
        "eta": args.eta,
        "gamma": 0.0,  # one step: no path is walked at a next state
        "rho": 0.0,
        "n_critics": 2,
        "n_samples": 4,
        "tau": 0.02,  # 50 steps hand the value on, each lags behind the one below
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

        def look(local: dict[str, Any], _: Any) -> bool:
            done = local["self"].plan.done.get("train", 0)
            if done and done % 1000 == 0:
                print({name: round(value, 4) for name, value in check(local["self"], rewards).items()}, flush=True)
            return True

        agent = BDPO("MlpPolicy", bandits.Bandit(args.task), seed=seed, **knobs).learn(data, callback=look)
        results.append({"seed": seed, "seconds": time.perf_counter() - start, **check(agent, rewards)})
        print(json.dumps(results[-1]), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"command": "python " + " ".join(sys.argv), "knobs": knobs, "runs": results}, indent=1))


if __name__ == "__main__":
    main()
