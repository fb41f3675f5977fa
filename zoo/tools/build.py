"""From finished runs to the zoo: the median seed's policy of every cell as zoo/<cell>, the runs' results, and the tables.

  diffagents bench zoo/grids/zoo.yml --root .data/zoo     # hours; makes only what is missing
  python zoo/tools/build.py                                     # then this

Copies each cell's policy folder (the exact folder that `push_to_hub` uploads) where the run is new or another seed became the
median, keeps the results of all runs in zoo/results/zoo/, and writes zoo/README.md, zoo/results.csv and the pictures from
these. Without .data/zoo it only writes the tables anew. A cell whose folder would be larger than --max-mb goes without
learner.safetensors: it acts, but cannot be trained further.
"""

import argparse
import json
import pathlib
import shutil
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from diffagents import publish, sweep, sweep_report  # noqa: E402

REMARKS = pathlib.Path(__file__).parent / "remarks.md"  # what stands above the tables
RUNS = ROOT / "zoo" / "results" / "zoo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=pathlib.Path, default=ROOT / "zoo" / "grids" / "zoo.yml")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT / ".data" / "zoo", help="of `diffagents bench`")
    parser.add_argument("--max-mb", type=float, default=4.0, help="of one folder with its learner")
    args = parser.parse_args()

    specs = {spec.name: spec for spec in sweep.read_grid(args.grid)}
    RUNS.mkdir(parents=True, exist_ok=True)
    for path in args.root.glob(f"*/{sweep.RESULTS}"):
        if path.parent.name in specs:
            shutil.copyfile(path, RUNS / f"{path.parent.name}.json")
    runs = []
    for path in sorted(RUNS.glob("*.json")):
        if path.stem in specs:
            runs.append(json.loads(path.read_text()))
        else:
            path.unlink()  # of settings that the grid does not have any more
    for cell, members in sweep_report.cells_of(runs).items():
        ship(cell, sweep_report.median_run(members), args)
    for folder in (ROOT / "zoo").glob("*/config.json"):
        if folder.parent.name not in {run["cell"] for run in runs}:
            shutil.rmtree(folder.parent)
    command = (
        f"diffagents bench {args.grid.resolve().relative_to(ROOT)} --root .data/zoo --only CELL && python zoo/tools/build.py"
    )
    print(
        sweep_report.write_report(
            runs,
            ROOT / "zoo",
            specs=list(specs.values()),
            command=command,
            title="The zoo",
            remarks=REMARKS.read_text().strip(),
        )
    )
    put_into_readme(sweep_report.overview(sweep_report.cells_of(runs)))
    size = sum(path.stat().st_size for folder in (ROOT / "zoo").glob("*/config.json") for path in folder.parent.iterdir())
    print(f"{len(sweep_report.cells_of(runs))} policies, {size / 1e6:.1f} MB")


def put_into_readme(table: str) -> None:
    """The overview again, on the front page between its two marks."""
    path = ROOT / "README.md"
    text = path.read_text() if path.exists() else ""
    before, mark, rest = text.partition("<!-- zoo table: written by zoo/tools/build.py -->\n")
    _, end, after = rest.partition("<!-- end of the zoo table -->")
    if mark and end:
        path.write_text(f"{before}{mark}{table}{end}{after}")


def ship(cell: str, run: dict[str, Any], args: argparse.Namespace) -> None:
    source, target = args.root / run["name"] / sweep.POLICY, ROOT / "zoo" / cell
    if not source.is_dir():
        if not target.is_dir():
            print(f"{cell}: the policy of {run['name']} is not in {args.root}, so zoo/{cell} is missing")
        return
    if target.is_dir():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    publish.renew_card(target, f"zoo/{cell}")
    size = sum(path.stat().st_size for path in target.iterdir()) / 1e6
    if size > args.max_mb:
        (target / "learner.safetensors").unlink(missing_ok=True)
        print(f"{cell}: {size:.1f} MB with its learner, which is left out")


if __name__ == "__main__":
    main()
