"""The documentation: the site builds without a warning, its links lead somewhere, and the programs on its pages run.

Programs run as they stand, page by page, in an empty folder in which `examples` and `zoo` are those of the checkout. Only their
budgets are smaller here (`short_budgets`), and what is pushed to the Hub is written to a local folder. A block runs unless a
line `% not run: REASON` (in README.md `<!-- not run: REASON -->`) stands directly above it.
"""

import dataclasses
import html
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from scripts import ROOT

import diffagents
from diffagents.agent import Agent
from diffagents.config.hyperparameters import describe
from diffagents.data import collect as collecting
from diffagents.evaluation.evaluate import evaluate
from diffagents.experiments.fqe import FQEConfig
from diffagents.experiments.one_step import OneStepConfig
from diffagents.registry import AGENTS, agent_class
from diffagents.training import prepare

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if path != DOCS / "gallery" / "README.md")]
DOWNLOADED = "mujoco/hopper/medium-v0"  # the dataset of the README
MOST_UPDATES = 40  # of each stage
MOST_ENV_STEPS = 60  # of learn_online
MOST_COLLECTED = 400
MOST_EPISODES = 2  # of an evaluation
MOST_SUPPORT_STATES = 50  # of QGPO and SfBC
BLOCK = re.compile(
    r"^(?P<above>[^\n]*)\n(?P<indent> *)(?P<fence>`{3,})python *\n(?P<code>.*?)\n(?P=indent)(?P=fence) *$",
    re.DOTALL | re.MULTILINE,
)
NOT_RUN = re.compile(r"^\s*(?:% not run: \S.*|<!-- not run: \S.* -->)$")


# ---- the site ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as by `make docs`, away from the checkout."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(out / "doctrees")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "docs", str(out / "html")], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "html"


@pytest.fixture(scope="module")
def texts(site: Path) -> dict[Path, str]:
    """Every page of the site and its HTML; not the reports of the gallery, which the command line writes."""
    pages = (path for path in site.rglob("*.html") if path.relative_to(site).parts[0] not in ("files", "_static"))
    return {path: path.read_text(encoding="utf-8") for path in pages}


def test_every_public_name_is_documented(site: Path) -> None:
    """In the inventory, which other projects link to."""
    head = b"# The remainder of this file is compressed using zlib.\n"
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(head)[1]).decode()
    documented = {line.split(" ")[0] for line in inventory.splitlines() if " py:" in line}
    assert {f"diffagents.{name}" for name in diffagents.__all__} <= documented
    methods = {name for name, value in vars(Agent).items() if not name.startswith("_") and callable(value)}
    internal = {"candidate", "become", "forget_compiled", "predict_with", "require_spec", "set_up", "presets_name"}
    assert {f"diffagents.agent.Agent.{name}" for name in methods - internal} <= documented


@pytest.mark.parametrize("name", AGENTS)
def test_each_algorithm_has_a_page_with_its_hyperparameters(name: str, texts: dict[Path, str], site: Path) -> None:
    cls = agent_class(name)
    page = texts[site / "algorithms" / f"{cls.presets_name()}.html"]
    for one in describe(cls.Config):
        assert f'id="{name.lower()}-{one.name.replace("_", "-")}"' in page, one.name
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert all(f"[{tag}] " in text for tag in re.findall(r"^  \[([DOF]\d+)\] ", source_of(cls), re.MULTILINE))


def source_of(cls: type[Agent]) -> str:
    return (ROOT / "diffagents" / "agents" / f"{cls.presets_name()}.py").read_text(encoding="utf-8")


def test_links_inside_the_site_lead_somewhere(site: Path, texts: dict[Path, str]) -> None:
    """Pages, pictures, copied files, and anchors: Sphinx itself does not look at links that are written as HTML."""
    anchors = {path: set(re.findall(r'\bid="([^"]*)"', text)) for path, text in texts.items()}
    for path, text in texts.items():
        for link in set(re.findall(r'(?:href|src)="([^"]+)"', text)):
            target, _, anchor = unquote(html.unescape(link)).partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            aim = (path.parent / target.split("?")[0]).resolve() if target else path
            aim = aim / "index.html" if aim.is_dir() else aim
            assert aim.is_file(), f"{path.relative_to(site)} links to {link}"
            if anchor and aim in anchors and "_modules" not in path.relative_to(site).parts:  # whose [docs] links are rough
                assert anchor in anchors[aim], f"{path.relative_to(site)} links to {link}"


def test_no_page_names_this_machine_or_an_index(texts: dict[Path, str], site: Path) -> None:
    private = re.compile(r"file://|/root/|/opt/|diffagents-inventories|(?:https?:)?//[^\s\"'<]*(?:pypi|localhost|127\.0\.0\.1)")
    for path, text in texts.items():
        if "_modules" in path.relative_to(site).parts:
            continue  # the package's own source
        assert str(ROOT) not in text, path
        found = private.search(text)
        assert found is None, f"{path.relative_to(site)}: {found and found[0]}"


# ---- the programs on the pages -----------------------------------------------------------------------------------------
class Block(NamedTuple):
    code: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """The blocks of Python that run, in order, with the line on which each begins."""
    return blocks_in(page.read_text(encoding="utf-8"))


def blocks_in(text: str) -> list[Block]:
    found, text = [], "\n" + text
    for match in BLOCK.finditer(text):
        if NOT_RUN.match(match["above"]) is None:
            code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
            found.append(Block(code, text.count("\n", 0, match.start("code"))))
    return found


@pytest.fixture
def short_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of a few updates, and a Hub that is a folder."""
    plan_of, learn_online, collect, check = prepare.make_plan, Agent.learn_online, collecting.collect, FQEConfig.__post_init__

    def short_plan(learner: Any, *args: Any) -> Any:
        plan = plan_of(learner, *args)
        if plan is not None and plan is not learner.state.plan:
            plan.lengths = {stage: min(steps, MOST_UPDATES) for stage, steps in plan.lengths.items()}
        if hasattr(learner.config, "n_support_states"):
            learner.config = dataclasses.replace(learner.config, n_support_states=MOST_SUPPORT_STATES)
        return plan

    def short_online(agent: Agent, total_timesteps: int | None = None, *args: Any, **kwargs: Any) -> Agent:
        total = None if total_timesteps is None else min(total_timesteps, MOST_ENV_STEPS)
        return learn_online(agent, total, *args, **kwargs)

    def short_collect(policy: Any, env: Any, n_steps: int, *args: Any, **kwargs: Any) -> Any:
        return collect(policy, env, min(n_steps, MOST_COLLECTED), *args, **kwargs)

    def short_fit(config: FQEConfig | OneStepConfig) -> None:
        check(config)
        object.__setattr__(config, "steps", min(config.steps, MOST_UPDATES))

    def short_evaluation(policy: Any, env: Any, n_episodes: int = 10, **kwargs: Any) -> Any:
        n_episodes = min(n_episodes, MOST_EPISODES)
        if "n_envs" in kwargs:
            kwargs["n_envs"] = min(kwargs["n_envs"], n_episodes)
        return evaluate(policy, env, n_episodes, **kwargs)

    def push_to_folder(agent: Agent, repo_id: str, **kwargs: Any) -> Path:
        known = {"eval_env", "n_eval_episodes", "video", "license", "include_trainer_state"}
        return agent.save_pretrained(repo_id, **{name: value for name, value in kwargs.items() if name in known})

    monkeypatch.setattr(prepare, "make_plan", short_plan)
    monkeypatch.setattr(Agent, "learn_online", short_online)
    monkeypatch.setattr(collecting, "collect", short_collect)
    for module in ("diffagents.agent", "diffagents.evaluation.evaluate", "diffagents.experiments.select"):
        monkeypatch.setattr(f"{module}.evaluate", short_evaluation)
    monkeypatch.setattr(FQEConfig, "__post_init__", short_fit)
    monkeypatch.setattr(OneStepConfig, "__post_init__", short_fit)
    monkeypatch.setattr(Agent, "push_to_hub", push_to_folder)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Minari datasets: that of the checkout, and a few random steps in place of one that would be downloaded."""
    root = tmp_path_factory.mktemp("datasets")
    shutil.copytree(ROOT / "examples" / "data", root, dirs_exist_ok=True)
    actions = np.random.default_rng(0)
    collecting.collect(lambda obs: actions.uniform(-1, 1, 3), "Hopper-v5", MOST_COLLECTED, DOWNLOADED, root=root)
    return root


@pytest.fixture
def clone(datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder as a reader has it who cloned the repository; files that a page writes stay in it."""
    for name in ("examples", "zoo"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    os.environ["MINARI_DATASETS_PATH"] = str(datasets)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(1)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks_of(page)])
def test_programs_on_a_page_run(page: Path, clone: Path, short_budgets: None) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__", "data": DOWNLOADED}  # README.md leaves `data` to the reader
    for block in blocks_of(page):
        code = "\n" * (block.line - 1) + block.code  # so that a traceback names the line of the page
        exec(compile(code, str(page), "exec"), namespace)


def test_blocks_are_found_and_left_out_by_their_mark() -> None:
    text = "text\n```python\na = 1\n```\n% not run: no network\n```python\nb = 2\n```\n\n% not run:\n```python\nc = 3\n```\n"
    assert blocks_in(text) == [Block("a = 1", 3), Block("c = 3", 12)]  # a mark without a reason is none
