"""Intersphinx without a network: short lists of other projects' names instead of their complete inventories.

A file `_inventories/<project>.txt` has the address of the documentation in its first line, and then one name per line: its role
in the Python domain, the name, and its page. `$` at the end of a page stands for the name, as in Sphinx's own inventories.
"""

import pathlib
import tempfile
import zlib

_scratch = tempfile.TemporaryDirectory(prefix="diffagents-inventories-")


def mapping(folder: pathlib.Path) -> dict[str, tuple[str, str]]:
    """The value of `intersphinx_mapping`: project -> (address, an inventory in Sphinx's format in a scratch folder)."""
    scratch = pathlib.Path(_scratch.name)
    found = {}
    for path in sorted(folder.glob("*.txt")):
        address, *names = path.read_text(encoding="utf-8").split("\n")
        lines = []
        for line in filter(None, names):
            role, name, page = line.split()
            lines.append(f"{name} py:{role} 1 {page} -\n")
        head = f"# Sphinx inventory version 2\n# Project: {path.stem}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        inventory = scratch / f"{path.stem}.inv"
        inventory.write_bytes(head.encode() + zlib.compress("".join(lines).encode()))
        found[path.stem] = (address, str(inventory))
    return found
