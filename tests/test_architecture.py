"""The shape of the package: what may import what, and what is public."""

import ast
import functools
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import keras_allreduce

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "keras_allreduce"

# A part imports those of the layers below it, and never another one of its own
# layer. What two of them share, a protocol for example, lies on the ground:
# `compat/` and the modules that are in no folder.
LAYERS = [
    ["ground", "compat"],
    ["reduce"],
    ["input", "one_device", "workers", "fit_output"],
    ["strategy"],
    ["__main__", "benchmark"],
]

# Planning, arithmetic and the launcher, which load no TensorFlow.
PURE = [
    "addresses",
    "__main__",
    "compat.versions",
    "environment",
    "malloc",
    "version",
    "reduce.buckets",
    "reduce.cost_model",
    "reduce.pack_sizes",
    "reduce.plan",
    "fit_output.chrome_trace",
    "fit_output.recording",
    "fit_output.stats",
    "workers.fingerprint",
    "workers.cluster",
    "workers.ranks",
    "workers.reports",
    "workers.signals",
    "workers.time_limit",
    "workers.timing",
    "launch.__main__",
    "launch.gpus",
    "launch.guard",
    "launch.job",
    "launch.options",
    "launch.output",
    "launch.worker",
    "benchmark.options",
    "benchmark.table",
]

PUBLIC = [
    "AllReduceLogger",
    "AllReduceStrategy",
    "AllReduceTensorBoard",
    "AllReduceTimeline",
    "BatchAllReduce",
    "LauncherClusterResolver",
    "Link",
    "MultiWorkerAllReduceStrategy",
    "ReduceStats",
    "WireFormat",
    "WorkerError",
    "WorkerLostError",
    "WorkerStartError",
    "WorkerTimeoutError",
    "WorkersDifferError",
    "host_devices",
]


def python_files():
    folders = ("keras_allreduce", "tests", "benchmarks", "examples")
    return [
        path
        for folder in folders
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
    ]


def module_of(path):
    """`"reduce.ring"` of `keras_allreduce/reduce/ring.py`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {
    module_of(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}


@functools.cache
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


def modules_imported(path):
    """Modules of this package that a file imports, such as `reduce.ring`."""
    for name in imported(path):
        first, *rest = name.split(".")
        if first != "keras_allreduce":
            continue
        assert rest, f"{path} imports the whole package."
        known = [
            ".".join(rest[:length])
            for length in range(len(rest), 0, -1)
            if ".".join(rest[:length]) in MODULES
        ]
        assert known, f"{path} imports {name}, which is in no module."
        yield known[0]


def part_of(module):
    """The folder that a module is in; `"ground"` for those in none."""
    first, *rest = module.split(".")
    return first if rest or first == "__main__" else "ground"


def imports_of_modules():
    for module, path in MODULES.items():
        for name in modules_imported(path):
            yield module, name


def nodes_outside_compat(kind):
    for module, path in MODULES.items():
        if part_of(module) != "compat":
            for node in ast.walk(tree_of(path)):
                if isinstance(node, kind):
                    yield f"{module}:{node.lineno} {ast.unparse(node)}", node


def test_imports_go_one_way():
    height = {
        part: level for level, parts in enumerate(LAYERS) for part in parts
    }
    assert {part_of(module) for module in MODULES} == {*height, "launch"}
    for module, name in imports_of_modules():
        importer, part = part_of(module), part_of(name)
        if (
            importer == "launch"
        ):  # It runs beside the workers for the whole job.
            fits = part in ("launch", "ground")
        elif importer in LAYERS[0]:
            fits = part in LAYERS[0]
        else:
            fits = part == importer or height[part] < height[importer]
        assert fits, f"{module} imports {name}, which {importer} must not know."


def test_there_is_no_import_cycle():
    graph = {module: set() for module in MODULES}
    for module, name in imports_of_modules():
        graph[module].add(name)
    TopologicalSorter(graph).prepare()


def test_every_folder_says_what_comes_in_and_what_goes_out():
    for folder in {path.parent for path in MODULES.values()} - {PACKAGE}:
        (only,) = tree_of(folder / "__init__.py").body
        assert isinstance(only, ast.Expr), f"{folder}: a docstring, no more."
        assert len(ast.literal_eval(only.value).splitlines()) > 3, folder


def test_planning_and_the_launcher_load_no_tensorflow():
    """Importing the package is silent as well."""
    code = """
import importlib, runpy, sys
import keras_allreduce
dir(keras_allreduce)
for name in sys.argv[1:]:
    importlib.import_module(f"keras_allreduce.{name}")
    loaded = {"tensorflow", "keras"} & set(sys.modules)
    assert not loaded, f"{name} loads {loaded}"
sys.argv = ["launch", "--help"]
try:
    runpy.run_module("keras_allreduce.launch", alter_sys=True)
except SystemExit:
    pass
assert not {"tensorflow", "keras"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", code, *PURE],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_private_names_are_in_one_folder():
    private = ("tensorflow.python", "keras.src", "tf.python", "tf.__internal__")
    for path in python_files():
        if path.is_relative_to(PACKAGE / "compat"):
            continue
        names = set(imported(path))
        names |= {dotted(node) for node in ast.walk(tree_of(path))}
        found = [name for name in names if name.startswith(private)]
        assert not found, f"{path}: private names belong into compat/."


def test_private_attributes_of_others_are_used_in_compat_alone():
    """Those of a foreign base are listed: `compat/test_overrides.py`."""
    used = [
        where
        for where, node in nodes_outside_compat(ast.Attribute)
        if node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not is_own(node)
    ]
    frames = [
        where
        for where, node in nodes_outside_compat(ast.Attribute)
        if node.attr == "f_back" or dotted(node) == "inspect.stack"
    ]
    assert not used + frames, "Private names and frames belong into compat/."


def is_own(node):
    """Whether it is an attribute of `self`, `cls` or `super()`."""
    owner = node.value
    if isinstance(owner, ast.Call):
        owner = owner.func
    return dotted(owner) in ("self", "cls", "super")


def test_every_private_import_has_its_reason():
    reasons = {}
    for path in (PACKAGE / "compat").glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in tree_of(path).body:
            module = getattr(node, "module", None) or ""
            if module.startswith(("tensorflow.python", "keras.src")):
                has_comment = lines[node.lineno - 2].startswith("#")
                reasons[module] = reasons.get(module, False) or has_comment
    assert reasons
    assert all(reasons.values()), reasons


def test_what_comes_from_elsewhere_has_a_type():
    assert not [
        f"{module}.{node.name}({argument.arg})"
        for module, path in MODULES.items()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef)
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.arg in ("extended", "ops")
        and argument.annotation is not None
        and ast.unparse(argument.annotation) == "Any"
    ]


def test_bad_input_is_not_met_with_assert():
    assert not [
        (module, node.lineno)
        for module, path in MODULES.items()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Assert)
    ]


def test_a_name_says_one_thing():
    homes = {}
    for module, path in MODULES.items():
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and node.name[0] != "_":
                homes.setdefault(node.name, []).append(module)
    assert not {name: at for name, at in homes.items() if len(at) > 1}
    vague = {"utils", "util", "helpers", "misc", "common"}
    assert not [path for path in python_files() if path.stem in vague]


def test_the_public_names_are_these():
    assert keras_allreduce.__all__ == PUBLIC
    assert set(PUBLIC) < set(dir(keras_allreduce))
    for name in PUBLIC:
        assert getattr(keras_allreduce, name).__name__ == name
        assert inspect.getdoc(getattr(keras_allreduce, name))
    with pytest.raises(AttributeError, match="no attribute 'RingAllReduce'"):
        _ = keras_allreduce.RingAllReduce  # type: ignore[attr-defined]
    # A type checker finds the same.
    (under_type_checking,) = (
        node
        for node in ast.walk(tree_of(PACKAGE / "__init__.py"))
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    assert set(PUBLIC) == {
        alias.name
        for each in under_type_checking.body
        if isinstance(each, ast.ImportFrom)
        for alias in each.names
    }
