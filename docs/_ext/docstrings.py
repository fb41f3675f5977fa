"""Docstrings in the API reference.

Hyperparameters of agents and Configs are not listed again, but linked to their table. Everywhere else the docstrings are plain
text with code in backticks: a name becomes a link if it is documented, signs that reStructuredText would read as markup are
escaped, and indented blocks of formulas or files are shown as they are.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.roles import XRefRole

from diffagents.agent import Agent
from diffagents.config.hyperparameters import Hyperparameters
from diffagents.registry import AGENTS, agent_class

PAGES = {name: f"/algorithms/{agent_class(name).presets_name()}" for name in AGENTS}
ALGORITHM_OF = {agent_class(name).Config: name for name in AGENTS}


def link_hyperparameters(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Cut the generated list off a class's docstring, and link the page of the algorithm."""
    if what != "class":
        return
    algorithm = ALGORITHM_OF.get(obj) or (obj.__name__ if obj.__name__ in AGENTS and issubclass(obj, Agent) else None)
    if algorithm is None:
        return
    cut = next((i for i, line in enumerate(lines) if line == "Args:" or line.startswith("Hyperparameters, which are")), None)
    own = lines[:cut]
    page = f":doc:`{algorithm} <{PAGES[algorithm]}>`"
    if obj in ALGORITHM_OF:
        lines[:] = [*own, f"Each is described, with its range, on the page {page}.", ""]
    else:
        lines[:] = [*own, f"Equations, hyperparameters and results: {page}. The other arguments are those of `Agent`.", ""]


def as_plain_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape markup outside backticks, and mark indented blocks after an empty line as literal."""
    if not name.startswith("diffagents"):
        return
    found: list[str] = []
    literal = False
    for i, line in enumerate(lines):
        indented = line.startswith("    ")
        if indented and not literal and i > 0 and not lines[i - 1].strip():
            before = next((earlier for earlier in reversed(lines[:i]) if earlier.strip()), "")
            if not before.startswith(" "):
                found += ["::", ""]
                literal = True
        if line.strip() and not indented:
            literal = False
        found.append(line if literal else escape(line))
    lines[:] = found


def escape(line: str) -> str:
    """A line in which `*` and `|` mean themselves, except in code and in `**kwargs:` at its beginning."""
    start = len(line) - len(line.lstrip(" *"))
    pieces = re.split(r"(`+[^`]*`+)", line[start:])
    return line[:start] + "".join(x if x.startswith("`") else re.sub(r"([*|])", r"\\\1", x) for x in pieces)


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """Without the dozens of hyperparameters, which the page of the algorithm lists."""
    if obj is Agent:  # the attribute `policy`, a network, would give its type to the argument of that name
        app.env.current_document.autodoc_annotations[name]["policy"] = "str"
    if what == "class" and isinstance(obj, type):
        if obj.__name__ in AGENTS and issubclass(obj, Agent):
            return "(policy='MlpPolicy', env=None, *, preset='fast', ..., **hyperparameters)", None
        if issubclass(obj, Hyperparameters) and obj in ALGORITHM_OF:
            return "(**hyperparameters)", None
    return None


def drop_missing_sources(app: Sphinx) -> list[Any]:
    """Keep modules without a source, such as builtins, out of viewcode's list, which would link pages that do not exist."""
    modules = getattr(app.env, "_viewcode_modules", {})
    for name in [name for name, entry in modules.items() if not entry]:
        del modules[name]
    return []


class CodeOrName(XRefRole):
    """Text in backticks: a link if it is a documented name, else code, as it is written."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", self.text):
            self.name, self.refdomain, self.reftype = "py:obj", "py", "obj"
            self.classes = ["xref", "py", "py-obj"]
            return self.create_xref_node()
        return [nodes.literal("", self.text)], []


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", link_hyperparameters, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", as_plain_text, priority=410)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("html-collect-pages", drop_missing_sources, priority=100)  # before viewcode
    app.add_role("code-or-name", CodeOrName())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
