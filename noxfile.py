"""Runs the fast tests against the oldest, the default and the newest versions.

    make test-versions            # all, and a table of them
    nox -s "versions(oldest)"

Each pair of TensorFlow and Keras has an environment of its own. The table, in
build/versions.md, is the one of docs/versions.md.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nox

nox.options.sessions = ["versions"]
nox.options.reuse_existing_virtualenvs = True

PAIRS = {
    "oldest": ["tensorflow-cpu==2.16.*", "keras==3.10.*", "tf_keras==2.16.*"],
    "default": [".[tensorflow]"],
    "newest": ["--pre", "tf-nightly-cpu"],  # Brings keras-nightly.
}

TOOLS = [
    "hypothesis>=6.100",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3",
    "scikit-learn",
]

# What versions of TensorFlow and Keras can break.
TESTS = [
    "tests/reduce/test_batch_all_reduce.py",
    "tests/fit_output/test_clocks.py",
    "tests/strategy/test_drop_in.py",
    "tests/reduce/test_observe.py",
    "tests/programs/test_programs.py",
    "tests/programs/test_threads.py",
    "tests/one_device/test_randomness.py",
    "tests/reduce/test_sparse.py",
    "tests/one_device/test_update.py",
    "tests/compat/test_functions.py",
    "tests/compat/test_versions.py",
    "tests/compat/test_keras_assumptions.py",
    "tests/compat/test_overrides.py",
    "tests/workers/test_multi_worker.py::"
    "test_workers_train_as_one_device_does[even_batches]",
    "tests/workers/test_multi_worker.py::"
    "test_workers_train_as_one_device_does[embedding]",
]

FOUND = (
    "import sys, numpy, tensorflow, keras; print('| %d.%d' % "
    "sys.version_info[:2], tensorflow.__version__, keras.__version__, "
    "numpy.__version__, sep=' | ')"
)

TABLE = Path("build/versions.md")
HEAD = (
    "| pair | Python | TensorFlow | Keras | NumPy | tests |\n"
    "|---|---|---|---|---|---|\n"
)


@nox.session(python=False)
def start(_session: nox.Session) -> None:
    """Begins a new table."""
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(HEAD, encoding="utf-8")


@nox.session
@nox.parametrize("pair", list(PAIRS), ids=list(PAIRS))
def versions(session: nox.Session, pair: str) -> None:
    """Runs the fast tests against one pair of versions."""
    # First, so that the package finds them and installs no other.
    session.install(*PAIRS[pair], *TOOLS)
    session.install("--editable", ".")
    report = Path(session.create_tmp(), "report.xml").resolve()
    try:
        session.run(
            *["python", "-m", "pytest", "-q", "-n", "auto", *TESTS],
            *[f"--junitxml={report}", *session.posargs],
            env={"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
        )
    finally:
        found = session.run(
            *["python", "-c", FOUND],
            silent=True,
            env={"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
        )
        _note(pair, str(found).strip().splitlines()[-1], report)


def _note(pair: str, found: str, report: Path) -> None:
    """Adds a row to the table."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    count = {
        name: int(suite.get(name, 0))
        for name in ("tests", "failures", "errors", "skipped")
    }
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    text = f"{passed} passed" + (f", {failed} failed" if failed else "")
    if not TABLE.exists():
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(HEAD, encoding="utf-8")
    with TABLE.open("a", encoding="utf-8") as table:
        table.write(f"| {pair} {found} | {text} |\n")
