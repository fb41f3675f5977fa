"""Rows of `zoo/<algorithm>.yml`: published budgets and per-task values, found by row name or dataset id.

    default: {<stage>_steps: ...}                  the budget with preset=None
    fast:    {<name>: ..., source: ...}            the default preset, the fast recipe: one setting for all datasets
    paper:   {<stage>_steps: ..., source: ...}     the paper's schedule
    official_code: {<name>: ..., source: ...}      optional: where the authors' code as published differs from the paper
    <row>:   {<name>: ..., aliases: [<dataset id>, ...], source: ...}    only what differs from the defaults
             paper: {<name>: ...}              optional: what the paper's schedule has for this task alone

where each name is a hyperparameter.

With preset=None, only `default` applies. A row's `paper` applies only with "paper" and "official_code". `aliases` serve to find
a row and `source` informs the reader; neither reaches an agent.
"""

import copy
import difflib
import functools
import re
from pathlib import Path
from typing import Any

FAST = "fast"
"""The default preset, which does not depend on the dataset."""
BLOCKS = ("default", FAST, "paper", "official_code")
_NEEDED = BLOCKS[:3]
_PACKAGE = Path(__file__).resolve().parents[1]
# The installed package contains the presets; in a checkout they are in the folder next to the package.
_FOLDERS = (_PACKAGE / "zoo", _PACKAGE.parent / "zoo")


def load_presets(algorithm: str) -> dict[str, dict[str, Any]]:
    """The whole table of one algorithm (any case): block or row name -> its entries, in the file's order.

    Raises ValueError for an algorithm without presets and for a malformed file, naming the row.
    """
    path = _find_file(algorithm)
    if path is None:
        known = sorted({p.stem for folder in _FOLDERS for p in folder.glob("*.yml")})
        raise ValueError(f"there are no presets for {algorithm!r}, only for {', '.join(known) or 'nothing'}")
    return copy.deepcopy(_read(path, path.stat().st_mtime_ns))


def has_presets(algorithm: str) -> bool:
    """Whether the algorithm (any case) has a table, as all of this package have."""
    return _find_file(algorithm) is not None


def find_preset(algorithm: str, name_or_id: str) -> tuple[str, dict[str, Any]] | None:
    """(row name, its values) for a row name or an alias, exact or, if there is none, in another version (`-vN`).

    The name of a file counts as an id: its `.hdf5`, `.h5` or `.npz` is cut off, and `_` is read as `-`.
    """
    rows = {name: row for name, row in load_presets(algorithm).items() if name not in BLOCKS}
    names = {alias: name for name, row in rows.items() for alias in (name, *row.get("aliases", ()))}
    found = names.get(name_or_id) or {_bare(alias): name for alias, name in names.items()}.get(_bare(name_or_id))
    return None if found is None else (found, _values(rows[found]))


def resolve_preset(algorithm: str, preset: str | None, dataset_id: str | None) -> tuple[list[str], dict[str, Any]]:
    """(names of what was applied over the default budget, the values of all: hyperparameters, budgets, `policy_kwargs`).

    preset            applied, in this order
    None              []
    "fast"            ["fast"]
    "auto"            [the row of `dataset_id`], [] if it has none
    "paper"           ["paper", the row of `dataset_id` if it has one]
    "official_code"   ["paper", "official_code", the row of `dataset_id` if it has one]
    a name            [that row], by its name or an alias

    Raises ValueError for an unknown name, listing the rows.
    """
    table = load_presets(algorithm)
    papers = [block for block in BLOCKS[2:] if block in table]  # each includes the one before
    general = [FAST, "auto", *papers]
    blocks = papers[: papers.index(preset) + 1] if preset in papers else [FAST] if preset == FAST else []
    wanted = None if preset == FAST else dataset_id if preset in general else preset
    found = find_preset(algorithm, wanted) if isinstance(wanted, str) else None
    if found is None and preset is not None and preset not in general:
        rows = [name for name in table if name not in BLOCKS]
        aliases = [alias for name in rows for alias in table[name].get("aliases", ())]
        near = difflib.get_close_matches(str(preset), [*general, *rows, *aliases], 1)
        hint = f"did you mean {near[0]!r}? There are" if near else "there are"
        some = ", ".join(rows) or "no rows"
        raise ValueError(f"preset={preset!r} is unknown; {hint} {', '.join(map(repr, general))} and {some}")
    values = _values(table["default"])
    for block in blocks:
        values |= _values(table[block])
    if found is not None:
        values |= found[1]
        values |= table[found[0]].get("paper", {}) if "paper" in blocks else {}
    return blocks + ([found[0]] if found is not None else []), values


def _find_file(algorithm: str) -> Path | None:
    name = algorithm.lower()
    if not re.fullmatch(r"[a-z0-9_]+", name):
        return None
    return next((p for folder in _FOLDERS if (p := folder / f"{name}.yml").is_file()), None)


@functools.cache
def _read(path: Path, _: int) -> dict[str, dict[str, Any]]:
    """The content of a file; every agent asks for it, and YAML is slow to read."""
    import yaml

    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    _check(table, path)
    return dict(table)


def _values(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key not in ("aliases", "source", "paper")}


def _bare(name: str) -> str:
    name = re.sub(r"\.(hdf5|h5|npz)$", "", name, flags=re.IGNORECASE).replace("_", "-")
    return re.sub(r"-v\d+$", "", name)


def _check(table: Any, path: Path) -> None:
    if not isinstance(table, dict) or not all(isinstance(table.get(block), dict) for block in _NEEDED):
        raise ValueError(f"{path} must be a mapping with the blocks {', '.join(_NEEDED[:-1])} and {_NEEDED[-1]}")
    owners: dict[str, str] = {}
    for row, entries in table.items():
        where = f"{path}, row {row!r}"
        if not isinstance(row, str) or not isinstance(entries, dict) or not all(isinstance(k, str) for k in entries):
            raise ValueError(f"{where} must be a name with a mapping of hyperparameters under it")
        aliases = entries.get("aliases", [])
        if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
            raise ValueError(f"{where}: aliases must be a list of dataset ids, not {aliases!r}")
        if row in BLOCKS and (aliases or "paper" in entries):
            raise ValueError(f"{where}: a block has no aliases and no paper: of its own")
        if not isinstance(entries.get("paper", {}), dict):
            raise ValueError(f"{where}: paper must be a mapping of hyperparameters, not {entries['paper']!r}")
        if not isinstance(entries.get("source"), str):
            raise ValueError(f"{where}: source must say where the values come from")
        for name in {_bare(alias) for alias in (row, *aliases)}:
            if name in owners:
                raise ValueError(f"{where}: {name!r} also belongs to row {owners[name]!r}")
            owners[name] = row
        for key, value in entries.items():
            if isinstance(value, str) and key != "source" and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value, re.I):
                raise ValueError(f"{where}: YAML reads {key}: {value} as text; write it with a point, as 3.0e-4")
