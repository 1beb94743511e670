"""The documents speak of tests and files that are there."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]

TESTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in REPOSITORY.glob("tests/*.py")
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_test_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    for file in re.findall(r"\btest_\w+\.py", text):
        assert file in TESTS
    for file, name in re.findall(r"(test_\w+\.py)::(\w+)", text):
        assert re.search(rf"^(def|class) {name}\b", TESTS[file], re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_an_example_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    for file in re.findall(r"\bexamples/\w+\.py", text):
        assert (REPOSITORY / file).exists()
