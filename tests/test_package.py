"""The wheel and the sdist: built, installed elsewhere, and used there.

Needs no network: the build uses the setuptools of this environment, and the
environment that the wheel is installed in sees the packages of this one.
"""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from deadlines import DEADLINE_SECONDS

import keras_allreduce

pytestmark = pytest.mark.nightly

REPOSITORY = Path(__file__).parent.parent

PROGRAM = """
import keras
import numpy as np

import keras_allreduce

strategy = keras_allreduce.AllReduceStrategy(keras_allreduce.host_devices(2))
stats: keras_allreduce.ReduceStats | None = strategy.all_reduce_stats()
if stats is not None:
    milliseconds: float = stats.all_reduce_ms
callback: keras.callbacks.Callback = keras_allreduce.AllReduceLogger()
ops = keras_allreduce.BatchAllReduce("ring", bytes_per_pack=1024)
"""

# What a type checker must not let pass, and the words it says it in.
WRONG = {
    'keras_allreduce.host_devices("2")': "arg-type",
    "keras_allreduce.AllReduceStrategy(packs=1)": "call-arg",
    "keras_allreduce.BatchAllReduce(algorithm=1)": "arg-type",
    "keras_allreduce.RingStrategy()": "attr-defined",
    "keras_allreduce.AllReduceStrategy().all_reduce_stats().x": "union-attr",
}


def run(*command, folder, **environment):
    """Runs a command away from the checkout; returns what it prints."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        env={
            **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1",
            **environment,
        },
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(
        *[sys.executable, "-m", "build", "--no-isolation"],
        *["--skip-dependency-check", "--outdir", folder, REPOSITORY],
        folder=folder,
    )
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith("/METADATA")]
        return message_from_bytes(wheel.read(name))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Python of an environment with the wheel, and all else of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(packages)
    # After its own, so that the wheel hides an editable install.
    own = [
        p for p in sys.path if p.endswith(("site-packages", "dist-packages"))
    ]
    (packages / "others.pth").write_text("\n".join(own))
    return folder / "bin" / "python"


def test_an_sdist_can_run_its_tests_and_build_its_docs(built):
    with tarfile.open(built[1]) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    tracked = {
        str(path.relative_to(REPOSITORY))
        for folder in ("tests", "examples", "docs", "benchmarks")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    needed = {"Makefile", "CHANGELOG.md", "LICENSE", "mkdocs.yml", "setup.cfg"}
    assert not (tracked | needed) - inside


def test_the_wheel_has_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {
        "keras_allreduce",
        f"keras_allreduce-{keras_allreduce.__version__}.dist-info",
    }
    assert "keras_allreduce/py.typed" in names
    package = REPOSITORY / "keras_allreduce"
    for path in package.rglob("*.py"):
        assert str(path.relative_to(REPOSITORY)) in names


def test_installing_it_installs_no_tensorflow(metadata):
    # tensorflow-cpu and nightlies would be overwritten; so would keras-nightly.
    requirements = metadata.get_all("Requires-Dist")
    always = [each for each in requirements if "extra ==" not in each]
    assert sorted(always) == ["absl-py", "numpy", "rich"]
    extra = [each for each in requirements if 'extra == "tensorflow"' in each]
    assert sorted(each.split(";")[0].strip() for each in extra) == [
        "keras>=3.10",
        "tensorflow>=2.16",
    ]


def test_the_extra_asks_for_the_floors_that_a_strategy_checks():
    from keras_allreduce.compat.versions import OLDEST

    project = (REPOSITORY / "pyproject.toml").read_text()
    for name, (major, minor) in OLDEST.items():
        floors = re.findall(
            rf'"{name.lower()}(?:\[[^"]*\])?>=([\d.]+)"', project
        )
        assert set(floors) == {f"{major}.{minor}"}


def test_no_link_on_the_index_leads_nowhere(metadata):
    page = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "docs/xla.md" in page
    anchors = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in anchors}
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert link.startswith("http") or link.removeprefix("#") in anchors


def test_a_known_address_makes_absolute_links():
    sys.path.insert(0, str(REPOSITORY))
    try:
        import setup
    finally:
        sys.path.remove(str(REPOSITORY))
    readme = "[a](docs/a.md#b), [c](https://c) and [d](#d)"
    project = '[project.urls]\nSource = "https://host/us/"\n'
    assert setup.page(readme, project) == (
        "[a](https://host/us/blob/main/docs/a.md#b), [c](https://c) and [d](#d)"
    )
    assert setup.page(readme, "") == "a, [c](https://c) and [d](#d)"


def test_the_example_of_the_readme_runs_from_the_wheel(installed, tmp_path):
    readme = (REPOSITORY / "README.md").read_text()
    (code, *_) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "example.py").write_text(
        f"{code}\nprint(keras_allreduce.__file__)\n"
    )
    output = run(installed, "example.py", folder=tmp_path)
    assert "batch_all_reduce: 8 all-reduces" in output
    *_, home = output.splitlines()
    assert Path(home).is_relative_to(installed.parent.parent)


def test_the_types_of_a_users_program_are_checked(installed, tmp_path):
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(PROGRAM)
    wrong.write_text("\n".join(["import keras_allreduce", *WRONG]))
    check = [installed, "-m", "mypy", "--strict", "--show-error-codes"]
    check += ["--cache-dir", tmp_path / "cache", "--no-error-summary"]
    # TensorFlow and Keras are large, and ship no types.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\n[mypy-keras.*,tensorflow.*,numpy.*,absl.*]\n"
        "ignore_missing_imports = True\nfollow_imports = skip\n"
    )
    run(*check, right, folder=tmp_path)
    done = subprocess.run(
        list(map(str, [*check, wrong])),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    found = re.findall(
        r"^wrong.py:(\d+): error: .*\[([\w-]+)\]", done.stdout, re.M
    )
    assert dict(found) == {
        str(number): code for number, code in enumerate(WRONG.values(), start=2)
    }, done.stdout


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["-m", "keras_allreduce"], "[X] shared_memory 2 logical CPU devices"),
        (["-m", "keras_allreduce.launch", "--help"], "--workers"),
    ],
    ids=["check", "launch"],
)
def test_the_commands_run_from_the_wheel(command, says, installed, tmp_path):
    assert says in run(installed, *command, folder=tmp_path)
