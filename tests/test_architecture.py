"""The shape of the package: what may import what, and what is public."""

import ast
import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import keras_allreduce

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "keras_allreduce"

GROUND = [
    "addresses",
    "compat",
    "devices",
    "environment",
    "graph_order",
    "malloc",
    "version",
]

# What each part may import beside itself. `one_device`, `workers`,
# `fit_output` and `input` never import each other.
MAY_IMPORT = {
    **dict.fromkeys(GROUND, GROUND),
    "launch": ["addresses", "environment", "version"],
    "reduce": GROUND,
    "input": GROUND,
    "one_device": [*GROUND, "reduce"],
    "workers": [*GROUND, "reduce"],
    "fit_output": [*GROUND, "reduce"],
    "strategy": [
        *GROUND,
        "reduce",
        "input",
        "one_device",
        "workers",
        "fit_output",
    ],
    "__main__": [*GROUND, "strategy"],
    "benchmark": [
        *GROUND,
        "reduce",
        "strategy",
        "workers.cluster",
        "workers.ranks",
        "workers.mpi.library",
        "workers.mpi.start",
    ],
}

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
    "fit_output.pack_names",
    "fit_output.recording",
    "fit_output.stats",
    "workers.address_exchange",
    "fit_output.trace_file",
    "fit_output.xplane",
    "workers.checksum",
    "workers.cluster",
    "workers.place",
    "workers.ranks",
    "workers.rendezvous",
    "workers.reports",
    "workers.gather",
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
    "WorkerError",
    "WorkerLostError",
    "WorkerStartError",
    "WorkerTimeoutError",
    "WorkersDifferError",
    "host_devices",
]

MAX_LINES_OF_A_FILE = 300
MAX_LINES_OF_A_CLASS = 180
MAX_LINES_OF_A_FUNCTION = 40


def python_files():
    folders = ("keras_allreduce", "tests", "benchmarks", "examples")
    return [
        path
        for folder in folders
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
    ]


def name_of(path):
    return str(path.relative_to(REPOSITORY))


def module_of(path):
    """`"reduce.ring"` of `keras_allreduce/reduce/ring.py`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {
    module_of(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}


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
    return module.split(".")[0]


def test_every_part_has_its_place():
    assert {part_of(module) for module in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    part = part_of(module)
    for name in modules_imported(MODULES[module]):
        allowed = {part, *MAY_IMPORT[part]}
        assert part_of(name) in allowed or name in allowed, (
            f"{module} imports {name}, which {part} must not know."
        )


def test_there_is_no_import_cycle():
    TopologicalSorter(
        {
            module: set(modules_imported(path))
            for module, path in MODULES.items()
        }
    ).prepare()


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in MODULES.values()}), ids=name_of
)
def test_every_folder_says_what_comes_in_and_what_goes_out(folder):
    if folder == PACKAGE:
        return
    (only,) = tree_of(folder / "__init__.py").body
    assert isinstance(only, ast.Expr), "A docstring and nothing else."
    assert len(only.value.value.splitlines()) > 3


@pytest.mark.parametrize("module", PURE)
def test_planning_loads_no_tensorflow(module):
    names = f"keras_allreduce.{module}"
    assert not loaded_by(f"import {names}")


def test_the_launcher_loads_no_tensorflow():
    assert not loaded_by(
        "import sys, runpy\n"
        "sys.argv = ['launch', '--help']\n"
        "try: runpy.run_module('keras_allreduce.launch', alter_sys=True)\n"
        "except SystemExit: pass"
    )


def test_importing_the_package_is_silent_and_loads_no_tensorflow():
    assert not loaded_by("import keras_allreduce; dir(keras_allreduce)")


def loaded_by(code):
    """Which of TensorFlow and Keras a process that runs `code` has loaded."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport sys\n"
            "print('loaded:', *{'tensorflow', 'keras'} & set(sys.modules))",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.splitlines()[-1].removeprefix("loaded:").split()


def test_private_names_are_in_one_folder():
    private = ("tensorflow.python", "keras.src", "tf.python", "tf.__internal__")
    for path in python_files():
        if path.is_relative_to(PACKAGE / "compat"):
            continue
        names = set(imported(path))
        names |= {dotted(node) for node in ast.walk(tree_of(path))}
        found = [name for name in names if name.startswith(private)]
        assert not found, f"{path}: private names belong into compat/."


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


def is_own(node):
    """Whether it is an attribute of `self`, `cls` or `super()`."""
    owner = node.value
    if isinstance(owner, ast.Call):
        owner = owner.func
    return dotted(owner) in ("self", "cls", "super")


@pytest.mark.parametrize("module", MODULES)
def test_private_attributes_of_others_are_used_in_compat_alone(module):
    if part_of(module) == "compat":
        return
    used = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree_of(MODULES[module]))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not is_own(node)
    ]
    assert not used, "Private names belong into compat/."


@pytest.mark.parametrize("module", MODULES)
def test_frames_are_read_in_compat_alone(module):
    if part_of(module) == "compat":
        return
    names = {dotted(node) for node in ast.walk(tree_of(MODULES[module]))}
    assert not names & {"sys._getframe", "inspect.stack", "f_back"}


@pytest.mark.parametrize("module", MODULES)
def test_what_comes_from_elsewhere_has_a_type(module):
    untyped = [
        f"{node.name}({argument.arg})"
        for node in ast.walk(tree_of(MODULES[module]))
        if isinstance(node, ast.FunctionDef)
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.arg in ("extended", "ops")
        and argument.annotation is not None
        and ast.unparse(argument.annotation) == "Any"
    ]
    assert not untyped


def test_two_public_classes_never_share_a_name():
    homes = {}
    for module, path in MODULES.items():
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and node.name[0] != "_":
                homes.setdefault(node.name, []).append(module)
    assert not {name: at for name, at in homes.items() if len(at) > 1}


def test_the_public_names_are_these():
    assert keras_allreduce.__all__ == PUBLIC
    assert set(PUBLIC) < set(dir(keras_allreduce))
    for name in PUBLIC:
        assert getattr(keras_allreduce, name).__name__ == name


def test_a_type_checker_finds_the_public_names():
    imports = [
        node
        for node in ast.walk(tree_of(PACKAGE / "__init__.py"))
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    (under_type_checking,) = imports
    names = {
        alias.name for each in under_type_checking.body for alias in each.names
    }
    assert names == set(PUBLIC)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'RingAllReduce'"):
        _ = keras_allreduce.RingAllReduce


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_says_what_it_is(name):
    assert inspect.getdoc(getattr(keras_allreduce, name))


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_too_long(module):
    path = MODULES[module]
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES_OF_A_FILE
    for node in ast.walk(tree_of(path)):
        limit = {
            ast.ClassDef: MAX_LINES_OF_A_CLASS,
            ast.FunctionDef: MAX_LINES_OF_A_FUNCTION,
        }.get(type(node))
        if limit is not None:
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{node.name} is too long."


def test_no_file_has_many_jobs():
    vague = {"utils", "util", "helpers", "misc", "common"}
    assert not [p for p in python_files() if p.stem in vague]


@pytest.mark.parametrize("module", MODULES)
def test_bad_input_is_not_met_with_assert(module):
    tree = tree_of(MODULES[module])
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Assert)]


def test_the_design_lists_every_file_with_its_first_line():
    listed = re.findall(
        r"^\| `([\w/]+\.py)` \| (.*) \|$",
        (REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    there = {
        str(path.relative_to(PACKAGE)): ast.get_docstring(
            tree_of(path)
        ).splitlines()[0]
        for path in MODULES.values()
    }
    assert dict(listed) == there
    # Bottom up: no folder is listed before one that it imports.
    order = list(
        dict.fromkeys(part_of(Path(name).parts[0]) for name, _ in listed)
    )
    for module, path in MODULES.items():
        for name in modules_imported(path):
            mine, theirs = (
                part_of(each).removesuffix(".py") for each in (module, name)
            )
            if mine != theirs and theirs not in GROUND:
                assert order.index(theirs) < order.index(mine)
