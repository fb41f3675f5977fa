"""Directives that write an algorithm's tables while the site is built, from the code and the results that lie in the checkout.

{algorithm-list}            every registered algorithm, with its page and its main hyperparameter
{hyperparameters} SRPO      from the declarations in `SRPOConfig` and the block `fast` of zoo/srpo.yml
{budget} SRPO               gradient steps of each stage, by preset
{presets} SRPO              the blocks and rows of zoo/srpo.yml, with their sources
{facts} SRPO                what the class says about itself: stages, choices of `predict`, online learning
{zoo-results} SRPO          its rows of zoo/results.csv, and its line of the comparison on the included dataset
{comparison}                the stored result of examples/04_compare.py
{deviations} SRPO           the tagged lists [D1], [O1], [F1] at the top of its file
"""

import ast
import csv
import dataclasses
import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from diffagents.config.hyperparameters import describe
from diffagents.config.presets import BLOCKS, FAST, load_presets
from diffagents.evaluation.statistics import over_seeds
from diffagents.experiments.tune import MAIN_HYPERPARAMETER
from diffagents.registry import AGENTS, agent_class

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "zoo" / "results.csv"
COMPARISON = ROOT / "zoo" / "results" / "compare-reacher-replay.json"
_TOKEN = re.compile(r"(``?[^`]+`?`|\[[DOF]\d+\]|arXiv:\d{4}\.\d{5})")
_SECTION = re.compile(r"^(Details|Online|Fast recipe)(?: \((.*)\))?$", re.DOTALL)


class AlgorithmDirective(SphinxDirective):
    """A directive whose only argument is the name of an algorithm."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in AGENTS:
            raise self.error(f"{name!r} is no algorithm; choose from {', '.join(AGENTS)}")
        self.name_of_algorithm, self.cls = name, agent_class(name)
        for path in (self.presets_file, self.source_file):
            self.env.note_dependency(str(path))
        return self.content_nodes()

    @property
    def presets_file(self) -> pathlib.Path:
        return ROOT / "zoo" / f"{self.cls.presets_name()}.yml"

    @property
    def source_file(self) -> pathlib.Path:
        return ROOT / "diffagents" / "agents" / f"{self.cls.presets_name()}.py"

    def content_nodes(self) -> list[nodes.Node]:
        raise NotImplementedError

    # ---- text and tables ------------------------------------------------------------------------------------------
    def inline(self, text: str) -> list[nodes.Node]:
        """Text in which backticks are code, tags such as [D1] lead to the list below, and arXiv numbers to the paper."""
        found: list[nodes.Node] = []
        for piece in _TOKEN.split(text):
            if not piece:
                continue
            if piece.startswith("`"):
                found.append(nodes.literal("", piece.strip("`")))
            elif piece.startswith("[") and piece[1] in "DOF" and piece.endswith("]"):
                found.append(nodes.reference("", piece, refid=self.tag_id(piece), internal=True))
            elif piece.startswith("arXiv:"):
                found.append(nodes.reference("", piece, refuri=f"https://arxiv.org/abs/{piece[6:]}"))
            else:
                found.append(nodes.Text(piece))
        return found

    def tag_id(self, tag: str) -> str:
        return f"{self.name_of_algorithm.lower()}-{tag.strip('[]').lower()}"

    def paragraph(self, text: str) -> nodes.paragraph:
        return nodes.paragraph("", "", *self.inline(text))

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str | nodes.Node]], *, kind: str = "") -> nodes.table:
        """A table of texts as in `inline`; a cell may also be a node."""
        group = nodes.tgroup(cols=len(headings))
        group.extend(nodes.colspec(colwidth=1) for _ in headings)
        head, body = nodes.thead(), nodes.tbody()
        head.append(self.row(headings))
        body.extend(self.row(cells) for cells in rows)
        group += [head, body]
        return nodes.table("", group, classes=["generated", *([kind] if kind else [])])

    def row(self, cells: Sequence[str | nodes.Node]) -> nodes.row:
        row = nodes.row()
        for cell in cells:
            row.append(nodes.entry("", self.paragraph(cell) if isinstance(cell, str) else cell))
        return row

    def page_link(self, document: str, text: str) -> nodes.paragraph:
        """A link to another page of the site."""
        inner = nodes.literal("", text)
        link = addnodes.pending_xref("", inner, refdomain="std", reftype="doc", reftarget=document, refexplicit=True)
        link["refdoc"] = self.env.docname
        return nodes.paragraph("", "", link)


class AlgorithmList(AlgorithmDirective):
    required_arguments = 0

    def run(self) -> list[nodes.Node]:
        rows: list[list[str | nodes.Node]] = []
        for name in AGENTS:
            cls = agent_class(name)
            about = (cls.__doc__ or "").partition("\n")[0]
            main = MAIN_HYPERPARAMETER.get(name)
            rows.append(
                [self.page_link(f"/algorithms/{cls.presets_name()}", name), about, f"`{main.name}`" if main else "none"]
            )
        return [self.table(["class", "what it is", "main hyperparameter"], rows, kind="algorithms")]


class HyperparametersTable(AlgorithmDirective):
    def content_nodes(self) -> list[nodes.Node]:
        fast = load_presets(self.cls.presets_name())[FAST]
        rows: list[list[str | nodes.Node]] = []
        for one in describe(self.cls.Config):
            name = nodes.paragraph("", "", nodes.literal("", one.name))
            name["ids"].append(f"{self.name_of_algorithm.lower()}-{one.name.replace('_', '-')}")
            preset = f"`{value(fast[one.name])}`" if one.name in fast else ""
            limits = one.range or one.type.removesuffix(" | None")
            rows.append([name, f"`{one.default}`", preset, limits, one.description])
        return [self.table(["name", "`preset=None`", '`preset="fast"`', "allowed", "meaning"], rows, kind="hyperparameters")]


class Budget(AlgorithmDirective):
    def content_nodes(self) -> list[nodes.Node]:
        table, rows = load_presets(self.cls.presets_name()), []
        blocks = {'`"fast"`, the default': table[FAST], "`None`": table["default"], '`"paper"`': table["paper"]}
        for preset, block in blocks.items():
            steps = [block.get(f"{stage}_steps") for stage in self.order()]
            rows.append([preset, *("" if n is None else f"{n:,}" for n in steps), f"{sum(n or 0 for n in steps):,}"])
        return [self.table(["preset", *(f"stage `{stage}`" for stage in self.order()), "gradient steps in all"], rows)]

    def order(self) -> list[str]:
        return list(self.cls.STAGE_SHARES)


class PresetsTable(AlgorithmDirective):
    def content_nodes(self) -> list[nodes.Node]:
        table = load_presets(self.cls.presets_name())
        blocks, rows = [], []
        for name, entries in table.items():
            settings = {key: x for key, x in entries.items() if key not in ("aliases", "source", "paper")}
            settings |= {f"{key} (with the paper's schedule)": x for key, x in entries.get("paper", {}).items()}
            said = ", ".join(f"`{key}={value(x)}`" for key, x in settings.items()) or "the defaults"
            shown = {"default": "`None`"}.get(name, f'`"{name}"`')
            (blocks if name in BLOCKS else rows).append([shown, said, entries["source"]])
        found: list[nodes.Node] = [self.table(["preset", "settings", "source"], blocks, kind="presets")]
        if rows:
            found += [
                self.paragraph("Rows for single tasks:"),
                self.table(["preset", "settings", "source"], rows, kind="presets"),
            ]
        return found


class Facts(AlgorithmDirective):
    def content_nodes(self) -> list[nodes.Node]:
        cls, fast = self.cls, load_presets(self.cls.presets_name())[FAST]
        defaults = {field.name: field.default for field in dataclasses.fields(cls.Config)}
        facts = ["Stages of `learn`: " + ", ".join(f"`{name}`" for name in cls.STAGE_SHARES)]
        if "deterministic" in defaults:
            default = defaults["deterministic"]
            chosen = fast.get("deterministic", default)
            facts.append(
                f'Acts by `deterministic={chosen}` with `preset="fast"`, by `deterministic={default}` with `preset=None`'
            )
        else:
            facts.append("Acts deterministically; there is no randomness to switch off")
        choices = ", ".join(f"`{name}`" for name in cls.CHOICE)
        facts.append(f"Choices in one call of `predict`: {choices or 'none'}")
        uniform = cls.OFFLINE_RATIO == "uniform"
        share = "drawn uniformly from old and new data" if uniform else f"{float(cls.OFFLINE_RATIO):.0%} old data"
        facts.append(f"Batches of `learn_online` with a dataset, by default: {share}")
        calibrates = "allowed" if cls.CALIBRATES else "refused, because no critic bootstraps from the actions of the policy"
        facts.append(f"`learn_online(calibrate=True)`: {calibrates}")
        main = MAIN_HYPERPARAMETER.get(self.name_of_algorithm)
        if main is not None:
            facts.append(f"`tune` searches `{main.name}` from {main.low:g} to {main.high:g} ({main.source})")
        found = nodes.bullet_list()
        found.extend(nodes.list_item("", self.paragraph(f"{fact}.")) for fact in facts)
        return [found]


class ZooResults(AlgorithmDirective):
    def content_nodes(self) -> list[nodes.Node]:
        for path in (RESULTS, COMPARISON):
            self.env.note_dependency(str(path))
        return [*self.zoo(), *self.comparison()]

    def zoo(self) -> list[nodes.Node]:
        with RESULTS.open(encoding="utf-8", newline="") as file:
            runs = list(csv.DictReader(file))
        cells: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
        for run in runs:
            cells[run["dataset"]][run["algorithm"]].append(run)
        headings = ["dataset", "the data", *(["`BC`"] if self.name_of_algorithm != "BC" else [])]
        headings += [f"`{self.name_of_algorithm}`", "seeds", "gradient steps", "minutes per run"]
        rows = []
        for dataset, by_algorithm in sorted(cells.items()):
            own = by_algorithm.get(self.name_of_algorithm)
            if not own:
                continue
            everyone = [run for members in by_algorithm.values() for run in members]
            scored = all(run["last_score"] for run in everyone)
            column, unit = ("score", "") if scored else ("return", ", raw return")
            row = [f"`{dataset}`{unit}", f"{float(own[0][f'data_{column}']):.1f}"]
            if self.name_of_algorithm != "BC":
                row.append(spread(by_algorithm.get("BC", []), f"last_{column}"))
            minutes = [float(run["seconds"]) / 60 for run in own]
            steps = sorted({run["steps"] for run in own})
            row += [spread(own, f"last_{column}"), str(len(own)), "; ".join(map(steps_in_words, steps))]
            low, high = round(min(minutes)), round(max(minutes))
            rows.append([*row, f"{low}" if low == high else f"{low} to {high}"])
        if not rows:
            return [self.paragraph(f"The zoo has no policy of `{self.name_of_algorithm}` yet.")]
        about = (
            'The last policy of each run with `preset="fast"` as it was when the run was made: mean over seeds, in brackets '
            "the lowest and the highest seed (from five seeds on the 95 % interval of the mean). The unit is the D4RL scale, "
            "on which 0 is D4RL's random policy and 100 its expert; the data are this project's own, so the numbers are not "
            "comparable with published tables. The page "
        )
        zoo = self.page_link("/zoo", "zoo")
        said = nodes.paragraph(
            "", "", *self.inline(about), *zoo.children, nodes.Text(" has the machine and the command of each run.")
        )
        return [said, self.table(headings, rows)]

    def comparison(self) -> list[nodes.Node]:
        content = json.loads(COMPARISON.read_text(encoding="utf-8"))
        means: dict[str, list[float]] = defaultdict(list)
        for run in content["runs"]:
            means[run["algorithm"]].append(run["result"]["mean_return"])
        own = means.get(self.name_of_algorithm)
        if not own:
            return []
        best = max(means, key=lambda name: sum(means[name]) / len(means[name]))
        shown = {name: means[name] for name in dict.fromkeys([best, self.name_of_algorithm, "DiffusionBC"]) if name in means}
        rows = [[f"`{name}`" + (", the best of all" if name == best else ""), by_seed(x)] for name, x in shown.items()]
        steps = content["runs"][0]["steps"]
        about = (
            f"On the included dataset `{content['data']['id']}`, with `preset=None`, small networks and {steps:,} gradient "
            f"steps for each algorithm (mean return over seeds; the data: {content['data']['mean_return']:.2f}; made by "
            f"`{content['command']}`):"
        )
        return [self.paragraph(about), self.table(["algorithm", "mean return by seed"], rows)]


class Comparison(AlgorithmDirective):
    required_arguments = 0

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(COMPARISON))
        content = json.loads(COMPARISON.read_text(encoding="utf-8"))
        by_algorithm: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for run in content["runs"]:
            by_algorithm[run["algorithm"]].append(run)
        rows = []
        for name, runs in by_algorithm.items():
            means = [run["result"]["mean_return"] for run in runs]
            seconds = ", ".join(f"{run['seconds']:.0f}" for run in runs)
            rows.append((sum(means) / len(means), [f"`{name}`", by_seed(means), seconds]))
        ordered = [cells for _, cells in sorted(rows, reverse=True)]
        ordered.append(["the data", f"{content['data']['mean_return']:.2f}", ""])
        about = f"Stored output of `{content['command']}` ({content['machine']}):"
        return [self.paragraph(about), self.table(["algorithm", "mean return by seed", "seconds by seed"], ordered)]


class Deviations(AlgorithmDirective):
    HEADINGS: ClassVar[dict[str, str]] = {"Details": "Paper and code", "Online": "Online", "Fast recipe": 'preset="fast"'}

    def content_nodes(self) -> list[nodes.Node]:
        text = ast.get_docstring(ast.parse(self.source_file.read_text(encoding="utf-8")), clean=True) or ""
        found: list[nodes.Node] = []
        for heading, remark, items in tagged_lists(text):
            title = nodes.paragraph("", "", nodes.strong("", self.HEADINGS[heading]), classes=["list-heading"])
            title += self.inline(f" ({remark})" if remark else "")
            entries = nodes.bullet_list(classes=["deviations"])
            for tag, said in items:
                entry = nodes.list_item("", nodes.paragraph("", "", nodes.strong("", f"[{tag}] "), *self.inline(said)))
                entry["ids"].append(self.tag_id(tag))
                entries += entry
            found += [title, entries]
        if not found:
            raise self.error(f"{self.source_file.name} has no tagged list")
        return found


def tagged_lists(docstring: str) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """The lists of an algorithm's docstring: (heading, its remark, [(tag, text)])."""
    found: list[tuple[str, str, list[tuple[str, str]]]] = []
    for block in re.split(r"\n(?=\S)", docstring):
        head, *items = re.split(r"\n +\[(?=[DOF]\d+\] )", block)
        match = _SECTION.match(" ".join(head.split()))
        if match and items:
            pairs = [tuple(" ".join(item.split()).split("] ", 1)) for item in items]
            found.append((match[1], match[2] or "", pairs))  # type: ignore[arg-type]
    return found


def value(x: Any) -> str:
    """A setting as one would write it in Python."""
    return json.dumps(x) if isinstance(x, str) else repr(x)


def spread(runs: Sequence[dict[str, str]], column: str) -> str:
    """The mean of a column and, if there are several runs, their range or its interval."""
    if not runs:
        return "-"
    mean, low, high, kind = over_seeds([float(run[column]) for run in runs])
    return f"{mean:.1f}" if kind == "value" else f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def steps_in_words(steps: str) -> str:
    """ "critic=10000 policy=4000" -> "`critic` 10,000, `policy` 4,000"."""
    return ", ".join(f"`{stage}` {int(n):,}" for stage, n in (part.split("=") for part in steps.split()))


def by_seed(values: Sequence[float]) -> str:
    return ", ".join(f"{x:.2f}" for x in values)


DIRECTIVES = {
    "algorithm-list": AlgorithmList,
    "hyperparameters": HyperparametersTable,
    "budget": Budget,
    "presets": PresetsTable,
    "facts": Facts,
    "zoo-results": ZooResults,
    "comparison": Comparison,
    "deviations": Deviations,
}


def setup(app: Sphinx) -> dict[str, bool]:
    for name, directive in DIRECTIVES.items():
        app.add_directive(name, directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
