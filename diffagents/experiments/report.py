"""The report of a grid: results.csv, README.md, curves.png and iqm.png, made from the results.json of its runs."""

import csv
import html
import io
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffagents.errors import one_line, printable, short
from diffagents.evaluation.statistics import FEW_SEEDS, expected_choice, iqm_interval, over_seeds
from diffagents.experiments.grid import RESULTS, RunSpec
from diffagents.files import replacing
from diffagents.storage import artifact
from diffagents.storage.card import plain

Run = Mapping[str, Any]
"""The content of a results.json, as `grid.run_one` returns it."""
COLUMNS = (
    *("cell", "algorithm", "dataset", "seed", "name", "steps", "last_return", "last_score", "last_success", "last_length"),
    *("best_return", "best_score", "best_at", "data_return", "data_score", "data_sha256", "seconds", "machine", "commit"),
)
"""Columns of results.csv."""


def read_runs(root: str | Path) -> list[dict[str, Any]]:
    """The results of all finished runs under `root`, sorted by name.

    A file that is damaged, or that another version wrote, is left out with a warning.
    """
    runs = []
    for path in sorted(Path(root).expanduser().glob(f"*/{RESULTS}")):
        try:
            run = artifact.read_json(path.parent, RESULTS)
            _check(run, path.parent.name)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            cause = printable(one_line(error))[:200]
            warnings.warn(
                f"{printable(path)} is left out: it is damaged or was written by another version ({cause}); delete its folder "
                "to repeat the run",
                stacklevel=2,
            )
        else:
            runs.append(run)
    return runs


def _check(run: dict[str, Any], name: str) -> None:
    """Make all tables of one run, and throw them away. Raises whatever they raise for a file of another form."""
    spec = run["spec"]
    for value in (run["cell"], spec["algorithm"], spec["dataset"], spec.get("label", "")):
        if not isinstance(value, str):
            raise TypeError(f"{short(value)} is no name")
    for value in (spec["seed"], spec["episodes"], spec["point_episodes"]):
        if type(value) is not int:
            raise TypeError(f"{short(value)} is no whole number")
    if run["name"] != name:
        raise ValueError(f"it is the result of {short(run['name'])}")
    cells, unit = cells_of([run]), unit_of([run])
    as_csv([run])
    overview(cells)
    details(cells, "")
    verdicts(cells)
    if not all(map(math.isfinite, [*_episodes(run, unit), *(value_of(row, unit) for row in (*curve_of(run), run["data"]))])):
        raise ValueError("a value is not finite")
    if not run["last"]["returns"]:
        raise ValueError("no episode is in it")


def write_report(
    runs: Sequence[Run], folder: str | Path, *, specs: Sequence[RunSpec] = (), command: str, title: str, remarks: str = ""
) -> Path:
    """Write tables and pictures.

    Args:
        runs: results of finished runs.
        folder: where to write; created if needed.
        specs: the whole grid, to list the runs that are missing.
        command: the command that repeats a cell, with `CELL` in place of its name.
        title: heading of the page.
        remarks: Markdown text above the tables.

    Returns:
        The path of the README.md.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    cells = cells_of(runs)
    with replacing(folder / "results.csv", "the table") as part:
        part.write_text(as_csv(runs), encoding="utf-8")
    pictures = []
    try:
        if draw_curves(cells, folder / "curves.png"):
            pictures.append("![Evaluations while training, by dataset](curves.png)")
        if draw_iqm(cells, folder / "iqm.png"):
            pictures.append("![Interquartile means with their intervals](iqm.png)")
        if draw_choice(cells, folder / "choice.png"):
            pictures.append("![Value of the best of the runs, by the number of episodes that chose it](choice.png)")
    except ImportError:
        pictures.append("No pictures: matplotlib is missing (`pip install matplotlib`).")
    parts = [
        f"# {title}\n",
        "Generated from the results of the runs: do not edit. Each row of [results.csv](results.csv) is one run.\n",
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
    text = "\n".join(part for part in parts if part is not None).rstrip() + "\n"
    with replacing(path, "the report") as part:
        part.write_text(text, encoding="utf-8")
    return path


# ---- numbers ---------------------------------------------------------------------------------------------------------


def cells_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by cell: cell -> its runs, sorted by seed.

    Raises:
        ValueError: if two runs of a cell have the same seed, or differ in more than their seeds.
    """
    cells: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run["cell"], run["spec"]["seed"])):
        cells[run["cell"]].append(run)
    for cell, members in cells.items():
        acted = [{"deterministic": run["last"]["deterministic"]} for run in members]  # what None in a spec came to
        without_seed = [{"label": "", **run["spec"], "seed": None, **how} for run, how in zip(members, acted, strict=True)]
        if any(spec != without_seed[0] for spec in without_seed) or len({run["data"]["sha256"] for run in members}) > 1:
            raise ValueError(
                f"the runs of {cell} differ in more than their seeds: keep only runs with the same settings and data"
            )
        if len({run["spec"]["seed"] for run in members}) < len(members):
            raise ValueError(f"two runs of {cell} have the same seed")
    return dict(cells)


def median_run(members: Sequence[Run]) -> Run:
    """The run with the median last return; of an even number, the lower of the two in the middle."""
    return sorted(members, key=lambda run: run["last"]["mean_return"])[(len(members) - 1) // 2]


def unit_of(runs: Iterable[Run]) -> str:
    """The unit in which runs on one dataset are compared: "D4RL scale", "success %" if returns count successes, or "return"."""
    members = list(runs)
    if all(run["last"]["score"] is not None for run in members):
        return "D4RL scale"
    return "success %" if all(map(_counts_successes, members)) else "return"


def _counts_successes(run: Run) -> bool:
    """Whether the return is 1 for a success and 0 otherwise."""
    last, data = run["last"], run["data"]["mean_return"]
    return last["success_rate"] is not None and abs(last["mean_return"] - last["success_rate"]) < 1e-6 and 0.0 <= data <= 1.0


def value_of(row: Mapping[str, Any], unit: str) -> float:
    """The value of a `last`, `data` or `curve` row of a run in a unit of `unit_of`."""
    return float(row["score"] if unit == "D4RL scale" else row["mean_return"] * (100.0 if unit == "success %" else 1.0))


def curve_of(run: Run) -> list[dict[str, Any]]:
    """The evaluations during training, followed by that of the last policy with all its episodes."""
    last = {key: run["last"][key] for key in ("mean_return", "score")}
    return [*run["curve"][:-1], *({**row, **last} for row in run["curve"][-1:])]


def best_of(run: Run) -> dict[str, Any]:
    """The row of `curve_of` with the highest return; without evaluations during training, that of the last policy."""
    return max(curve_of(run) or [run["last"]], key=lambda row: row["mean_return"])


# ---- tables ----------------------------------------------------------------------------------------------------------


def as_csv(runs: Sequence[Run]) -> str:
    """A table in CSV with one row per run and the columns COLUMNS."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for run in sorted(runs, key=lambda run: (run["cell"], run["spec"]["seed"])):
        last, best, data = run["last"], best_of(run), run["data"]
        row = {"cell": run["cell"], "name": run["name"], **{key: run["spec"][key] for key in ("algorithm", "dataset", "seed")}}
        row |= {"steps": " ".join(f"{stage}={steps}" for stage, steps in run["stage_steps"].items())}
        row |= {"last_return": last["mean_return"], "last_score": last["score"], "last_success": last["success_rate"]}
        row |= {"last_length": last["mean_length"], "best_return": best["mean_return"], "best_score": best["score"]}
        row |= {"best_at": best.get("num_timesteps"), "data_return": data["mean_return"], "data_score": data["score"]}
        row |= {"data_sha256": data["sha256"], "seconds": round(run["seconds"], 1)}
        table.writerow(row | {"machine": run["machine"], "commit": run["commit"]})
    return text.getvalue()


def _code(text: object) -> str:
    """A name from a file as code in a table of Markdown, which it cannot leave."""
    plain = " ".join(printable(text).replace("`", "'").split())
    return f"`{html.escape(plain, quote=False).replace('|', chr(92) + '|')}`"


def _drawn(text: str) -> str:
    """A text from a file in a picture, in which it is no formula."""
    return printable(text).replace("$", r"\$")


def _column(members: Sequence[Run]) -> str:
    """Heading of a column: the algorithm and the label of its settings."""
    return " ".join(filter(None, (members[0]["spec"]["algorithm"], members[0]["spec"].get("label", ""))))


def _by_dataset(cells: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Sequence[Run]]]:
    """dataset -> column (algorithm and label) -> runs."""
    found: dict[str, dict[str, Sequence[Run]]] = defaultdict(dict)
    for members in cells.values():
        found[members[0]["spec"]["dataset"]][_column(members)] = members
    return {dataset: found[dataset] for dataset in sorted(found)}


def _units(cells: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """dataset -> the unit of its runs."""
    return {dataset: unit_of(run for members in row.values() for run in members) for dataset, row in _by_dataset(cells).items()}


def _spread(values: Sequence[float]) -> str:
    """The mean and, if there are several seeds, their range or its interval."""
    mean, low, high, kind = over_seeds(values)
    return f"{mean:.1f}" if kind == "value" else f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _mean(members: Sequence[Run], unit: str) -> float:
    """The mean over seeds of the last policies."""
    return float(np.mean(_lasts(members, unit)))


def _lasts(members: Sequence[Run], unit: str) -> list[float]:
    """The values of the last policies."""
    return [value_of(run["last"], unit) for run in members]


def overview(cells: Mapping[str, Sequence[Run]]) -> str:
    """A table with a row per dataset and a column per algorithm: mean over seeds of the last policies, and their spread."""
    algorithms, units = sorted({_column(members) for members in cells.values()}), _units(cells)
    lines = [
        "LAST policy of each run: mean over seeds, in brackets the range from the lowest seed to the highest (from five seeds",
        "on the 95 % interval of the mean by Student's t), next to the mean of the data's own episodes. On the D4RL scale 0 is",
        "D4RL's random policy and 100 its expert, in mujoco-py; results from other physics or other data are not comparable",
        "with published tables.\n",
        f"| dataset | unit | the data | {' | '.join(map(plain, algorithms))} |",
        f"|{'---|' * (len(algorithms) + 3)}",
    ]
    for dataset, row in _by_dataset(cells).items():
        unit = units[dataset]
        means = {name: _mean(members, unit) for name, members in row.items()}
        entries = [
            "-"
            if name not in row
            else ("**{}**" if means[name] == max(means.values()) else "{}").format(_spread(_lasts(row[name], unit)))
            + ("" if len(row[name]) > 1 else " (1)")
            for name in algorithms
        ]
        data = value_of(next(iter(row.values()))[0]["data"], unit)
        lines.append(f"| {_code(dataset)} | {unit} | {data:.1f} | {' | '.join(entries)} |")
    lines += _mean_row(cells, algorithms)
    return "\n".join([*lines, "", "(1): one seed. -: not run. Bold: the highest mean, regardless of the spread.\n"])


def _mean_row(cells: Mapping[str, Sequence[Run]], algorithms: Sequence[str]) -> list[str]:
    """The mean on the D4RL scale over the datasets on which most algorithms ran, of those that ran on all of them.

    No row for one dataset.
    """
    units = _units(cells)
    scored = {dataset: row for dataset, row in _by_dataset(cells).items() if units[dataset] == "D4RL scale"}
    names, datasets = shared_tasks({dataset: set(row) for dataset, row in scored.items()})
    if len(datasets) < 2:
        names, datasets = [name for name in algorithms if all(name in row for row in scored.values())], list(scored)
    if len(datasets) < 2 or not names:
        return []
    rows = [scored[dataset] for dataset in datasets]
    data = np.mean([value_of(next(iter(row.values()))[0]["data"], "D4RL scale") for row in rows])
    entries = [
        f"{np.mean([_mean(row[name], 'D4RL scale') for row in rows]):.1f}" if name in names else "-" for name in algorithms
    ]
    which = f"these {len(datasets)}" if len(datasets) == len(scored) else f"the {len(datasets)} without gaps"
    return [f"| mean of {which} | D4RL scale | {data:.1f} | {' | '.join(entries)} |"]


def clone_among(names: Iterable[str]) -> str | None:
    """The algorithm with which the others are compared: BC, a deterministic clone; if it was not run, DiffusionBC."""
    return next((name for name in ("BC", "DiffusionBC") if name in names), None)


def details(cells: Mapping[str, Sequence[Run]], command: str) -> str:
    """A table with a row per cell: what is needed to judge it and to repeat it."""
    specs, units = [members[0]["spec"] for members in cells.values()], _units(cells)
    during = [spec for spec in specs if spec.get("points", 2) > 1]  # with fewer there is the last evaluation only
    episodes = ", ".join(map(str, sorted({spec["episodes"] for spec in specs})))
    fewer = ", ".join(map(str, sorted({spec["point_episodes"] for spec in during})))
    lines = [
        "The raw return of the last policy, and its value in the unit above, also by seed (in brackets the median seed, whose",
        f"policy is kept): {episodes} episodes per run, resets seeded 1000, 1001, ... Then the best evaluation of the run and",
        f"its step; evaluations during training play {fewer} episodes. Choosing a policy by the episodes on which it is",
        "reported is biased upwards: the column serves to compare with papers that report it.\n",
    ]
    if not during:
        lines[1:] = [
            f"policy is kept): {episodes} episodes per run, resets seeded 1000, 1001, ... No policy was evaluated during",
            "training, so that the best evaluation is the last.\n",
        ]
    lines += [
        "| cell | seeds | raw return | last | last by seed | best | at step | updates | minutes per run | machine | commit |",
        f"|{'---|' * 11}",
    ]
    for cell, members in cells.items():
        kept, unit = median_run(members), units[members[0]["spec"]["dataset"]]
        lasts, bests = _lasts(members, unit), [best_of(run) for run in members]
        by_seed = ", ".join(f"({x:.1f})" if run is kept else f"{x:.1f}" for run, x in zip(members, lasts, strict=True))
        steps = ", ".join(f"{plain(stage)} {count:,}" for stage, count in members[0]["stage_steps"].items())
        at = ", ".join(f"{row['num_timesteps']:,}" if "num_timesteps" in row else "last" for row in bests)
        minutes = ", ".join(f"{run['seconds'] / 60:.0f}" for run in members)
        lines.append(
            f"| {_code(cell)} | {len(members)} | {_spread([run['last']['mean_return'] for run in members])} | {_spread(lasts)} "
            f"| {by_seed} | {_spread([value_of(row, unit) for row in bests])} | {at} | {steps} | {minutes} "
            f"| {_unique(run['machine'] for run in members)} | {_unique(run['commit'] for run in members)} |"
        )
    return "\n".join([*lines, "", f"To repeat a cell:\n\n```sh\n{command}\n```\n"])


def _unique(values: Any) -> str:
    return ", ".join(dict.fromkeys(plain(value or "-") for value in values))


def verdicts(cells: Mapping[str, Sequence[Run]]) -> str:
    """A list of the cells whose mean over seeds does not exceed the mean of the data, or that of the clone (`clone_among`).

    Args:
        cells: the runs by cell.
    """
    lines, units, alone = [], _units(cells), []
    baseline = clone_among(_column(members) for members in cells.values()) or "DiffusionBC"
    for dataset, row in _by_dataset(cells).items():
        if baseline not in row:
            alone.append(_code(dataset))
        for name, members in row.items():
            mean = _mean(members, units[dataset])
            bars = {"the data's mean": value_of(members[0]["data"], units[dataset])}
            if baseline in row and name != baseline:
                bars[baseline] = _mean(row[baseline], units[dataset])
            below = [f"{bar} ({value:.1f})" for bar, value in bars.items() if mean <= value]
            if name != baseline and below:
                seeds = f"{len(members)} seed{'s' * (len(members) > 1)}"
                lines.append(f"* {_code(dataset)}: {plain(name)} ({mean:.1f}, {seeds}) does not beat {' or '.join(below)}")
    lines = lines or [f"* none: every algorithm beats the data's mean{'' if alone else f' and {baseline}'} wherever it was run"]
    if alone:
        lines.append(f"* {baseline} was not run on {', '.join(alone)}: there the comparison is with the data only")
    return "\n".join(
        [f"Cases in which the mean of an algorithm does not exceed the mean of the data, or that of {baseline}:\n", *lines, ""]
    )


def missing(runs: Sequence[Run], specs: Sequence[RunSpec]) -> str | None:
    """A list of the runs of the grid that are missing; None if there are none."""
    made = {run["name"] for run in runs}
    lacking: dict[str, list[str]] = defaultdict(list)
    for spec in specs:
        if spec.name not in made:
            lacking[spec.cell].append(str(spec.seed))
    if not lacking:
        return None
    lines = [f"* {_code(cell)}: seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}" for cell, seeds in lacking.items()]
    return "\n".join(["## Missing runs\n", "Runs of the grid that have not been made:\n", *lines])


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw_curves(cells: Mapping[str, Sequence[Run]], path: Path) -> bool:
    """Draw the evaluations during training, one panel per dataset: mean over seeds, lowest to highest seed shaded.

    Returns:
        Whether there was anything to draw.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    rows = {dataset: row for dataset, row in _by_dataset(cells).items() if any(m[0]["curve"] for m in row.values())}
    if not rows:
        return False
    figure, panels = _panels(list(rows))
    units, names = _units(cells), sorted({name for row in rows.values() for name in row})
    for axes, (dataset, row) in zip(panels, rows.items(), strict=True):
        unit, clone = units[dataset], clone_among(row)
        for name, members in row.items():
            if name == clone:
                level = _mean(members, unit)
                axes.axhline(level, color="black", linestyle="--", linewidth=1, label=_drawn(f"{name}, the clone"))
                continue
            curves = [curve_of(run) for run in members if len(run["curve"]) == len(members[0]["curve"])]
            if not curves[0]:
                continue
            y = np.array([[value_of(point, unit) for point in curve] for curve in curves])
            x, color = np.linspace(0, 1, len(curves[0]) + 1)[1:], f"C{names.index(name)}"
            axes.plot(x, y.mean(0), label=_drawn(name), color=color, marker=".")
            axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
        data = next(iter(row.values()))[0]["data"]
        axes.axhline(value_of(data, unit), color="gray", linestyle=":", label="the data")
        axes.set_ylabel(unit, fontsize=8)
        axes.set_xlabel("share of the stage that makes the policy", fontsize=8)
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(8, len(handles)), fontsize=8)
    _save(figure, path)
    return True


def _panels(datasets: Sequence[str]) -> tuple[Any, list[Any]]:
    """A figure with a panel for each dataset, three in a row; the figure and its axes. Raises ImportError."""
    from matplotlib.figure import Figure

    columns = min(3, len(datasets))
    height = -(-len(datasets) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * height), layout="constrained")
    panels = [figure.add_subplot(height, columns, i + 1) for i in range(len(datasets))]
    for axes, dataset in zip(panels, datasets, strict=True):
        axes.set_title(_drawn(dataset), fontsize=9)
        axes.tick_params(labelsize=7)
    return figure, panels


def _save(figure: Any, path: Path) -> None:
    with replacing(path, "the picture") as part:
        figure.savefig(part, format="png", dpi=110)


def draw_iqm(cells: Mapping[str, Sequence[Run]], path: Path) -> bool:
    """Draw the interquartile mean of the D4RL scale over datasets that the drawn algorithms share.

    An algorithm counts with as many seeds on each dataset as it has on all of them; with one seed it has no interval.

    Returns:
        Whether at least two algorithms share a dataset.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    units = _units(cells)
    scored = {dataset: row for dataset, row in _by_dataset(cells).items() if units[dataset] == "D4RL scale"}
    names, datasets = shared_tasks({dataset: set(row) for dataset, row in scored.items()})
    if len(names) < 2:
        return False
    from matplotlib.figure import Figure

    seeds = {name: min(len(scored[dataset][name]) for dataset in datasets) for name in names}
    figure = Figure(figsize=(7, 1.0 + 0.35 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.use_sticky_edges = False  # so that no bar ends at the frame
    lasts = {name: [_lasts(scored[dataset][name], "D4RL scale")[: seeds[name]] for dataset in datasets] for name in names}
    found = sorted((*iqm_interval(lasts[name]), name) for name in names)
    names = [name for *_, name in found]
    for i, (middle, low, high, name) in enumerate(found):
        if seeds[name] > 1:
            axes.barh(i, high - low, left=low, height=0.6, color=f"C{i}", alpha=0.45)
        axes.plot([middle, middle], [i - 0.3, i + 0.3], color="black")
    axes.set_yticks(range(len(names)), [_drawn(f"{name}, {_counted(seeds[name], 'seed')}") for name in names])
    axes.set_xlabel(f"interquartile mean of the D4RL scale over {_counted(len(datasets), 'dataset')}", fontsize=8)
    few = any(1 < count < FEW_SEEDS for count in seeds.values())
    interval = "bars: stratified bootstrap interval" + (", which covers less than 90 % with so few seeds" if few else "")
    axes.set_title(interval if max(seeds.values()) > 1 else "one seed of each: no interval", fontsize=8)
    _save(figure, path)
    return True


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what a page has between two markers.

    Args:
        path: The page.
        begin: The marker before the text, with the end of its line.
        end: The marker after it.
        text: What is to stand between them.

    Raises:
        ValueError: The page lacks one of the markers.
    """
    before, found, rest = path.read_text().partition(begin)
    _, last, after = rest.partition(end)
    if not (found and last):
        raise ValueError(f"{path} has lost its two markers")
    path.write_text(before + begin + text + end + after)


def draw_choice(cells: Mapping[str, Sequence[Run]], path: Path) -> bool:
    """Draw what the best of an algorithm's runs is worth, by the episodes that were played to choose it.

    One panel per dataset, one line per algorithm over all its runs there, of whatever setting and seed: a table that reports
    the best setting has spent the episodes on the axis; see `expected_choice`.

    Returns:
        Whether an algorithm has several runs on a dataset.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    units = _units(cells)
    pools: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for members in cells.values():
        for run in members:
            pools[run["spec"]["dataset"]][run["spec"]["algorithm"]].append(run)
    rows = {dataset: {name: pool for name, pool in row.items() if len(pool) > 1} for dataset, row in sorted(pools.items())}
    rows = {dataset: row for dataset, row in rows.items() if row}
    if not rows:
        return False
    figure, panels = _panels(list(rows))
    names = sorted({name for row in rows.values() for name in row})
    for axes, (dataset, row) in zip(panels, rows.items(), strict=True):
        for name, pool in row.items():
            episodes = [_episodes(run, units[dataset]) for run in pool]
            numbers = [n for n in (0, 1, 2, 3, 5, 10, 20, 50) if n <= min(map(len, episodes))]
            values = [expected_choice(episodes, n) for n in numbers]
            label = _drawn(f"{name} (of {len(pool)})")
            axes.plot([n * len(pool) for n in numbers], values, marker=".", color=f"C{names.index(name)}", label=label)
        axes.set_ylabel(f"{units[dataset]} of the chosen policy", fontsize=8)
        axes.set_xlabel("episodes played to choose the best of an algorithm's runs", fontsize=8)
        axes.legend(fontsize=6)
    _save(figure, path)
    return True


def _episodes(run: Run, unit: str) -> list[float]:
    """The value of each episode of the last policy."""
    last = run["last"]
    if unit == "D4RL scale":
        _, zero, hundred = last["score_reference"]
        return [100.0 * (value - zero) / (hundred - zero) for value in last["returns"]]
    return [value * (100.0 if unit == "success %" else 1.0) for value in last["returns"]]


def shared_tasks(covered: Mapping[str, set[str]]) -> tuple[list[str], list[str]]:
    """The largest complete block of a table.

    Args:
        covered: task -> algorithms that were run on it.

    Returns:
        (algorithms, tasks): each of the algorithms was run on each of the tasks, and the product of their numbers is largest.
    """
    best: tuple[list[str], list[str]] = ([], [])
    for names in covered.values():
        for most in [names, *(names & other for other in covered.values())]:
            tasks = [task for task, has in covered.items() if most <= has]
            if most and (len(most) * len(tasks), len(most)) > (len(best[0]) * len(best[1]), len(best[0])):
                best = sorted(most), tasks
    return best
