"""Build the zoo from finished runs: the policy of the median seed of each cell as zoo/<cell>, the results, and the tables.

  diffagents bench zoo/grids/zoo.yml --root .data/zoo     # hours; makes only missing runs
  python zoo/tools/build.py                                     # afterwards

Copies the policy folder of each cell (the folder that `push_to_hub` uploads), stores the results of all runs in
zoo/results/zoo/, and writes zoo/README.md, zoo/results.csv, the pictures and the table in README.md from these results. The
statistics of all results and cards are computed anew from the episodes. Without .data/zoo only these, tables and pictures are
written. The networks that only training needs, learner.safetensors, are stored for the policies of --learners alone and up to
--max-mb, because they would double the repository: the other policies can act, but not be trained further.
"""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from diffagents.evaluation.evaluate import Evaluation  # noqa: E402
from diffagents.experiments import grid, report  # noqa: E402
from diffagents.registry import agent_class  # noqa: E402
from diffagents.storage import publish  # noqa: E402

REMARKS = pathlib.Path(__file__).parent / "remarks.md"  # the text above the tables
RUNS = ROOT / "zoo" / "results" / "zoo"
FRONT = ("BC", "SRPO", "DiffusionQL", "DiffCPS", "BDPO")  # in the table of README.md; zoo/README.md has all algorithms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=pathlib.Path, default=ROOT / "zoo" / "grids" / "zoo.yml", help="Grid file.")
    parser.add_argument(
        "--root", type=pathlib.Path, default=ROOT / ".data" / "zoo", help="Folder of runs, the --root of `diffagents bench`."
    )
    parser.add_argument(
        "--max-mb", type=float, default=3.0, help="Largest size of a policy folder with its learner, in MB. Default: 3."
    )
    parser.add_argument(
        "--learners",
        nargs="+",
        default=["medium-replay", "srpo-hopper"],
        help="Parts of the names of the policies that are stored with their learners. Default: medium-replay srpo-hopper.",
    )
    parser.add_argument(
        "--prune", action="store_true", help="Delete results that are not in the grid, and policies without results."
    )
    args = parser.parse_args()

    specs = {spec.name: spec for spec in grid.read_grid(args.grid)}
    RUNS.mkdir(parents=True, exist_ok=True)
    for path in args.root.glob(f"*/{grid.RESULTS}"):
        if path.parent.name in specs:
            shutil.copyfile(path, RUNS / f"{path.parent.name}.json")
    stored = {path: json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json"))}
    for path, run in stored.items():
        run["last"] = recomputed(run["last"])
        path.write_text(json.dumps(run, indent=1) + "\n")
    runs = [run for path, run in stored.items() if path.stem in specs]
    others = [path for path in stored if path.stem not in specs]
    kept = {run["cell"] for run in runs}
    others += [path.parent for path in sorted((ROOT / "zoo").glob("*/config.json")) if path.parent.name not in kept]
    for path in others if args.prune else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if others and not args.prune:
        print(f"without results of this grid, and left alone without --prune: {', '.join(path.name for path in others)}")
    wrong = [cell for cell, members in report.cells_of(runs).items() if not ship(cell, members, args)]
    for file in sorted((ROOT / "zoo").glob("*/results.json")):
        file.write_text(json.dumps(recomputed(json.loads(file.read_text())), indent=1) + "\n")
        publish.renew_card(file.parent, f"zoo/{file.parent.name}")
    if wrong:
        sys.exit(f"no policy of the median seed for {', '.join(wrong)} in {args.root} or zoo/: the tables would not match")
    command = (
        "export MINARI_DATASETS_PATH=.data/minari\n"
        "python zoo/recipes/make_datasets.py --root .data/minari   # and human.py, for door\n"
        f"diffagents bench {args.grid.resolve().relative_to(ROOT)} --root .data/zoo --only CELL\n"
        "python zoo/tools/build.py"
    )
    print(
        report.write_report(
            runs,
            ROOT / "zoo",
            specs=list(specs.values()),
            command=command,
            title="The zoo",
            remarks=REMARKS.read_text().strip(),
        )
    )
    put_into_readme(report.overview(front_cells(report.cells_of(runs))))
    size = sum(path.stat().st_size for folder in (ROOT / "zoo").glob("*/config.json") for path in folder.parent.iterdir())
    print(f"{len(report.cells_of(runs))} policies, {size / 1e6:.1f} MB")


def recomputed(results: dict[str, Any]) -> dict[str, Any]:
    """The statistics of stored episodes as this version computes them."""
    again = Evaluation.from_json(results).to_json()
    return results | {name: x for name, x in again.items() if name in results or name.endswith("interval")}


def front_cells(cells: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The cells of README.md: the algorithms of FRONT on the datasets on which all of them ran."""
    datasets: dict[str, set[str]] = {}
    for members in cells.values():
        datasets.setdefault(members[0]["spec"]["dataset"], set()).add(members[0]["spec"]["algorithm"])
    whole = {dataset for dataset, algorithms in datasets.items() if algorithms >= set(FRONT)}
    return {
        cell: members
        for cell, members in cells.items()
        if members[0]["spec"]["dataset"] in whole and members[0]["spec"]["algorithm"] in FRONT
    }


def put_into_readme(table: str) -> None:
    """Write the overview into README.md, between its two markers."""
    path = ROOT / "README.md"
    text = path.read_text() if path.exists() else ""
    before, mark, rest = text.partition("<!-- zoo table: written by zoo/tools/build.py -->\n")
    _, end, after = rest.partition("<!-- end of the zoo table -->")
    if mark and end:
        path.write_text(f"{before}{mark}{table}{end}{after}")


def ship(cell: str, members: list[dict[str, Any]], args: argparse.Namespace) -> bool:
    """Copy the policy of the median seed to zoo/<cell>; False if neither --root nor zoo/ has it."""
    run, target = report.median_run(members), ROOT / "zoo" / cell
    source = args.root / run["name"] / grid.POLICY
    if not source.is_dir():
        there = (target / "results.json").is_file()
        return there and json.loads((target / "results.json").read_text()).get("returns") == run["last"]["returns"]
    with tempfile.TemporaryDirectory(dir=ROOT / "zoo") as scratch:
        made = pathlib.Path(shutil.copytree(source, pathlib.Path(scratch) / cell))
        size = sum(path.stat().st_size for path in made.iterdir()) / 1e6
        if size > args.max_mb or not any(part in cell for part in args.learners):
            if agent_class(run["spec"]["algorithm"]).TRAINING_NETWORKS:  # else the file is empty, and learning needs it
                (made / "learner.safetensors").unlink(missing_ok=True)
            if size > args.max_mb:
                print(f"{cell}: {size:.1f} MB with its learner, which is left out")
        if target.is_dir():
            shutil.rmtree(target)
        made.rename(target)
    return True


if __name__ == "__main__":
    main()
