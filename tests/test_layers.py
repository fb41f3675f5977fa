"""The packages in order: each imports only from those below it, and importing any of them is light."""

import ast
import graphlib
import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up: the packages and single modules of diffagents. A module may import from its own package and from those
# before it, wherever the import stands: at module level, in a function or under TYPE_CHECKING.
ORDER = [
    "version",
    "types",
    "errors",
    "files",
    "torch_internals",
    "functional",
    "config",
    "diffusion",
    "networks",
    "envs",
    "evaluation",
    "data",
    "training",
    "storage",
    "deploy",
    "agent",
    "agents",
    "registry",
    "experiments",
    "cli",
    "__init__",
    "__main__",
]
# What may be imported at module level besides the standard library: training from arrays needs no more.
LIGHT = {"torch", "numpy", "safetensors", "gymnasium", "diffagents"}
HEAVY = ["stable_baselines3", "minari", "h5py", "huggingface_hub", "yaml", "matplotlib", "moviepy", "pandas"]
MAX_CLASS_CHAIN = 2


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted((ROOT / "diffagents").rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}


def package_of(module: str) -> str:
    """The module's entry in ORDER."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(module: str, node: ast.AST) -> list[str]:
    """The modules that one node of a syntax tree imports. A string that is a module's name counts, for importlib's sake."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
        base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names]
    if isinstance(node, ast.Constant) and node.value in FILES:
        return [node.value] if "." in node.value else []
    return []


# (module, line, imported module) of every import of ours, and whether Python runs it when the module is imported.
IMPORTS = [
    (module, getattr(node, "lineno", 0), target)
    for module, tree in TREES.items()
    for node in ast.walk(tree)
    for target in imported(module, node)
    if target.split(".")[0] == "diffagents"
]


def test_every_package_has_its_place_in_the_order() -> None:
    assert {package_of(module) for module in FILES} <= set(ORDER), "add the new package to ORDER, above all that it imports"


def test_imports_lead_downwards_only() -> None:
    upwards = []
    for module, line, target in IMPORTS:
        own, other = package_of(module), package_of(target)
        between_agents = own == other == "agents" and module != target
        if ORDER.index(other) > ORDER.index(own) or between_agents:
            upwards.append(f"{FILES[module].relative_to(ROOT)}:{line} imports {target}")
    assert not upwards, "\n".join(["not from a lower package, or from one algorithm to another:", *upwards])


def test_no_cycles() -> None:
    """Between the modules of one package; between packages there are none where imports lead downwards."""
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for module, _, target in IMPORTS:
        if package_of(module) == package_of(target) and target in FILES:
            graph[module].add(target)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def module_level(node: ast.AST) -> list[ast.AST]:
    """Everything below a node that runs when the module is imported, so neither functions nor what only type checkers see."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not typing_only and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += [child, *module_level(child)]
    return found


def test_heavy_packages_are_imported_in_the_functions_that_use_them() -> None:
    heavy = [
        f"{FILES[module].relative_to(ROOT)}:{getattr(node, 'lineno', 0)} imports {target}"
        for module, tree in TREES.items()
        for node in module_level(tree)
        for target in imported(module, node)
        if target.split(".")[0] not in LIGHT | sys.stdlib_module_names
    ]
    assert not heavy, "\n".join(["at module level:", *heavy])


def test_class_chains_are_short() -> None:
    for module in FILES:
        for _, cls in inspect.getmembers(importlib.import_module(module), inspect.isclass):
            ours = [base.__qualname__ for base in cls.__mro__ if base.__module__.startswith("diffagents.")]
            assert len(ours) <= MAX_CLASS_CHAIN, " -> ".join(ours)


LIGHT_TRAINING = """
import importlib, sys
for module in MODULES:
    importlib.import_module(module)
print(sorted(set(HEAVY) & set(sys.modules)))
for name in HEAVY:
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np
from diffagents import SRPO
r = np.random.default_rng(0)
data = {"observations": r.normal(size=(40, 3)), "actions": r.uniform(-1, 1, (40, 2)), "rewards": r.normal(size=40),
        "terminations": np.arange(40) % 20 == 19, "truncations": np.zeros(40, bool)}
steps = dict(critic_steps=2, behavior_steps=2, policy_steps=2, behavior_batch_size=8, batch_size=8)
for preset in (None, "fast"):
    agent = SRPO(preset=preset, seed=0, verbose=0, policy_kwargs={"net_arch": [8], "behavior_width": 8}, **steps).learn(data)
    print(agent.predict(np.zeros(3))[0].shape)
    del sys.modules["yaml"]  # a preset is a YAML file
"""


@pytest.fixture(scope="module")
def light_training() -> list[str]:
    """Three lines: the heavy packages that importing all of diffagents loads; an action trained without any of them, and one
    trained by a preset, which takes the reader of its file."""
    modules = [module for module in FILES if not module.endswith("__main__")]
    code = f"HEAVY = {HEAVY!r}; MODULES = {modules!r}\n{LIGHT_TRAINING}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_everything_stays_light(light_training: list[str]) -> None:
    """What is really loaded: a light import of ours may hide a heavy one of its own."""
    assert light_training[0] == "[]"


def test_training_from_arrays_needs_only_the_light_packages(light_training: list[str]) -> None:
    """With every heavy package made impossible to import, arrays still become a policy that acts."""
    assert light_training[1:] == ["(2,)", "(2,)"]
