"""The directive {command-line}: a section with the help text of each command, printed by the parser itself."""

import argparse
import os
import re
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from diffagents.cli.main import parser


class CommandLine(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        found: list[nodes.Node] = []
        with mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}):
            top = parser()
            (commands,) = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
            for name, command in commands.choices.items():
                section = nodes.section(ids=[f"command-{name}"])
                section += nodes.title("", "", nodes.Text("diffagents "), nodes.Text(name))
                text = re.sub(r"\x1b\[[0-9;]*m", "", command.format_help()).strip()
                section += nodes.literal_block(text, text, language="text")
                found.append(section)
        return found


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
