"""What a grid of runs gave: results.csv, README.md, curves.png and iqm.png, out of the results.json of its runs."""

import csv
import html
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffagents import artifact
from diffagents.evaluation import bootstrap
from diffagents.sweep import RESULTS, RunSpec

Run = Mapping[str, Any]
_REPEATS = 2000  # of every bootstrap
COLUMNS = (
    *("cell", "algorithm", "dataset", "seed", "name", "steps", "last_return", "last_score", "last_success", "last_length"),
    *("best_return", "best_score", "best_at", "data_return", "data_score", "seconds", "machine", "commit"),
)


def read_runs(root: str | Path) -> list[dict[str, Any]]:
    """The results of every finished run under `root`, sorted by name. Raises FileNotFoundError where there is none."""
    found = sorted(Path(root).glob(f"*/{RESULTS}"))
    if not found:
        raise FileNotFoundError(f"there is no finished run in {root}")
    return [artifact.read_json(path.parent, RESULTS) for path in found]


def write_report(
    runs: Sequence[Run], folder: str | Path, *, specs: Sequence[RunSpec] = (), command: str, title: str, remarks: str = ""
) -> Path:
    """Write the tables and pictures of `runs` into `folder` and return the path of its README.md.

    specs: the grid, whose runs that are missing are named. remarks: to stand above the tables. command: what makes a cell anew,
    `CELL` standing for its name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cells = cells_of(runs)
    (folder / "results.csv").write_text(as_csv(runs), encoding="utf-8")
    pictures = []
    try:
        if draw_curves(cells, folder / "curves.png"):
            pictures.append("![Evaluations while training, by dataset](curves.png)")
        if draw_iqm(cells, folder / "iqm.png"):
            pictures.append("![Interquartile means with their intervals](iqm.png)")
    except ImportError:
        pictures.append('No pictures: matplotlib is missing (`pip install "diffagents[plot]"`).')
    parts = [
        f"# {title}\n",
        "Generated from the runs' results: do not edit. One row of [results.csv](results.csv) is one run.\n",
        *([f"{remarks}\n"] if remarks else []),
        "## Scores\n",
        overview(cells),
        *pictures,
        "",
        "## Cells\n",
        details(cells, command),
        "## Comparisons\n",
        verdicts(cells),
        missing(runs, specs),
    ]
    path = folder / "README.md"
    path.write_text("\n".join(part for part in parts if part is not None).rstrip() + "\n", encoding="utf-8")
    return path


# ---- numbers ---------------------------------------------------------------------------------------------------------


def cells_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Cell -> its runs by seed. Raises ValueError where two runs are of one seed, or a cell's runs had different settings."""
    cells: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run["cell"], run["spec"]["seed"])):
        cells[run["cell"]].append(run)
    for cell, members in cells.items():
        without_seed = [{name: value for name, value in run["spec"].items() if name != "seed"} for run in members]
        if any(spec != without_seed[0] for spec in without_seed) or len({run["data"]["sha256"] for run in members}) > 1:
            raise ValueError(f"the runs of {cell} differ in more than their seeds: keep those of one setting and one dataset")
        if len({run["spec"]["seed"] for run in members}) < len(members):
            raise ValueError(f"two runs of {cell} have the same seed")
    return dict(cells)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95 % percentile bootstrap interval of the mean over seeds; of one seed, nothing but its value."""
    return float(np.mean(values)), *bootstrap(values)


def interquartile_mean(values: Any) -> np.ndarray:
    """Mean of the middle half along the last axis, a quarter (rounded down) dropped at each end (Agarwal et al. 2021)."""
    array = np.sort(np.asarray(values, np.float64), axis=-1)
    cut = array.shape[-1] // 4
    return array[..., cut : array.shape[-1] - cut].mean(axis=-1)


def iqm_interval(by_task: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """(interquartile mean over all runs of all tasks, low, high); stratified bootstrap: seeds are redrawn within each task."""
    rng = np.random.default_rng(0)
    arrays = [np.asarray(scores, np.float64) for scores in by_task]
    drawn = np.concatenate([scores[rng.integers(0, len(scores), (_REPEATS, len(scores)))] for scores in arrays], axis=1)
    low, high = np.percentile(interquartile_mean(drawn), (2.5, 97.5))
    return float(interquartile_mean(np.concatenate(arrays))), float(low), float(high)


def median_run(members: Sequence[Run]) -> Run:
    """The run whose last return is the median (of an even number, the lower of the two in the middle)."""
    return sorted(members, key=lambda run: run["last"]["mean_return"])[(len(members) - 1) // 2]


def unit_of(run: Run) -> str:
    """Of `value_of` and `data_value`: the D4RL scale; where returns count successes, as in mazes, these; else the return."""
    last = run["last"]
    if last["score"] is not None:
        return "D4RL scale"
    counts = last["success_rate"] is not None and abs(last["mean_return"] - last["success_rate"]) < 1e-6
    return "success %" if counts and 0.0 <= run["data"]["mean_return"] <= 1.0 else "return"


def value_of(run: Run, which: str = "last") -> float:
    """What tables compare, in `unit_of`. which: the "last" policy, or the "best" evaluation on the way."""
    rows = [row for row in run["curve"] if run["best"] and row["num_timesteps"] == run["best"]["num_timesteps"]]
    row = rows[0] if which == "best" and rows else run["last"]
    return _in_units(row, unit_of(run))


def data_value(run: Run) -> float:
    """The mean of the data's episodes."""
    return _in_units(run["data"], unit_of(run))


def _in_units(row: Mapping[str, Any], unit: str) -> float:
    return float(row["score"] if unit == "D4RL scale" else row["mean_return"] * (100.0 if unit == "success %" else 1.0))


# ---- tables ----------------------------------------------------------------------------------------------------------


def as_csv(runs: Sequence[Run]) -> str:
    """One row a run, columns COLUMNS."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for run in sorted(runs, key=lambda run: (run["cell"], run["spec"]["seed"])):
        last, best, data = run["last"], run["best"] or {}, run["data"]
        row = {"cell": run["cell"], "name": run["name"], **{key: run["spec"][key] for key in ("algorithm", "dataset", "seed")}}
        row |= {"steps": " ".join(f"{stage}={steps}" for stage, steps in run["stage_steps"].items())}
        row |= {"last_return": last["mean_return"], "last_score": last["score"], "last_success": last["success_rate"]}
        row |= {
            "last_length": last["mean_length"],
            "best_return": best.get("mean_return"),
            "best_at": best.get("num_timesteps"),
        }
        row |= {"best_score": value_of(run, "best") if best and last["score"] is not None else None}
        row |= {"data_return": data["mean_return"], "data_score": data["score"], "seconds": round(run["seconds"], 1)}
        table.writerow(row | {"machine": run["machine"], "commit": run["commit"]})
    return text.getvalue()


def _by_dataset(cells: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Sequence[Run]]]:
    """dataset -> algorithm -> runs"""
    found: dict[str, dict[str, Sequence[Run]]] = defaultdict(dict)
    for members in cells.values():
        found[members[0]["spec"]["dataset"]][members[0]["spec"]["algorithm"]] = members
    return {dataset: found[dataset] for dataset in sorted(found)}


def _algorithms(cells: Mapping[str, Sequence[Run]]) -> list[str]:
    return sorted({members[0]["spec"]["algorithm"] for members in cells.values()})


def _said(values: Sequence[float]) -> str:
    mean, low, high = mean_interval(values)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]" if len(values) > 1 else f"{mean:.1f}"


def overview(cells: Mapping[str, Sequence[Run]]) -> str:
    """One row a dataset, one column an algorithm: the last policies' mean over seeds and its interval."""
    algorithms = _algorithms(cells)
    lines = [
        "LAST policy of each run, mean over seeds and its 95 % bootstrap interval (one seed: its value alone); beside it the",
        "mean of the data's own episodes. D4RL scale: 0 is D4RL's random policy, 100 its expert, in mujoco-py; what was made",
        "in other physics, or from other data, does not compare with published tables.\n",
        f"| dataset | unit | the data | {' | '.join(algorithms)} |",
        f"|{'---|' * (len(algorithms) + 3)}",
    ]
    for dataset, row in _by_dataset(cells).items():
        some = next(iter(row.values()))[0]
        means = {name: mean_interval([value_of(run) for run in members])[0] for name, members in row.items()}
        said = [
            "-"
            if name not in row
            else ("**{}**" if means[name] == max(means.values()) else "{}").format(_said([value_of(run) for run in row[name]]))
            + ("" if len(row[name]) > 1 else " (1)")
            for name in algorithms
        ]
        lines.append(f"| `{dataset}` | {unit_of(some)} | {data_value(some):.1f} | {' | '.join(said)} |")
    return "\n".join([*lines, "", "(1): one seed. -: not reached. Bold: the highest mean, whatever the intervals say.\n"])


def details(cells: Mapping[str, Sequence[Run]], command: str) -> str:
    """One row a cell: what it takes to judge it and to make it anew."""
    lines = [
        "The last policy's raw return and score, by seed too (in brackets the median seed, the one that is kept), then the",
        "best evaluation met on the way. That one is chosen by the episodes it is reported on, so it flatters; it is here to",
        "compare with papers that report it.\n",
        "| cell | seeds | raw return | last | last by seed | best on the way | updates | minutes a run | machine | commit |",
        f"|{'---|' * 10}",
    ]
    for cell, members in cells.items():
        kept = median_run(members)
        by_seed = ", ".join(f"({value_of(run):.1f})" if run is kept else f"{value_of(run):.1f}" for run in members)
        best = _said([value_of(run, "best") for run in members])
        steps = ", ".join(f"{stage} {count:,}" for stage, count in members[0]["stage_steps"].items())
        minutes = ", ".join(f"{run['seconds'] / 60:.0f}" for run in members)
        lines.append(
            f"| `{cell}` | {len(members)} | {_said([run['last']['mean_return'] for run in members])} "
            f"| {_said([value_of(run) for run in members])} | {by_seed} | {best} | {steps} | {minutes} "
            f"| {_unique(run['machine'] for run in members)} | {_unique(run['commit'] for run in members)} |"
        )
    settings = sorted({f"{m[0]['spec']['episodes']} episodes" for m in cells.values()})
    return "\n".join(
        [*lines, "", f"{', '.join(settings)} a run, resets seeded 1000, 1001, ... A cell anew:\n", f"```sh\n{command}\n```\n"]
    )


def _unique(values: Any) -> str:
    return ", ".join(dict.fromkeys(html.escape(str(value or "-")) for value in values))


def verdicts(cells: Mapping[str, Sequence[Run]], baseline: str = "DiffusionBC") -> str:
    """Where an algorithm does not beat the data's mean, or cloning it, in the mean over seeds."""
    lines = []
    for dataset, row in _by_dataset(cells).items():
        for name, members in row.items():
            mean = mean_interval([value_of(run) for run in members])[0]
            bars = {"the data's mean": data_value(members[0])}
            if baseline in row and name != baseline:
                bars[baseline] = mean_interval([value_of(run) for run in row[baseline]])[0]
            below = [f"{bar} ({value:.1f})" for bar, value in bars.items() if mean <= value]
            if name != baseline and below:
                lines.append(f"* `{dataset}`: {name} ({mean:.1f}) does not beat {' or '.join(below)}")
    if not lines:
        return f"Every algorithm beats the data's mean and {baseline} wherever it was run.\n"
    return "\n".join([f"Where an algorithm beats neither, or only one of, the data's mean and {baseline}:\n", *lines, ""])


def missing(runs: Sequence[Run], specs: Sequence[RunSpec]) -> str | None:
    """The runs of the grid that are not there."""
    made = {run["name"] for run in runs}
    lacking: dict[str, list[str]] = defaultdict(list)
    for spec in specs:
        if spec.name not in made:
            lacking[spec.cell].append(str(spec.seed))
    if not lacking:
        return None
    lines = [f"* `{cell}`: seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}" for cell, seeds in lacking.items()]
    return "\n".join(["## Not reached\n", "Runs of the grid that have not been made:\n", *lines])


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw_curves(cells: Mapping[str, Sequence[Run]], path: Path) -> bool:
    """Evaluations on the way, a panel for each dataset: mean over seeds, from the lowest seed to the highest in the shade."""
    from matplotlib.figure import Figure

    rows = {dataset: row for dataset, row in _by_dataset(cells).items() if any(m[0]["curve"] for m in row.values())}
    if not rows:
        return False
    columns = min(3, len(rows))
    height = -(-len(rows) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * height), layout="constrained")
    colors = {name: f"C{i}" for i, name in enumerate(_algorithms(cells))}
    for i, (dataset, row) in enumerate(rows.items()):
        axes = figure.add_subplot(height, columns, i + 1)
        for name, members in row.items():
            curves = [run["curve"] for run in members if len(run["curve"]) == len(members[0]["curve"])]
            if not curves[0]:
                continue
            y = np.array([[_height(point) for point in curve] for curve in curves])
            x = np.linspace(0, 1, len(curves[0]) + 1)[1:]
            axes.plot(x, y.mean(0), label=name, color=colors[name], marker=".")
            axes.fill_between(x, y.min(0), y.max(0), color=colors[name], alpha=0.15, linewidth=0)
        some = next(iter(row.values()))[0]
        scored = some["last"]["score"] is not None
        axes.axhline(
            some["data"]["score"] if scored else some["data"]["mean_return"], color="gray", linestyle=":", label="the data"
        )
        axes.set_title(dataset, fontsize=9)
        axes.set_ylabel("D4RL scale" if scored else "return", fontsize=8)
        axes.set_xlabel("share of the stage that makes the policy", fontsize=8)
        axes.tick_params(labelsize=7)
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(8, len(handles)), fontsize=8)
    figure.savefig(path, dpi=110)
    return True


def _height(point: Mapping[str, Any]) -> float:
    return float(point["mean_return"] if point["score"] is None else point["score"])


def draw_iqm(cells: Mapping[str, Sequence[Run]], path: Path) -> bool:
    """Interquartile mean of the D4RL-scale scores over all seeds of the datasets that all drawn algorithms share."""
    scored = {
        dataset: row for dataset, row in _by_dataset(cells).items() if next(iter(row.values()))[0]["last"]["score"] is not None
    }
    names, datasets = shared_tasks({dataset: set(row) for dataset, row in scored.items()})
    if len(names) < 2:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.8 + 0.35 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(names):
        middle, low, high = iqm_interval([[value_of(run) for run in scored[dataset][name]] for dataset in datasets])
        axes.barh(i, high - low, left=low, height=0.6, color=f"C{i}", alpha=0.45)
        axes.plot([middle, middle], [i - 0.3, i + 0.3], color="black")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"interquartile mean of the D4RL scale over {', '.join(datasets)}", fontsize=8)
    figure.savefig(path, dpi=110)
    return True


def shared_tasks(covered: Mapping[str, set[str]]) -> tuple[list[str], list[str]]:
    """(algorithms, tasks) such that every one of the algorithms has every one of the tasks, and their product is largest."""
    best: tuple[list[str], list[str]] = ([], [])
    for names in covered.values():
        for most in [names, *(names & other for other in covered.values())]:
            tasks = [task for task, has in covered.items() if most <= has]
            if most and (len(most) * len(tasks), len(most)) > (len(best[0]) * len(best[1]), len(best[0])):
                best = sorted(most), tasks
    return best
