"""A dataset's report as text and as one self-contained page of HTML."""

import base64
import html
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diffagents.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 24
"""Dimensions in a table of the text; the page shows `MOST_ROWS_OF_PAGE`."""
MOST_ROWS_OF_PAGE = 200
MOST_PANELS = 12
BLUE, ORANGE, GREY = "#2f6db0", "#d9822b", "#9aa5b1"

Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""


@dataclass(frozen=True)
class DatasetReport:
    """What `describe` found. `str()` gives the text; notebooks show the page.

    Attributes:
        facts: The measurements, JSON values, by section.
        findings: What looks wrong or surprising, one sentence each; first what the checks of `load_dataset` say.
        advice: (topic, sentence) on how to begin, with the reason.
        refused: Why `load_dataset` refuses the data, or None. If it does, `facts` contains only what the single arrays hold.
        pictures: Arrays from which `to_html` draws.
    """

    facts: dict[str, Any]
    findings: list[str]
    advice: list[tuple[str, str]]
    refused: str | None
    pictures: dict[str, Any]

    def __str__(self) -> str:
        return as_text(self)

    def to_html(self) -> str:
        """The report as one self-contained page: no scripts, nothing to be fetched.

        Raises:
            ImportError: If matplotlib is missing.
        """
        return as_html(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def to_json(self) -> dict[str, Any]:
        """All but the pictures, as plain JSON values."""
        return {"facts": self.facts, "findings": self.findings, "advice": dict(self.advice), "refused": self.refused}


def evenly(n: int, most: int) -> np.ndarray:
    """Indices of an even sample of at most `most` of n rows, with the first and the last."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))


def number(value: float | None) -> str:
    """Four significant digits; whole numbers up to a million in full."""
    if value is None:
        return "-"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def percent(share: float) -> str:
    """A share in per cent: 0 and 1 only if exact."""
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{share:.1%}".replace("%", " %") if 0 < share < 1 else f"{share:.0%}".replace("%", " %")


# ---- what is said, in both forms -----------------------------------------------------------------------------------------


def headline(facts: Mapping[str, Any]) -> str:
    """One line on what the data are."""
    data = facts["data"]
    keys = f" ({', '.join(data['obs_keys'])})" if data["obs_keys"] else ""
    env = f", environment {data['env_id']}" if data["env_id"] else ""
    return (
        f"{data['n_steps']:,} steps in {data['n_episodes']:,} episodes; {data['obs_dim']} numbers observed{keys}, "
        f"{data['act_dim']} in an action{env}"
    )


def sentences(facts: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(section, sentences) for the sections without tables."""
    said = [
        ("Episodes", _about_episodes(facts["episodes"])),
        ("Returns", _about_returns(facts["returns"])),
        ("Rewards", _about_rewards(facts["rewards"])),
        ("Copies and jumps", _about_copies(facts["duplicates"], facts["jumps"])),
        ("Coverage", _about_coverage(facts["coverage"], facts["data"]["obs_dim"])),
    ]
    clone = facts.get("clone")
    if clone and clone["share_unexplained"] is not None:
        said.append(("Noise of the actions", _about_noise(clone)))
    return said


def _about_episodes(episodes: Mapping[str, Any]) -> list[str]:
    ends = [f"terminated: {episodes['n_terminated']:,}", f"cut: {episodes['n_truncated']:,}"]
    if episodes["n_unfinished"]:
        ends.append(f"unfinished: {episodes['n_unfinished']:,}")
    return [f"Length {_range(episodes)}.", f"How they end: {', '.join(ends)}."]


def _about_returns(returns: Mapping[str, Any]) -> list[str]:
    score = "" if returns["score"] is None else f"; D4RL scale {returns['score']:.1f}"

    def places(rows: Sequence[Mapping[str, Any]]) -> str:
        return ", ".join(f"episode {row['episode']} ({number(row['return'])} in {row['length']} steps)" for row in rows)

    said = [
        f"{_range(returns)}, over {returns['n']:,} whole episodes{score}.",
        f"The best tenth returns {number(returns['best_tenth'])}.",
    ]
    return said + [f"{name}: {places(returns[name.lower()])}." for name in ("Best", "Worst") if returns[name.lower()]]


def _about_rewards(rewards: Mapping[str, Any]) -> list[str]:
    often = f"The commonest value is {number(rewards['commonest'])} ({percent(rewards['share_commonest'])} of the rows)."
    return [
        f"{_range(rewards)}; zero in {percent(rewards['share_zero'])} of the rows.",
        often if rewards["share_commonest"] > 0.01 else "No value occurs often.",
    ]


def _about_copies(duplicates: Mapping[str, Any], jumps: Mapping[str, Any]) -> list[str]:
    return [
        f"Episodes that are exact copies of earlier ones: {duplicates['n_exact']:,}; that nearly equal one: "
        f"{duplicates['n_near']:,} ({duplicates['n_compared']:,} different ones compared).",
        f"Transitions that jump: {jumps['n']:,}.",
    ]


def _about_coverage(coverage: Mapping[str, Any], obs_dim: int) -> list[str]:
    said = [
        f"{coverage['n_varying']} of {obs_dim} observed numbers vary; {coverage['n_components']} principal components contain "
        "95 % of the variance."
    ]
    if coverage["best_tenth_visits"] is not None:
        said.append(f"The best tenth of the episodes visits {percent(coverage['best_tenth_visits'])} of the places of all.")
    return said


def _about_noise(clone: Mapping[str, Any]) -> list[str]:
    of = f"{clone['n_episodes_held_out']} episodes" if clone["n_episodes_held_out"] else "rows"
    return [
        f"A clone, trained for {clone['seconds']:.0f} s, leaves {percent(clone['share_unexplained'])} of the variance of the "
        f"actions unexplained, on {of} that it did not see.",
        "What is left is noise, several ways to act, or what the observation does not show.",
    ]


def _range(row: Mapping[str, Any]) -> str:
    """Mean, standard deviation, extremes and median."""
    numbers = {key: number(value) for key, value in row.items() if key in ("mean", "std", "min", "max", "median")}
    return "{mean} ± {std}, from {min} to {max}, median {median}".format(**numbers)


def observation_table(facts: Mapping[str, Any]) -> Table:
    """A row per dimension of the observation."""
    rows = []
    for row in facts["observations"]:
        notes = ["constant"] if row["constant"] else [f"{row['n_values']} values"] if row["n_values"] else []
        notes += [f"{row['n_outliers']:,} outliers"] if row["n_outliers"] else []
        notes += ["an angle"] if row["n_turns"] else []
        columns = ("mean", "std", "min", "low", "median", "high", "max")
        rows.append([row["name"], *(number(row[key]) for key in columns), ", ".join(notes)])
    return ["dimension", "mean", "std", "min", "1 %", "median", "99 %", "max", "notes"], rows


def action_table(facts: Mapping[str, Any]) -> Table:
    """A row per dimension of the action."""
    unexplained = (facts.get("clone") or {}).get("unexplained")
    rows = []
    for i, row in enumerate(facts["actions"]):
        note = "constant" if row["constant"] else f"{row['n_values']} values" if row["n_values"] else ""
        note += f"{', ' if note else ''}{row['n_outliers']:,} outliers" if row["n_outliers"] else ""
        rows.append(
            [
                row["name"],
                f"{number(row['bounds'][0])} to {number(row['bounds'][1])}",
                *(number(row[key]) for key in ("mean", "std", "low", "high")),
                percent(row["at_low"]),
                percent(row["at_high"]),
                "-" if unexplained is None or row["constant"] else percent(unexplained[i]),
                note,
            ]
        )
    return ["dimension", "bounds", "mean", "std", "1 %", "99 %", "at low bound", "at high", "unexplained", "notes"], rows


def array_table(facts: Mapping[str, Any]) -> Table:
    """A row per array of refused data."""
    rows = []
    for row in facts["arrays"]:
        columns = ", ".join(f"{i} ({n})" for i, n in row["bad_columns"].items())
        notes = f"bad values in columns {columns}; first in row {row['first_bad_row']}" if columns else ""
        shape = " x ".join(map(str, row["shape"])) or "a number"
        numbers = [number(row["min"]), number(row["max"]), f"{row['n_nan']:,}", f"{row['n_infinite']:,}"]
        rows.append([row["name"], shape, row["dtype"], *numbers, notes])
    return ["array", "shape", "dtype", "min", "max", "NaN", "infinite", "notes"], rows


# ---- text ------------------------------------------------------------------------------------------------------------------


def as_text(report: DatasetReport) -> str:
    """The report for a terminal."""
    if report.refused is not None:
        lines = [
            f"These data are refused: {report.refused}",
            "",
            "The arrays as they are:",
            *_aligned(array_table(report.facts)),
        ]
        return printable("\n".join(lines))
    data = report.facts["data"]
    lines = [f"{data['id']} ({data['kind']})", f"  {headline(report.facts)}", f"  sha256 {data['sha256']}"]
    lines += ["", "Findings", *([f"  - {finding}" for finding in report.findings] or ["  none"])]
    lines += ["", "Advice", *(f"  {topic}: {text}" for topic, text in report.advice)]
    for title, said in sentences(report.facts):
        lines += ["", title, *(f"  {sentence}" for sentence in said)]
    for title, table in (("Observations", observation_table(report.facts)), ("Actions", action_table(report.facts))):
        lines += ["", title, *_aligned(table)]
    return printable("\n".join(lines))


def _aligned(table: Table) -> list[str]:
    """A table in columns, numbers to the right."""
    headings, rows = table
    shown = [headings, *rows[:MOST_ROWS]]
    widths = [max(len(row[i]) for row in shown) for i in range(len(headings))]
    last = len(headings) - 1
    lines = []
    for row in shown:
        cells = [
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    if len(rows) > MOST_ROWS:
        lines.append(f"  and {len(rows) - MOST_ROWS} more")
    return lines


# ---- a page ----------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; max-width: 1080px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15em; margin: 1.6em 0 .4em; }
.sub { color: #5b6875; margin: .2em 0; overflow-wrap: anywhere; }
code { font-size: .9em; }
ul { margin: .3em 0; padding-left: 1.3em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3em 1em; margin: .3em 0; }
dt { font-weight: 600; }
dd { margin: 0; }
.box { border-left: 4px solid #d9822b; background: #fdf6ee; padding: .5em 1em; overflow-wrap: anywhere; }
.good { border-color: #3a9a5b; background: #f0f8f2; }
.advice { border-color: #2f6db0; background: #f1f6fb; }
.refused { border-color: #c0392b; background: #fdf0ee; }
.tiles { display: flex; flex-wrap: wrap; gap: .8em; margin: 1em 0; }
.tile { border: 1px solid #dfe5ea; border-radius: 6px; padding: .5em .9em; }
.tile b { display: block; font-size: 1.25em; }
.tile span { color: #5b6875; font-size: .85em; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: .5em 1em; }
.wide { grid-column: 1 / -1; }
img { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88em; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; text-align: right; white-space: nowrap; border-bottom: 1px solid #edf0f3; }
th { color: #5b6875; font-weight: 600; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
@media (max-width: 480px) { .pictures { grid-template-columns: 1fr; } dl { grid-template-columns: 1fr; } }
"""


def as_html(report: DatasetReport) -> str:
    """The report as one page.

    Raises:
        ImportError: If matplotlib is missing.
    """
    e = html.escape
    if report.refused is not None:
        body = [
            "<h1>A dataset that is refused</h1>",
            f'<div class="box refused">{e(report.refused)}</div>',
            "<h2>The arrays as they are</h2>",
            _html_table(array_table(report.facts)),
        ]
        return _page("A dataset that is refused", body)
    data, episodes, returns = (report.facts[key] for key in ("data", "episodes", "returns"))
    tiles = [
        (f"{data['n_steps']:,}", "steps"),
        (f"{data['n_episodes']:,}", "episodes"),
        (number(episodes["median"]), "steps in the median episode"),
        (f"{number(returns['mean'])} ± {number(returns['std'])}", "return"),
        (number(returns["best_tenth"]), "return of the best tenth"),
    ]
    if returns["score"] is not None:
        tiles.append((f"{returns['score']:.1f}", "on D4RL's scale"))
    findings = "".join(f"<li>{e(finding)}</li>" for finding in report.findings)
    body = [
        f"<h1>{e(str(data['id']))}</h1>",
        f'<p class="sub">{e(headline(report.facts))}</p><p class="sub"><code>sha256 {e(str(data["sha256"]))}</code></p>',
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{e(x)}</b><span>{e(name)}</span></div>' for x, name in tiles)
        + "</div>",
        "<h2>Findings</h2>",
        f'<div class="box"><ul>{findings}</ul></div>' if findings else '<div class="box good">Nothing looks wrong.</div>',
        "<h2>Advice</h2>",
        '<div class="box advice"><dl>'
        + "".join(f"<dt>{e(topic)}</dt><dd>{e(text)}</dd>" for topic, text in report.advice)
        + "</dl></div>",
        "<h2>Pictures</h2>",
        '<div class="pictures">' + "".join(_pictures(report)) + "</div>",
    ]
    for title, said in sentences(report.facts):
        body.append(f"<h2>{e(title)}</h2><p>{'<br>'.join(map(e, said))}</p>")
    for title, table in (("Observations", observation_table(report.facts)), ("Actions", action_table(report.facts))):
        body += [f"<h2>{title}</h2>", _html_table(table)]
    return _page(str(data["id"]), body)


def _page(title: str, body: Sequence[str]) -> str:
    """A complete document."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    made = '<p class="sub">Made by <code>diffagents data</code>.</p>'
    lines = ["<!doctype html>", '<html lang="en">', f"<head>{head}<style>{STYLE}</style></head>", "<body>"]
    return "\n".join([*lines, *body, made, "</body></html>", ""])


def _html_table(table: Table) -> str:
    headings, rows = table
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[:MOST_ROWS_OF_PAGE]]
    more = f"<p class='sub'>and {len(rows) - MOST_ROWS_OF_PAGE} more</p>" if len(rows) > MOST_ROWS_OF_PAGE else ""
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>{more}'


# ---- pictures ----------------------------------------------------------------------------------------------------------------


def _pictures(report: DatasetReport) -> list[str]:
    """The pictures as <img> elements whose data are in the page."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError("a page has pictures, which need matplotlib: pip install matplotlib") from None
    drawn = [
        ("Lengths of episodes, and how they end", draw_lengths(report)),
        ("Returns", draw_returns(report)),
        ("Returns in the order of recording", draw_order(report)),
        ("Rewards (logarithmic)", draw_rewards(report)),
        ("Observations on their two principal components, and those of the best tenth of the episodes", draw_places(report)),
        ("Observations: 1 % to 99 %, thin to the extremes, in standard deviations", draw_observations(report)),
        ("Actions, between their bounds", draw_actions(report)),
    ]
    items = []
    for title, figure in drawn:
        if figure is None:
            continue
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a name in letters that the font lacks
            figure.savefig(buffer, format="png", dpi=110)
        wide = ' class="wide"' if figure.get_figwidth() > 8 else ""
        data = base64.b64encode(buffer.getvalue()).decode()
        items.append(f'<div{wide}><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></div>')
    return items


def _figure(title: str, width: float = 5.6, height: float = 3.2) -> "tuple[Figure, Axes]":
    """A figure with one set of axes in the style of the page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    _plain(axes)
    return figure, axes


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)


def draw_lengths(report: DatasetReport) -> "Figure":
    """Histogram of lengths, by the kind of end."""
    figure, axes = _figure("Lengths of episodes, and how they end")
    lengths, terminated = report.pictures["lengths"], report.pictures["terminated"]
    bins = np.histogram_bin_edges(lengths, bins=40).tolist()
    parts, labels = [lengths[terminated], lengths[~terminated]], ["terminated", "cut"]
    axes.hist(parts, bins=bins, stacked=True, color=[BLUE, GREY], label=labels)
    axes.set_xlabel("steps")
    axes.set_ylabel("episodes")
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_returns(report: DatasetReport) -> "Figure":
    """Histogram of returns with their mean and that of the best tenth."""
    figure, axes = _figure("Returns")
    facts = report.facts["returns"]
    axes.hist(report.pictures["returns"], bins=40, color=BLUE)
    for key, name, style in (("mean", "mean", "-"), ("best_tenth", "best tenth", "--")):
        axes.axvline(facts[key], color=ORANGE, linestyle=style, label=f"{name}: {number(facts[key])}")
    axes.set_xlabel("return of an episode")
    axes.set_ylabel("episodes")
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_order(report: DatasetReport) -> "Figure":
    """Returns over the number of the episode."""
    figure, axes = _figure("Returns in the order of recording")
    returns = report.pictures["returns"]
    shown = evenly(len(returns), 5000)
    axes.plot(shown, returns[shown], ".", color=BLUE, markersize=3, alpha=0.7)
    axes.set_xlabel("episode")
    axes.set_ylabel("return")
    return figure


def draw_rewards(report: DatasetReport) -> "Figure":
    """Histogram of rewards."""
    figure, axes = _figure("Rewards (logarithmic)")
    axes.hist(report.pictures["rewards"], bins=60, color=BLUE, log=True)
    axes.set_xlabel("reward of a step")
    axes.set_ylabel("rows of the sample")
    return figure


def draw_places(report: DatasetReport) -> "Figure | None":
    """Density of all observations and points of the best episodes on two principal components."""
    places = report.pictures["places"]
    if not places:
        return None
    figure, axes = _figure("Observations on two principal components; orange: the best tenth", height=4.0)
    points, of_best = places["points"], places["of_best"]
    low, high = np.quantile(points, (0.001, 0.999), axis=0)
    margin = 0.03 * np.maximum(high - low, 1e-9)
    window = [[low[0] - margin[0], high[0] + margin[0]], [low[1] - margin[1], high[1] + margin[1]]]
    density, xs, ys = np.histogram2d(points[:, 0], points[:, 1], bins=80, range=window)
    axes.pcolormesh(xs, ys, np.log1p(density.T), cmap="Blues", rasterized=True)
    best = points[of_best]
    best = best[:: max(1, len(best) // 1500)]
    axes.plot(best[:, 0], best[:, 1], ".", color=ORANGE, markersize=2, alpha=0.6)
    axes.set_xlim(*window[0])
    axes.set_ylim(*window[1])
    return figure


def draw_observations(report: DatasetReport) -> "Figure":
    """For each dimension the middle 98 % and the extremes, around the mean, in standard deviations."""
    table = [row for row in report.facts["observations"] if not row["constant"]][:MOST_ROWS_OF_PAGE]
    figure, axes = _figure("Observations: 1 % to 99 %, thin: to the extremes", height=4.0)
    for i, row in enumerate(table):
        scaled = {key: (row[key] - row["mean"]) / max(row["std"], 1e-12) for key in ("min", "low", "median", "high", "max")}
        axes.vlines(i, scaled["min"], scaled["max"], color=GREY, linewidth=1)
        axes.vlines(i, scaled["low"], scaled["high"], color=BLUE, linewidth=3 if len(table) < 60 else 1.5)
        axes.plot(i, scaled["median"], "_", color=ORANGE, markersize=6)
    axes.set_ylim(*np.clip(axes.get_ylim(), -12, 12))
    axes.set_xlabel("dimension")
    axes.set_ylabel("standard deviations from the mean")
    if len(table) <= 40:
        axes.set_xticks(
            range(len(table)),
            [row["name"].replace("$", r"\$") for row in table],
            rotation=90 if len(table) > 12 else 0,
            fontsize=7,
        )
    return figure


def draw_actions(report: DatasetReport) -> "Figure":
    """A histogram per dimension, between the bounds."""
    from matplotlib.figure import Figure

    table, actions = report.facts["actions"], report.pictures["actions"]
    n = min(len(table), MOST_PANELS)
    columns = min(n, 6)
    figure = Figure(figsize=(11.4 if columns > 2 else 5.6, 0.5 + 1.7 * -(-n // columns)), layout="constrained")
    shown = "" if n == len(table) else f" (the first {n} of {len(table)} dimensions)"
    figure.suptitle(f"Actions between their bounds{shown}", fontsize=10, x=0.01, ha="left")
    for i in range(n):
        axes = figure.add_subplot(-(-n // columns), columns, i + 1)
        _plain(axes)
        low, high = table[i]["bounds"]
        axes.hist(actions[:, i], bins=40, range=(low, high), color=BLUE)
        axes.set_title(table[i]["name"], fontsize=8)
        axes.set_yticks([])
    return figure
