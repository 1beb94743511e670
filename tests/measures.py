"""Counts what is hard to read in the package and its pages.

It advises, and fails nothing.

python tests/measures.py            # the table of docs/design.md
python tests/measures.py --notes    # long files and functions, noun clauses
python tests/measures.py --files    # each file with its first line
"""

import argparse
import ast
import collections
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "keras_allreduce"

PAGES = [
    *REPOSITORY.glob("*.md"),
    *REPOSITORY.glob("docs/*.md"),
    REPOSITORY / "tests" / "README.md",
]

MAX_LINES = {ast.Module: 400, ast.ClassDef: 200, ast.FunctionDef: 50}

FRAMES = re.compile(
    r"_getframe|currentframe|f_back|f_locals|inspect\.stack|caller_frames"
    r"|calling_frames|frames\.\w+\(|caller_communicates\("
)

TIME_LIMIT = re.compile(r"^_?[A-Z_]*SECONDS\b[^=\n]*=", re.MULTILINE)

# A clause in the place of a noun: "what it is", "who asks". Other projects
# have 0 to 0.2 of them in 1,000 words.
NOUN_CLAUSE = re.compile(
    r"\b(?:what|who|whoever|whatever)\s+(?:\w+\s+)?(?:is|are|was|were|has|have"
    r"|had|it|they|a|an|the|this|each|all|one|came|comes|makes|sends|can|does"
    r"|do|must|of|to|TensorFlow|Keras)\b",
    re.IGNORECASE,
)
MOST_NOUN_CLAUSES = 1.0

# Concepts that stand for the same, by a definition that each one needs.
SAME = {
    "mechanisms by which a step takes part in Keras": {
        "objects are shadowed": r"^class SummedUpdate",
        "classes are hooked": r"^def (hooked|hooks|installed)\b|_HOOKS",
    },
    'names of "the other processes"': {
        "Peers": r"^class Peers",
        "Alone": r"^class Alone",
        "SingleWorker": r"^class SingleWorker",
        "Workers": r"^class Workers\b",
        "NoStore": r"^class NoStore",
        "ProcessGroup": r"^class ProcessGroup",
        "OneProcess": r"^class OneProcess",
        "WorkerGroup": r"^class WorkerGroup",
    },
}


@dataclass(frozen=True)
class Source:
    """A file of the package."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        return str(self.path.relative_to(PACKAGE))

    @property
    def folder(self) -> str:
        first, *rest = self.path.relative_to(PACKAGE).parts
        return first if rest else "."

    def definitions(self) -> Iterator[ast.ClassDef | ast.FunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                yield node

    def code_of(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.text, node) or ""

    def globals_made_with(self, *calls: str) -> Iterator[str]:
        for node in self.tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
                name = ast.unparse(node).partition("=")[0].partition(":")[0]
                value = ast.unparse(node.value)
                if any(call in value for call in calls):
                    yield f"{self.name}:{name.strip()}"

    def classes_of(self, base: str) -> Iterator[str]:
        for node in self.definitions():
            if isinstance(node, ast.ClassDef) and base in map(
                ast.unparse, node.bases
            ):
                yield f"{self.name}:{node.name}"

    def words(self) -> str:
        """All docstrings and comments."""
        nodes = [self.tree, *self.definitions()]
        texts = [ast.get_docstring(node) or "" for node in nodes]
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        texts += [
            token.string[1:]
            for token in tokens
            if token.type == tokenize.COMMENT
        ]
        return "\n".join(texts)


def sources() -> list[Source]:
    return [
        Source(path, text := path.read_text(encoding="utf-8"), ast.parse(text))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def too_long(files: list[Source]) -> Iterator[str]:
    """Yields what is longer than a reader likes, with its length."""
    for file in files:
        for node in (file.tree, *file.definitions()):
            if isinstance(node, ast.Module):
                lines, name = len(file.text.splitlines()), ""
            else:
                lines = (node.end_lineno or 0) - node.lineno + 1
                name = f":{node.lineno} {node.name}"
            if lines > MAX_LINES[type(node)]:
                yield f"{file.name}{name}: {lines} lines"


def noun_clauses(files: list[Source]) -> dict[str, float]:
    """Noun clauses in 1,000 words, by folder; `""` has all."""
    words: dict[str, int] = collections.Counter()
    found: dict[str, int] = collections.Counter()
    for file in files:
        text = file.words()
        for folder in ("", file.folder):
            words[folder] += len(re.findall(r"\w+", text))
            found[folder] += len(NOUN_CLAUSE.findall(text))
    return {
        folder: 1000 * found[folder] / words[folder]
        for folder in sorted(words)
        if words[folder]
    }


def noun_clauses_of_pages() -> dict[str, float]:
    """Noun clauses in 1,000 words of each page of Markdown; `""` has all.

    Code, names in backticks and addresses are no words. The results of the
    benchmarks, a record, are not counted.
    """
    words: dict[str, int] = collections.Counter()
    found: dict[str, int] = collections.Counter()
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"(?s)```.*?```|`[^`]*`|\]\([^)]*\)", " ", text)
        for page in ("", str(path.relative_to(REPOSITORY))):
            words[page] += len(re.findall(r"\w+", text))
            found[page] += len(NOUN_CLAUSE.findall(text))
    return {page: 1000 * found[page] / words[page] for page in sorted(words)}


def table(files: list[Source]) -> Iterator[tuple[str, str]]:
    """Yields each measure and its figure."""
    text = "\n".join(file.text for file in files)
    yield (
        "functions that read caller frames",
        _listed(
            f"{file.name}:{node.name}"
            for file in files
            for node in file.definitions()
            if isinstance(node, ast.FunctionDef)
            and FRAMES.search(file.code_of(node))
        ),
    )
    for measure, names in SAME.items():
        yield (
            measure,
            _listed(
                name
                for name, pattern in names.items()
                if re.search(pattern, text, re.MULTILINE)
            ),
        )
    yield (
        "thread-locals and context variables",
        _listed(
            name
            for file in files
            for name in (
                *file.globals_made_with("threading.local", "ContextVar"),
                *file.classes_of("threading.local"),
            )
        ),
    )
    yield (
        "module-global registries of what is known of a model",
        _listed(
            name
            for file in files
            if file.folder == "one_device"
            for name in file.globals_made_with("weakref.Weak")
        ),
    )
    yield (
        "files of workers that hold a time limit",
        _listed(
            file.name
            for file in files
            if file.folder == "workers" and TIME_LIMIT.search(file.text)
        ),
    )
    classes = [
        node
        for file in files
        for node in file.definitions()
        if isinstance(node, ast.ClassDef)
    ]
    yield (
        "classes; files; lines",
        (f"{len(classes)}; {len(files)}; {len(text.splitlines())}"),
    )
    tests = [*(REPOSITORY / "tests").rglob("*.py")]
    lines = sum(len(path.read_text().splitlines()) for path in tests)
    yield "files; lines of tests", f"{len(tests)}; {lines}"
    clauses = noun_clauses(files)
    total = clauses.pop("")
    above = ", ".join(
        f"{folder} {rate:.1f}"
        for folder, rate in sorted(clauses.items(), key=lambda pair: -pair[1])
        if rate > MOST_NOUN_CLAUSES
    )
    yield (
        "noun clauses in 1,000 words of docstrings and comments",
        (f"{total:.1f}" + (f" ({above})" if above else "")),
    )
    yield (
        "noun clauses in 1,000 words of Markdown",
        f"{noun_clauses_of_pages()['']:.1f}",
    )


def _listed(names: Iterator[str]) -> str:
    found = list(names)
    return f"{len(found)}" + (f" ({', '.join(found)})" if found else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--notes", action="store_true")
    parser.add_argument("--files", action="store_true")
    chosen = parser.parse_args()
    files = sources()
    if chosen.notes:
        for each in too_long(files):
            print(f"note: {each}")
        for folder, rate in noun_clauses(files).items():
            if folder and rate > MOST_NOUN_CLAUSES:
                print(f"note: {folder}: {rate:.1f} noun clauses in 1,000 words")
        for page, rate in noun_clauses_of_pages().items():
            if page and rate > MOST_NOUN_CLAUSES:
                print(f"note: {page}: {rate:.1f} noun clauses in 1,000 words")
    elif chosen.files:
        for file in files:
            said = ast.get_docstring(file.tree) or ""
            print(f"| `{file.name}` | {said.partition(chr(10))[0]} |")
    else:
        for measure, figure in table(files):
            print(f"| {measure} | {figure} |")


if __name__ == "__main__":
    main()
