"""Minutes of training until a policy beats the data's mean return, and until it beats a clone's, on this machine.

    python zoo/benchmarks/time_to_score.py [--algorithms SRPO DiffusionQL] [--datasets hopper/medium-replay] [--seeds 0 1 2]

Each run trains with the fast recipe on one thread and is evaluated as the runs of the zoo are: 20 episodes, resets seeded 1000,
1001, ..., at the beginning of the stage that makes the policy and at --points steps of it. The clock runs from `learn` on and
stands still during evaluations. The clone is BC with the same seeds, after its whole training; its bar is the mean over seeds.
Results are kept in --out after every run, with the machine and the commit, and a picture beside it; runs that are in it already
are not made again. The table of the default --out is also written into docs/benchmarks.md. --merge adds the runs of other
files.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffagents.data.load import load_dataset
from diffagents.evaluation.evaluate import evaluate
from diffagents.experiments.grid import commit
from diffagents.experiments.report import write_between
from diffagents.registry import agent_class
from diffagents.training.provenance import machine

OUT = Path(__file__).resolve().parents[1] / "results" / "time-to-score.json"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- time to score: written by zoo/benchmarks/time_to_score.py -->\n", "<!-- end of time to score -->"
ALGORITHMS = ("BC", "SRPO", "DiffusionQL", "DiffCPS", "BDPO")
SETS = ("hopper/medium-replay", "walker2d/medium-replay", "halfcheetah/medium-expert", "hopper/medium-expert")


def measure(algorithm: str, dataset: str, seed: int, points: int, episodes: int) -> dict[str, Any]:
    """Train once and evaluate on the way.

    Returns:
        The minutes of training and the mean return of each evaluation, the data's mean return, and what was run.
    """
    data = load_dataset(f"diffagents/{dataset}-v0", download=False)
    env = data.info["env_spec"]
    agent = agent_class(algorithm)(preset="fast", seed=seed, device="cpu", verbose=0)
    curve: list[dict[str, float]] = []
    clock = {"started": time.perf_counter(), "stood": 0.0}

    def look() -> None:
        began = time.perf_counter()
        minutes = (began - clock["started"] - clock["stood"]) / 60
        played = evaluate(agent, env, episodes, seed=1000, n_envs=min(episodes, 10))
        curve.append({"minutes": minutes, "mean_return": played.mean_return})
        clock["stood"] += time.perf_counter() - began

    def on_step(local: dict[str, Any], _: dict[str, Any]) -> bool:
        assert agent.plan is not None
        done, length = (counts.get(agent.POLICY_STAGE, 0) for counts in (agent.plan.done, agent.plan.lengths))
        if done in {1, *(round(length * k / points) for k in range(1, points))} and done < length:
            look()
        return True

    agent.learn(data, callback=on_step)
    look()
    return {"algorithm": algorithm, "dataset": dataset, "seed": seed, "curve": curve, "data": float(data.info["mean_return"])}


def name_of(run: dict[str, Any]) -> tuple[str, str, int]:
    """What distinguishes a run from the others."""
    return run["algorithm"], run["dataset"], run["seed"]


def keep(runs: list[dict[str, Any]], path: Path) -> None:
    """Write all runs."""
    path.write_text(json.dumps({"machine": machine(torch.device("cpu")), "threads": 1, "runs": runs}, indent=1) + "\n")


def first_above(curve: list[dict[str, float]], bar: float) -> float | None:
    """The minutes of the first evaluation from which on all exceed the bar; None if the last one does not."""
    minutes = None
    for point in reversed(curve):
        if point["mean_return"] <= bar:
            break
        minutes = point["minutes"]
    return minutes


def tables(runs: list[dict[str, Any]]) -> list[str]:
    """A line for each algorithm and dataset: the minutes of each seed until both bars are passed for good."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        cells[run["dataset"], run["algorithm"]].append(run)
    lines = ["| dataset | algorithm | above the data | above the clone | whole training |", f"|{'---|' * 5}"]
    for dataset, algorithm in sorted(cells, key=lambda cell: (cell[0], ALGORITHMS.index(cell[1]))):
        members = sorted(cells[dataset, algorithm], key=lambda run: run["seed"])
        clones = [run["curve"][-1]["mean_return"] for run in cells.get((dataset, "BC"), [])]
        bars = [members[0]["data"], float(np.mean(clones)) if clones else None]
        if algorithm == "BC":
            bars[1] = None
        columns = []
        for bar in bars:
            found = [None if bar is None else first_above(run["curve"], bar) for run in members]
            columns.append("-" if bar is None else ", ".join("not" if x is None else f"{x:.1f}" for x in found))
        whole = ", ".join(f"{run['curve'][-1]['minutes']:.1f}" for run in members)
        lines.append(f"| `{dataset}` | {algorithm} | {' | '.join(columns)} | {whole} |")
    return lines


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Return over minutes, one panel per dataset, with the data's mean and the clone's."""
    from matplotlib.figure import Figure

    datasets = sorted({run["dataset"] for run in runs})
    names = sorted({run["algorithm"] for run in runs} - {"BC"})
    figure = Figure(figsize=(4.2 * len(datasets), 3.2), layout="constrained")
    for i, dataset in enumerate(datasets):
        axes = figure.add_subplot(1, len(datasets), i + 1)
        here = [run for run in runs if run["dataset"] == dataset]
        for run in here:
            if run["algorithm"] == "BC":
                continue
            k = names.index(run["algorithm"])
            first = run is next(one for one in here if one["algorithm"] == run["algorithm"])
            x, y = ([point[name] for point in run["curve"]] for name in ("minutes", "mean_return"))
            axes.plot(x, y, color=f"C{k}", marker=".", linewidth=1, label=run["algorithm"] if first else None)
        clones = [run["curve"][-1]["mean_return"] for run in here if run["algorithm"] == "BC"]
        if clones:
            axes.axhline(float(np.mean(clones)), color="black", linestyle="--", linewidth=1, label="BC, the clone")
        axes.axhline(here[0]["data"], color="gray", linestyle=":", label="the data")
        axes.set_title(dataset, fontsize=9)
        axes.set_xlabel("minutes of training", fontsize=8)
        axes.set_ylabel("mean return of 20 episodes", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Make the missing runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, choices=ALGORITHMS)
    parser.add_argument("--datasets", nargs="+", default=SETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--points", type=int, default=6)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--merge", nargs="+", type=Path, default=[], help="Files of other calls, whose runs are added to --out."
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    for path in (args.out, *args.merge):
        known = {name_of(run) for run in runs}
        runs += [run for run in (json.loads(path.read_text())["runs"] if path.exists() else []) if name_of(run) not in known]
    for dataset in args.datasets:
        for seed in args.seeds:
            for algorithm in args.algorithms:
                if (algorithm, dataset, seed) in {name_of(run) for run in runs}:
                    continue
                runs.append(measure(algorithm, dataset, seed, args.points, args.episodes) | {"commit": commit()})
                keep(runs, args.out)
                print(algorithm, dataset, seed, [round(point["mean_return"]) for point in runs[-1]["curve"]], flush=True)
    keep(runs, args.out)
    table = "\n".join(tables(runs))
    print(table)
    if args.out == OUT:
        write_between(PAGE, BEGIN, END, f"{table}\n")
    draw(runs, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
