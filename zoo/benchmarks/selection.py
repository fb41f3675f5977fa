"""How well `select` ranks policies of one task without playing them: rank correlation with their true returns.

  python zoo/benchmarks/selection.py 'runs/*hopper*' --dataset diffagents/hopper/medium-v0 --episodes 20 --gamma 0.99 0.995
  python zoo/benchmarks/selection.py ... --returns zoo/results/selection-hopper-medium-v0.json  # other settings, same returns

For each signal this prints Spearman's rank correlation with the mean return of real episodes, its 95 % bootstrap interval over
the policies, and regret@1: the loss of choosing the first policy by the signal instead of the truly best one. All results are
written as JSON, with the command, the machine and the commit. Use at least twelve policies.
"""

import argparse
import glob
import json
import pathlib
import time
import warnings
from typing import Any

import numpy as np
import torch
from speed_parts import machine

import diffagents
from diffagents.experiments.fqe import FQEConfig
from diffagents.experiments.select import Selection, select
from diffagents.training.provenance import command_line

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Signal -> whether larger is better. "order" is the order of `select`: by fqe, policies that are not trusted last.
SIGNALS = {"order": True, "fqe": True, "bc_loss": False, "off_data": False, "q_mean": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="+", help="folders or .zip files, or patterns for them")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--episodes", type=int, default=20, help="real episodes per policy")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the first episode")
    parser.add_argument("--returns", type=pathlib.Path, help="JSON file of this command with the returns, instead of playing")
    parser.add_argument("--gamma", type=float, nargs="+", default=[FQEConfig.gamma], help="one selection for each value")
    parser.add_argument("--fqe-steps", type=int, default=FQEConfig.steps)
    parser.add_argument("--n-seeds", type=int, default=FQEConfig.n_seeds)
    parser.add_argument("--max-transitions", type=int, default=FQEConfig.max_transitions)
    parser.add_argument("--fqe-seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, help="default: zoo/results/selection-DATASET.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", UserWarning)
    paths = sorted({path for pattern in args.policies for path in glob.glob(pattern)})
    if len(paths) < 3:
        parser.error(f"{len(paths)} policies match: a ranking needs at least three, and twelve to be meaningful")
    where, data = machine(), diffagents.load_dataset(args.dataset)
    policies = {path: diffagents.load(path, device=args.device, verbose=0) for path in paths}
    true = known_returns(args.returns, paths) if args.returns else play(policies, args)

    runs = []
    for gamma in args.gamma:
        settings = {"fqe_steps": args.fqe_steps, "n_seeds": args.n_seeds, "max_transitions": args.max_transitions}
        found = select(policies, data, gamma=gamma, seed=args.fqe_seed, device=args.device, **settings)
        runs.append({"selection": found.to_json(), "signals": compare(found, true)})
        print(f"\n{found}\n")
        show(runs[-1]["signals"], gamma, len(paths))
    name = "-".join(["selection", *pathlib.PurePosixPath(args.dataset.removeprefix("diffagents/")).parts])
    out = args.out or ROOT / "zoo" / "results" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": command_line(), "machine": where, "dataset": data.info["id"], "sha256": data.info["sha256"],
        "episodes": args.episodes, "true": true, "runs": runs,
    }  # fmt: skip
    out.write_text(json.dumps(report, indent=1))
    print(f"\n{out}")


def play(policies: dict[str, Any], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The mean return of real episodes, with the same seeds for each policy, and its interval."""
    found = {}
    for path, policy in policies.items():
        start = time.perf_counter()
        played = policy.evaluate(n_episodes=args.episodes, seed=args.seed, deterministic=True)  # as in `select`
        low, high = played.interval or (played.mean_return, played.mean_return)  # of one episode nothing is known
        found[path] = {"mean_return": played.mean_return, "low": low, "high": high}
        print(
            f"{path}: return {played.mean_return:.1f} [{low:.1f}, {high:.1f}], {time.perf_counter() - start:.0f} s", flush=True
        )
    return found


def known_returns(file: pathlib.Path, paths: list[str]) -> dict[str, dict[str, float]]:
    """The returns stored in the JSON file of an earlier run."""
    known = json.loads(file.read_text())["true"]
    if missing := [path for path in paths if path not in known]:
        raise SystemExit(f"{file} has no return of {missing[0]}")
    return {path: known[path] for path in paths}


def compare(found: Selection, true: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """For each signal: rank correlation with the returns, its interval, and the regret of its first policy."""
    signals = {}
    for signal, largest in SIGNALS.items():
        values = {row.name: -k if signal == "order" else getattr(row, signal) for k, row in enumerate(found.rows)}
        rows = [row for row in found.rows if values[row.name] is not None and np.isfinite(values[row.name])]
        if len(rows) < 3:
            continue
        score = np.array([(1 if largest else -1) * values[row.name] for row in rows])
        returns = np.array([true[row.name]["mean_return"] for row in rows])
        noise = np.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
        many = [spearman(score[d], returns[d]) for d in noise if len(set(d.tolist())) > 2]
        low, high = np.percentile(many, (2.5, 97.5))
        signals[signal] = {
            "spearman": spearman(score, returns),
            "interval": [float(low), float(high)],
            "n": len(rows),
            "first": rows[int(score.argmax())].name,
            "regret_at_1": float(returns.max() - returns[score.argmax()]),
            "range_of_returns": [float(returns.min()), float(returns.max())],
        }
    return signals


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of the ranks; ties share their mean rank."""
    ranks = [(x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2 for x in (a, b)]
    spread = ranks[0].std() * ranks[1].std()
    return float(((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())).mean() / spread) if spread > 0 else 0.0


def show(signals: dict[str, dict[str, Any]], gamma: float, n: int) -> None:
    print(f"{n} policies, gamma {gamma:g}")
    print(f"{'signal':<10}{'Spearman':>10}{'95 % interval':>18}{'regret@1':>10}  first")
    for name, s in signals.items():
        interval = f"{s['interval'][0]:.2f} to {s['interval'][1]:.2f}"
        print(f"{name:<10}{s['spearman']:>10.2f}{interval:>18}{s['regret_at_1']:>10.1f}  {s['first']} (n = {s['n']})")


if __name__ == "__main__":
    main()
