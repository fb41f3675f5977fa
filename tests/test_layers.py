"""The layers of the package: who may import whom, and how long a file and a class chain may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "diffagents"

# From the bottom up. A module imports, at module level, only from earlier groups: not even from its own.
GROUPS = [
    {"types"},
    {"values", "diffusion", "networks", "normalize", "engine", "artifact", "provenance", "knobs", "environments", "rollouts"},
    {
        "compiling",
        "numpy_policy",
        "cuda_graph",
        "transitions",
        "iql_critic",
        "solvers",
        "chain_policy",
        "evaluation",
        "presets",
        "hub",
        "card",
        "dataset_checks",
        "checkpoint",
    },
    {"arrays", "sb3", "minari_hdf5", "watch", "replay"},
    {"datasets", "training", "world", "collecting"},
    {"online"},
    {"agent"},
    {"agents", "agents.*"},  # one paper, one file
    {"official", "export", "many", "publish", "fqe"},
    {"selection"},
    {"tuning"},
    {"__init__"},
    {"sweep", "cli_options"},
    {"sweep_report", "sweep_executors"},
    {"cli_lab"},
    {"cli"},
]
# What module level may import beside the standard library and ours: training from arrays needs no more.
LIGHT = {"torch", "numpy", "safetensors", "gymnasium"}
HEAVY = ["stable_baselines3", "minari", "h5py", "huggingface_hub", "yaml", "matplotlib", "moviepy", "pandas"]
MAX_LINES = 400
MORE_LINES = {"agent": 530}  # every verb of the library, with its docstring; their bodies live elsewhere
MAX_CLASS_CHAIN = 2

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}
Import = ast.Import | ast.ImportFrom


def group_of(module: str) -> int | None:
    """The number of the module's group, None for one that the table does not list."""
    for number, names in enumerate(GROUPS, start=1):
        if module in names or (module.count(".") == 1 and module.split(".")[0] + ".*" in names):
            return number
    return None


def at_module_level(node: ast.AST, for_types: bool = False) -> Iterator[tuple[Import, bool]]:
    """(import, whether only type checkers see it), in classes, `if` and `try` too, but not in functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Import):
            yield child, for_types
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from at_module_level(child, for_types or typing_only)


def targets(module: str, node: Import) -> Iterator[tuple[str, str]]:
    """(absolute dotted module, name taken from it or "") of everything that one import statement reaches."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        package = ["diffagents", *FILES[module].relative_to(PACKAGE).parts[:-1]]
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    yield from ((base, alias.name) for alias in node.names)


def ours(dotted: str, name: str) -> str | None:
    """The module of ours (a key of FILES) that `from dotted import name` reaches, None if it is not ours."""
    parts = dotted.split(".")
    if parts[0] != "diffagents":
        return None
    inner = ".".join(parts[1:])
    deeper = f"{inner}.{name}".strip(".")
    is_module = deeper in FILES or group_of(deeper) is not None  # listed, perhaps not written yet
    return deeper if is_module else inner or "__init__"


def layer_errors(module: str) -> list[str]:
    """Every import of `module` that the layers forbid, with the line."""
    errors, own = [], group_of(module)
    for node, for_types in at_module_level(TREES[module]):
        where = f"{FILES[module].relative_to(ROOT)}:{node.lineno}"
        for dotted, name in targets(module, node):
            target = ours(dotted, name)
            if target is not None:
                group = group_of(target)
                if target != module and (group is None or own is None or group >= own):
                    errors.append(f"{where} group {own} imports {target} of group {group}; only earlier groups may be")
            elif not for_types and (top := dotted.split(".")[0]) not in LIGHT | sys.stdlib_module_names:
                errors.append(f"{where} imports {top} at module level; import it inside the function that uses it")
    return errors


@pytest.mark.parametrize("module", FILES)
def test_module_is_listed(module: str) -> None:
    assert group_of(module) is not None, f"{FILES[module].relative_to(ROOT)} has no layer: add it to GROUPS here"


@pytest.mark.parametrize("module", FILES)
def test_module_imports_only_from_earlier_groups(module: str) -> None:
    assert not layer_errors(module)


@pytest.mark.parametrize("module", FILES)
def test_no_star_import(module: str) -> None:
    stars = [n.lineno for n in ast.walk(TREES[module]) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
    assert not stars, f"{FILES[module].relative_to(ROOT)}: star import at line {stars}; name what you take"


@pytest.mark.parametrize("module", FILES)
def test_file_fits_in_the_head(module: str) -> None:
    lines = len(FILES[module].read_text().splitlines())
    most = MORE_LINES.get(module, MAX_LINES)
    assert lines <= most, f"{FILES[module].relative_to(ROOT)} has {lines} lines, at most {most}"


def class_chains() -> dict[str, list[str]]:
    """Each class of ours -> itself and its longest line of ancestors, ours only; classes inside functions count too."""
    classes: dict[tuple[str, str], ast.ClassDef] = {}
    names: dict[str, dict[str, tuple[str, str]]] = {}  # module -> name as written there -> (module, class or "")
    for module, tree in TREES.items():
        names[module] = {}
        for node in ast.walk(tree):
            if isinstance(node, Import):
                aliases = [alias.asname or alias.name for alias in node.names]
                for alias, (dotted, name) in zip(aliases, targets(module, node), strict=True):
                    if (target := ours(dotted, name)) is not None:
                        is_module = not name or target.split(".")[-1] == name
                        names[module][alias] = (target, "" if is_module else name)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[module, node.name] = node
                names[module][node.name] = (module, node.name)

    def resolve(module: str, base: ast.expr) -> tuple[str, str] | None:
        if isinstance(base, ast.Subscript):  # Generic[...]
            base = base.value
        if isinstance(base, ast.Attribute):
            owner = names[module].get(ast.unparse(base.value))
            return (owner[0], base.attr) if owner else None
        return names[module].get(ast.unparse(base))

    def chain(key: tuple[str, str]) -> list[str]:
        parents = [found for base in classes[key].bases if (found := resolve(key[0], base)) in classes and found != key]
        return [".".join(key), *max((chain(found) for found in parents if found), key=len, default=[])]

    return {".".join(key): chain(key) for key in classes}


@pytest.mark.parametrize("chain", class_chains().values(), ids=lambda chain: chain[0])
def test_class_chain_is_short(chain: list[str]) -> None:
    assert len(chain) <= MAX_CLASS_CHAIN, " -> ".join(chain)


def test_importing_everything_stays_light() -> None:
    """What really gets loaded: a light import of ours may hide a heavy one of its own."""
    modules = [f"diffagents.{name}" if name != "__init__" else "diffagents" for name in FILES if name != "cli"]
    code = f"import sys, {', '.join(modules)}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_training_from_arrays_needs_only_the_light_packages() -> None:
    """With every heavy package made impossible to import, arrays still become a policy that acts."""
    code = """
import sys
for name in HEAVY:
    sys.modules[name] = None
import numpy as np
from diffagents import SRPO
r = np.random.default_rng(0)
data = {"observations": r.normal(size=(40, 3)), "actions": r.uniform(-1, 1, (40, 2)), "rewards": r.normal(size=40),
        "terminations": np.arange(40) % 20 == 19, "truncations": np.zeros(40, bool)}
steps = dict(critic_steps=2, behavior_steps=2, policy_steps=2, behavior_batch_size=8, batch_size=8)
agent = SRPO(seed=0, verbose=0, **steps).learn(data)
print(agent.predict(np.zeros(3))[0].shape)
"""
    command = [sys.executable, "-c", f"HEAVY = {HEAVY!r}" + code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(2,)"


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("values", "from diffagents.types import Batch", ""),
        ("values", "from .types import Batch", ""),
        ("values", "import diffagents.types", ""),
        ("values", "def f():\n    from diffagents.agent import Agent", ""),
        ("values", "import math, torch.nn", ""),
        ("values", "if TYPE_CHECKING:\n    import minari", ""),
        ("values", "if TYPE_CHECKING:\n    from diffagents.agent import Agent", "imports agent of group "),
        ("values", "from diffagents.diffusion.chain import perturb", "imports diffusion of group "),
        ("values", "from . import diffusion", "imports diffusion of group "),
        ("values", "from diffagents import networks", "imports networks of group "),
        ("values", "from diffagents import SRPO", "imports __init__ of group "),
        ("types", "try:\n    from .values import polyak_update\nexcept ImportError:\n    pass", "imports values"),
        ("agents.srpo", "from ..agent import Agent", ""),
        ("agents.srpo", "from . import iql", "imports agents.iql of group "),
        ("agents.srpo", "from diffagents.agents.iql import IQL", "imports agents.iql of group "),
        ("values", "class A:\n    import h5py", "imports h5py at module level"),
        ("values", "import diffagents.nowhere", "imports nowhere of group None"),
    ],
)
def test_the_layer_test_itself(module: str, source: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TREES, module, ast.parse(source))
    monkeypatch.setitem(FILES, module, PACKAGE / (module.replace(".", "/") + ".py"))
    for name in ("diffusion", "networks", "agent", "types"):
        monkeypatch.setitem(FILES, name, PACKAGE / f"{name}.py")
    errors = layer_errors(module)
    assert (not errors) if not expected else (len(errors) == 1 and expected in errors[0]), errors


def test_the_chain_test_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        "types": "class A(nn.Module): ...",
        "values": "from diffagents.types import A as Base\nclass B(Base): ...\nclass A: ...",
        "agent": "import diffagents.functional\nfrom diffagents import values\ndef f():\n    class C(values.B, dict): ...",
    }
    for module, source in sources.items():
        monkeypatch.setitem(TREES, module, ast.parse(source))
        monkeypatch.setitem(FILES, module, PACKAGE / f"{module}.py")
    chains = class_chains()
    assert chains["agent.C"] == ["agent.C", "values.B", "types.A"]
    assert chains["values.A"] == ["values.A"]
