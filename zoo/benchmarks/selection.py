"""How well signals that are computed from data alone rank policies whose returns are known, and which rule wins out of sample.

  diffagents bench zoo/grids/pools.yml --root .data/pools                  # policies and wrecks, some forty minutes of a core
  python zoo/benchmarks/selection.py rate --pools .data/pools --fqe-steps 5000   # the signals: minutes for each dataset
  python zoo/benchmarks/selection.py table                    # print the tables, into docs/tutorials/choose.md, too

The pool of a dataset consists of the policies in zoo/ and of those in --pools; their returns are the 20 episodes that the runs
have stored. The tables print, for each rule, Spearman's rank correlation with the return and the regret: the return that the
first policy by the rule lacks, in per cent of the range of returns in the pool. Then, for each dataset, which rule has the
highest mean correlation on the *other* datasets, and how it does on this one.
"""

import argparse
import json
import pathlib
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from speed_parts import machine

import diffagents
from diffagents.experiments.fqe import FQE, FQEConfig
from diffagents.experiments.one_step import OneStep, OneStepConfig
from diffagents.experiments.select import AGREE, RULES, Rated, agreement, goodness, rate

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "zoo" / "results" / "selection.json"
PAGE = ROOT / "docs" / "tutorials" / "choose.md"  # holds the tables between two marks
DATASETS = ("hopper/medium-expert", "hopper/medium-replay", "walker2d/medium-replay", "halfcheetah/medium-expert")
N_BOOTSTRAP = 2000


def pool(dataset: str, pools: pathlib.Path) -> dict[str, tuple[pathlib.Path, float]]:
    """Name -> folder and mean return of the policies of a dataset."""
    cell, found = dataset.replace("/", "-") + "-v0", {}
    for folder in sorted((ROOT / "zoo").glob(f"*-{cell}")):
        found[folder.name] = folder, json.loads((folder / "results.json").read_text())["mean_reward"]
    for run in sorted(pools.glob(f"*-{cell}-seed*/results.json")):
        found[run.parent.name.rsplit("-", 1)[0]] = run.parent / "policy", json.loads(run.read_text())["last"]["mean_return"]
    return found


def rate_pool(dataset: str, args: argparse.Namespace) -> dict[str, Any]:
    """The returns and signals of the policies of a dataset."""
    data = diffagents.load_dataset(f"diffagents/{dataset}-v0", download=False)
    policies = pool(dataset, args.pools)
    agents = {name: diffagents.load(folder, device="cpu", verbose=0) for name, (folder, _) in policies.items()}
    started = time.perf_counter()
    one_step = OneStep(data, OneStepConfig())
    config = FQEConfig(steps=args.fqe_steps) if args.fqe_steps else None
    rows = rate(agents, data, one_step, None if config is None else FQE(data, config))
    print(f"{dataset}: {len(rows)} policies in {time.perf_counter() - started:.0f} s", flush=True)
    return {
        "sha256": data.info["sha256"],
        "fqe_steps": args.fqe_steps,
        "policies": [{**vars(row), "mean_return": policies[row.name][1], "evaluation": None} for row in rows],
    }


def beaten(*signals: str) -> Callable[[Sequence[Rated]], np.ndarray]:
    """The agreement of other signals than those of AGREE."""
    return lambda rows: np.array(agreement(rows, signals))


def by(signal: str) -> Callable[[Sequence[Rated]], np.ndarray]:
    """A single signal, with the sign by which larger is better."""
    return lambda rows: np.array([goodness(row, signal) for row in rows])


CANDIDATES: dict[str, Callable[[Sequence[Rated]], np.ndarray]] = {
    **{rule: by(rule) for rule in RULES},
    "q_mean": lambda rows: np.array([-np.inf if row.q_mean is None else row.q_mean for row in rows]),
    "least gain of the networks": lambda rows: np.array([min(row.gain_of_networks) for row in rows]),
    "gain and loss_on_best": beaten("gain", "loss_on_best"),
    "gain and off_data": beaten("gain", "off_data"),
    "loss_on_best and off_data": beaten("loss_on_best", "off_data"),
    "gain and bc_loss": beaten("gain", "bc_loss"),
    "fqe and loss_on_best": beaten("fqe", "loss_on_best"),
    "fqe, loss_on_best and off_data": beaten("fqe", "loss_on_best", "off_data"),
}
"""What may be the rule -> its values for a pool, larger is better. FQE minus the FQE of a clone orders as FQE does."""


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of the ranks; ties share their mean rank."""
    ranks = [(x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2 for x in (a, b)]
    spread = ranks[0].std() * ranks[1].std()
    return float(((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())).mean() / spread) if spread > 0 else 0.0


def compare(policies: Sequence[dict[str, Any]], rule: str) -> tuple[float, float, float, float] | None:
    """Rank correlation, both ends of its 95 % bootstrap interval over the policies, and regret; None without the signal.

    Only q_mean is unknown for some policies, which are left out then.
    """
    returns = np.array([one["mean_return"] for one in policies])
    rows = [Rated(**{name: x for name, x in one.items() if name != "mean_return"}) for one in policies]
    values = CANDIDATES[rule](rows)
    known = np.isfinite(values)
    if known.sum() < 3 or ("fqe" in rule and rows[0].fqe is None):
        return None
    x, y = values[known], returns[known]
    draws = np.random.default_rng(0).integers(0, len(x), (N_BOOTSTRAP, len(x)))
    low, high = np.percentile([spearman(x[d], y[d]) for d in draws], (2.5, 97.5))
    regret = 100 * (returns.max() - y[x.argmax()]) / np.ptp(returns)
    return spearman(x, y), float(low), float(high), float(regret)


def tables(pools: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, tuple[float, float]]]:
    """The lines of both tables, and for each rule its mean correlation and regret."""
    found = {rule: {name: compare(one["policies"], rule) for name, one in pools.items()} for rule in CANDIDATES}
    found = {rule: results for rule, results in found.items() if all(results.values())}
    means: dict[str, tuple[float, float]] = {}
    for rule, results in found.items():
        each = np.array([result for result in results.values() if result])
        means[rule] = (float(each[:, 0].mean()), float(each[:, 3].mean()))
    lines = [f"| rule | {' | '.join(f'`{name}`' for name in pools)} | mean |", f"|{'---|' * (len(pools) + 2)}"]
    for rule in sorted(found, key=lambda rule: -means[rule][0]):
        cells = [f"{r[0]:.2f} [{r[1]:.2f}, {r[2]:.2f}], {r[3]:.0f} %" for r in found[rule].values() if r]
        lines.append(f"| {rule} | {' | '.join(cells)} | {means[rule][0]:.2f}, {means[rule][1]:.0f} % |")
    lines += ["", "| left out | rule that wins on the others | rank correlation there | regret there |", f"|{'---|' * 4}"]
    for name in pools:
        others = {rule: np.mean([r[0] for one, r in results.items() if r and one != name]) for rule, results in found.items()}
        rule = max(others, key=lambda rule: others[rule])
        rho, _, _, regret = found[rule][name] or (0.0, 0.0, 0.0, 0.0)
        lines.append(f"| `{name}` | {rule} | {rho:.2f} | {regret:.0f} % |")
    return lines, means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rating = commands.add_parser("rate", help="Compute the signals.")
    rating.add_argument("--pools", type=pathlib.Path, default=ROOT / ".data" / "pools")
    rating.add_argument("--datasets", nargs="+", default=DATASETS)
    rating.add_argument("--fqe-steps", type=int, default=0, help="Gradient steps of fitted Q evaluation. Default: none.")
    commands.add_parser("table", help="Print the tables.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    stored = json.loads(OUT.read_text()) if OUT.exists() else {"pools": {}}
    for dataset in args.datasets if args.command == "rate" else ():
        one = rate_pool(dataset, args)
        stored = json.loads(OUT.read_text()) if OUT.exists() else stored  # another process may have added to it
        pools = {**stored["pools"], dataset: one}
        stored = {
            "machine": machine(),
            "agree": list(AGREE),
            "pools": {name: pools[name] for name in DATASETS if name in pools},
        }
        OUT.write_text(json.dumps(stored, indent=1) + "\n")
    lines, means = tables(stored["pools"])
    print("\n".join(lines))
    before, mark, rest = PAGE.read_text().partition("<!-- selection: printed by zoo/benchmarks/selection.py table -->\n")
    PAGE.write_text(before + mark + "\n" + "\n".join(lines) + "\n\n" + "".join(rest.partition("<!-- end -->")[1:]))
    print("\nEVIDENCE", {rule: (round(rho, 2), round(regret)) for rule, (rho, regret) in means.items() if rule in RULES})


if __name__ == "__main__":
    main()
