"""The documents speak of what is there, and their examples run."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import measures
import pytest
import tensorflow as tf
import warm_python

import keras_allreduce

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = [
    *REPOSITORY.glob("*.md"),
    *REPOSITORY.glob("docs/*.md"),
    REPOSITORY / "benchmarks" / "RESULTS.md",
]

TESTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in REPOSITORY.glob("tests/**/*.py")
}

# Documented by TensorFlow, or called by compat/keras_door.py alone.
NOT_FOR_USERS = {
    *dir(tf.distribute.Strategy),
    "prepare_model",
    "refuse_model_made_outside",
}

# Pages of the site that are made of files elsewhere: see docs/hooks.py.
MADE = {"results.md", "changelog.md", "contributing.md"}


def each_document(test):
    return pytest.mark.parametrize(
        "path", DOCUMENTS, ids=lambda path: path.name
    )(test)


def text_of(path):
    return path.read_text(encoding="utf-8")


def anchors_of(path):
    """Anchors of the headings of a file, as the code host makes them."""
    text = re.sub(r"^```.*?^```", "", text_of(path), flags=re.M | re.S)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@each_document
def test_a_test_that_is_named_exists(path):
    text = text_of(path)
    for file in re.findall(r"\btest_\w+\.py", text):
        assert file in TESTS
    for file, name in re.findall(r"(test_\w+\.py)::(\w+)", text):
        assert re.search(rf"^(def|class) {name}\b", TESTS[file], re.MULTILINE)


@each_document
def test_a_script_that_is_named_exists(path):
    folders = r"(?<!/)\b(?:examples|benchmarks)/\w+\.(?:py|ipynb)"
    for file in re.findall(folders, text_of(path)):
        assert (REPOSITORY / file).exists(), file


@each_document
def test_a_module_that_is_named_exists(path):
    for file in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", text_of(path)):
        if file == "reduce/my_sum.py":  # The algorithm of a recipe.
            continue
        folders = (".", "keras_allreduce", "tests")
        assert any((REPOSITORY / each / file).exists() for each in folders), (
            file
        )


@each_document
def test_no_link_is_dead(path):
    # What is in a fence or in backticks is no link.
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text_of(path), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if re.match(r"[a-z]+:", target) or target in MADE:
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in anchors_of(file), f"{target}#{anchor}"


@pytest.mark.nightly
@pytest.mark.parametrize(
    "page",
    [path for path in DOCUMENTS if "<!-- runs -->" in text_of(path)],
    ids=lambda path: path.name,
)
def test_an_example_in_a_page_runs(page):
    blocks = re.findall(
        r"<!-- runs -->\n```python\n(.*?)```", text_of(page), re.DOTALL
    )
    assert blocks
    for block in blocks:
        done = warm_python.run(["-c", block])
        assert done.returncode == 0, done.stderr


def test_pages_name_things_instead_of_clauses():
    assert measures.noun_clauses_of_pages()[""] < 0.7


@pytest.mark.nightly
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mkdocs", "build", "--strict"),
            *("--site-dir", str(tmp_path)),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reference.html").read_text(encoding="utf-8")
    missing = [name for name in public_names() if f'id="{name}"' not in page]
    assert not missing


def public_names():
    """All of `__all__`, and the methods that our strategies add."""
    for name in keras_allreduce.__all__:
        yield f"keras_allreduce.{name}"
    for strategy in (
        keras_allreduce.AllReduceStrategy,
        keras_allreduce.MultiWorkerAllReduceStrategy,
    ):
        for name, method in inspect.getmembers(strategy, inspect.isfunction):
            ours = method.__module__.startswith("keras_allreduce")
            if ours and not name.startswith("_") and name not in NOT_FOR_USERS:
                yield f"keras_allreduce.{strategy.__name__}.{name}"
