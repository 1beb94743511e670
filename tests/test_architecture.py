"""The shape of the package: what may import what, and what is public."""

import ast
import inspect
from pathlib import Path

import pytest

import keras_allreduce

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "keras_allreduce"

# A module imports only from above it. Planning and single ops come first,
# then what measures, then the strategy and what users and Keras see.
ORDER = [
    "version",
    "memory",
    "internals",
    "checks",
    "buckets",
    "stats",
    "packing",
    "ring",
    "shared_memory",
    "nccl",
    "sparse",
    "records",
    "clocks",
    "weighing",
    "batch_all_reduce",
    "progress",
    "collectives",
    "wire",
    "worker_all_reduce",
    "worker_meeting",
    "worker_limit",
    "worker_checks",
    "worker_agreement",
    "worker_watch",
    "summing",
    "empty_replica",
    "shadowing",
    "worker_statistics",
    "one_device",
    "meter",
    "fit_log",
    "fit_hook",
    "strategy_base",
    "strategy",
    "multi_worker",
    "launch_gpus",
    "launch_plan",
    "launch_output",
    "launch_guard",
    "launch_worker",
    "launch",
    "benchmark_plan",
    "benchmark_table",
    "benchmark_step",
    "benchmark_model",
    "benchmark",
    "__init__",
]

# Planning, arithmetic and the launcher, without TensorFlow.
PURE = [
    "memory",
    "buckets",
    "stats",
    "version",
    "worker_meeting",
    "launch_gpus",
    "launch_plan",
    "launch_output",
    "launch_guard",
    "launch_worker",
    "launch",
    "benchmark_plan",
    "benchmark_table",
]

PUBLIC = [
    "AllReduceLogger",
    "AllReduceStrategy",
    "BatchAllReduce",
    "MultiWorkerAllReduceStrategy",
    "ReduceStats",
    "host_devices",
]

MAX_LINES = 400


def python_files():
    folders = ("keras_allreduce", "tests", "benchmarks", "examples")
    return [
        path
        for folder in folders
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
    ]


def name_of(path):
    return str(path.relative_to(REPOSITORY))


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path):
    """Full names of all that a file imports, wherever it does."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute."
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def dotted(node):
    """`"keras.src"` of the expression `keras.src`; else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def modules_of_package(path):
    """Modules of this package that a file imports."""
    for name in imported(path):
        first, *rest = name.split(".")
        if first == "keras_allreduce":
            assert rest, f"{path} imports the whole package."
            yield rest[0]


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.rglob("*.py")}
    assert modules == set(ORDER), "Add a new module to ORDER."
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_one_way(module):
    above = ORDER[: ORDER.index(module)]
    for name in modules_of_package(PACKAGE / f"{module}.py"):
        assert name in above, f"{module} imports {name}, which is not above it."


@pytest.mark.parametrize("module", PURE)
def test_planning_needs_no_tensorflow(module):
    roots = {name.split(".")[0] for name in imported(PACKAGE / f"{module}.py")}
    assert not roots & {"tensorflow", "keras"}


@pytest.mark.parametrize("path", python_files(), ids=name_of)
def test_private_names_are_in_one_module(path):
    if path == PACKAGE / "internals.py":
        return
    private = ("tensorflow.python", "keras.src", "tf.python", "tf.__internal__")
    names = set(imported(path))
    names |= {dotted(node) for node in ast.walk(tree_of(path))}
    found = [name for name in names if name.startswith(private)]
    assert not found, "Private names belong into internals.py."


def test_every_private_import_has_its_reason():
    path = PACKAGE / "internals.py"
    lines = path.read_text(encoding="utf-8").splitlines()
    reasons = {}
    for node in tree_of(path).body:
        module = getattr(node, "module", None) or ""
        if module.startswith(("tensorflow.python", "keras.src")):
            has_comment = lines[node.lineno - 2].startswith("#")
            reasons[module] = reasons.get(module, False) or has_comment
    assert reasons
    assert all(reasons.values()), reasons


def is_own(node):
    """Whether it is an attribute of `self`, `cls` or `super()`."""
    owner = node.value
    if isinstance(owner, ast.Call):
        owner = owner.func
    return dotted(owner) in ("self", "cls", "super")


@pytest.mark.parametrize("module", ORDER)
def test_private_attributes_of_others_are_used_in_one_module(module):
    if module == "internals":
        return
    used = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree_of(PACKAGE / f"{module}.py"))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not is_own(node)
    ]
    assert not used, "Private names belong into internals.py."


def test_the_public_names_are_these():
    assert keras_allreduce.__all__ == PUBLIC
    names = {
        name
        for name, value in vars(keras_allreduce).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert names == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_says_what_it_is(name):
    assert inspect.getdoc(getattr(keras_allreduce, name))


@pytest.mark.parametrize("module", ORDER)
def test_no_module_is_too_long(module):
    path = PACKAGE / f"{module}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_no_file_has_many_jobs():
    vague = {"utils", "util", "helpers", "misc", "common"}
    assert not [p for p in python_files() if p.stem in vague]


@pytest.mark.parametrize("module", ORDER)
def test_bad_input_is_not_met_with_assert(module):
    tree = tree_of(PACKAGE / f"{module}.py")
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Assert)]
