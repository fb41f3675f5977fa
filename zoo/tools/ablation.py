"""What each piece of the fast recipe is worth, as the table in docs/benchmarks.md, from the runs of zoo/grids/ablation.yml.

  diffagents bench zoo/grids/ablation.yml --root .data/ablation     # an hour or two; makes only missing runs
  python zoo/tools/ablation.py                                      # afterwards

Keeps the episodes of all runs in zoo/results/ablation.json. Without .data/ablation only the table is written, from that file.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from diffagents.evaluation.d4rl import normalized_scores  # noqa: E402
from diffagents.experiments import grid, report  # noqa: E402

KEPT = ROOT / "zoo" / "results" / "ablation.json"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- ablation: written by zoo/tools/ablation.py -->\n", "<!-- end of the ablation -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--root", type=pathlib.Path, default=ROOT / ".data" / "ablation", help="the --root of `diffagents bench`"
    )
    args = parser.parse_args()
    specs = grid.read_grid(ROOT / "zoo" / "grids" / "ablation.yml")
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for spec in specs:
        file = args.root / spec.name / grid.RESULTS
        if file.is_file():
            run = json.loads(file.read_text())
            kept[spec.name] = {
                "label": spec.label,
                "dataset": spec.dataset,
                "seed": spec.seed,
                "env_id": run["last"]["env_id"],
                "returns": run["last"]["returns"],
                "data_return": run["data"]["mean_return"],
                "commit": run["commit"],
            }
    names = [spec.name for spec in specs]
    kept = {name: kept[name] for name in names if name in kept}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    report.write_between(PAGE, BEGIN, END, table(list(kept.values())))
    missing = [name for name in names if name not in kept]
    print(f"{len(kept)} of {len(names)} runs" + (f"; missing: {', '.join(missing)}" if missing else ""))


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each piece that is left out: mean and standard deviation over the episodes of all seeds, on the D4RL scale."""
    datasets = list(dict.fromkeys(run["dataset"] for run in runs))
    labels = list(dict.fromkeys(run["label"] for run in runs))
    lines = [f"| SRPO | {' | '.join(f'`{dataset}`' for dataset in datasets)} |", "|---" * (1 + len(datasets)) + "|"]
    for label in labels:
        cells = []
        for dataset in datasets:
            of_both = [run for run in runs if (run["label"], run["dataset"]) == (label, dataset)]
            found = [normalized_scores(run["env_id"], run["returns"]) for run in of_both]
            scores = np.array([score for each in found if each is not None for score in each])
            cells.append(f"{scores.mean():.1f} ± {scores.std():.1f}" if len(scores) else "-")
        lines.append(f"| {label or '**all pieces**'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
