"""Every command and block of code in the pages is run, or read word by word.

- `python` blocks run here, with the names that a reader would have. Blocks
  under `<!-- runs -->` are whole scripts: test_docs.py, test_migrating.py,
  test_tutorial_workers.py and test_compression.py run them. The script of the
  README is an example.
- Blocks under `<!-- cluster -->` need several machines or Ray. They are
  compiled, and all names and arguments of Keras, TensorFlow and ours in them
  exist.
- `bash` blocks, and commands in backticks: the options of our command lines are
  parsed by these, and each file, target of make, extra and test exists, also
  behind `mpirun` and `srun`. The nightly test runs those of our command lines
  that need one machine, on small sizes. tests/examples/ runs the examples.
- `text` blocks are output and pictures, `yaml` has its own test.
"""

import ast
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
import warm_python
from five_devices import DEVICES

import keras_allreduce
from keras_allreduce.benchmark import options as benchmark_options
from keras_allreduce.launch import options as launch_options

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted(REPOSITORY.glob("docs/*.md")),
    REPOSITORY / "tests" / "README.md",
]
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>\w+)[^\n]*-->\n)?(?P<indent> *)```(?P<language>\w*)\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = {"python", "bash", "diff", "text"}
COMMANDS = r"python3?|pip|make|mpirun|srun|torchrun|kubectl|export"


def blocks(language):
    """Each block of a language, with its page and line as the name."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in FENCE.finditer(text):
            if found["language"] == language:
                line = text[: found.start("text")].count("\n")
                yield pytest.param(
                    found["mark"],
                    found["text"],
                    id=f"{page.name}:{line}",
                    # It compiles for half a minute.
                    marks=[pytest.mark.nightly] * (page.name == "xla.md"),
                )


def commands():
    """Each command of a block, of a diff's second side, and in backticks."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = []
        for found in FENCE.finditer(text):
            code = found["text"]
            if found["language"] == "diff":
                if "-horovodrun" not in code:
                    continue
                code = re.sub(r"(?m)^-.*\n|^[+ ]", "", code)
            elif found["language"] != "bash":
                continue
            # A line ends where no quotation and no backslash goes on.
            code = re.sub(r"'[^']*'", lambda quoted: one_line(quoted[0]), code)
            lines += code.replace("\\\n", " ").splitlines()
        rest = FENCE.sub("", text)
        spans = re.findall(r"`([^`]+)`", rest.replace("\n", " "))
        lines += [span for span in spans if re.match(rf"({COMMANDS}) ", span)]
        for line in dict.fromkeys(lines):
            words = shlex.split(line, comments=True)
            if words:
                yield pytest.param(words, id=f"{page.name}: {line.strip()}")


def one_line(text):
    return " ".join(text.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_its_language(page):
    text = page.read_text(encoding="utf-8")
    found = {each["language"] for each in FENCE.finditer(text)}
    assert found <= LANGUAGES
    assert "```" not in FENCE.sub("", text)


# Code ------------------------------------------------------------------------


def build_model():
    layers = [keras.layers.Dense(4), keras.layers.Dense(2, "softmax")]
    return keras.Sequential(layers)


class Reader(dict):
    """The names that a reader of a block has; each is made when it is used."""

    def __init__(self, strategy):
        super().__init__(
            build_model=build_model,
            keras=keras,
            keras_allreduce=keras_allreduce,
            np=np,
            ops=keras.ops,
            tf=tf,
        )
        rng = np.random.default_rng(0)
        x = rng.normal(size=(32, 3)).astype("float32")
        y = (x[:, :1] > 0).astype("float32")
        with strategy.scope():
            model = build_model()
            model.compile(keras.optimizers.SGD(0.1), "mse")
            model.build(x.shape)
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
        with tf.GradientTape(persistent=True) as tape:
            plain = build_model()
            loss = tf.reduce_mean(tf.square(plain(x) - y))
        self.update(
            batches=dataset,
            counts=tf.identity,
            dataset=dataset,
            divergence=tf.ones([8, 2]),
            error=tf.ones([8]),
            loss=loss,
            median=lambda before, values: before,
            model=model,
            movie=tf.ones([8, 2]),
            optimizer=keras.optimizers.SGD(0.1),
            path="model.keras",
            penalty=tf.constant(1.0),
            self=SimpleNamespace(
                histogram=tf.Variable(0.0),
                largest=tf.Variable(0.0),
                median=tf.Variable(0.0),
                squares=tf.Variable(0.0),
            ),
            sentences=lambda: (batch for batch in [(x, y)]),
            signature=dataset.unbatch().batch(8).element_spec,
            step=lambda *batch: tf.constant(0.0),
            strategy=strategy,
            tape=tape,
            user=tf.ones([8, 2]),
            values=tf.constant(1.0),
            weights=plain.trainable_variables,
            x=x,
            y=y,
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("mark", "text"),
    [
        block
        for block in blocks("python")
        if block.values[0] not in ("runs", "cluster")
        and not block.id.startswith("README.md")
    ],
)
def test_a_block_of_python_runs(mark, text, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if "multi_worker" in request.node.name:
        strategy = keras_allreduce.MultiWorkerAllReduceStrategy()
    else:
        strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    names = Reader(strategy)
    if "step % 5" in text:
        names["step"] = tf.constant(10)
    exec(compile(text, request.node.name, "exec"), names)


@pytest.mark.parametrize(("mark", "text"), list(blocks("python")))
def test_names_and_arguments_in_a_block_exist(mark, text):
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolved(node)
        if isinstance(node, ast.Call):
            called = resolved(node.func)
            if getattr(called, "__module__", "").startswith("keras_allreduce"):
                known = inspect.signature(called).parameters
                assert {word.arg for word in node.keywords} <= set(known)


def resolved(node):
    """The object that `keras.layers.Dense` names; `None`: of another root."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    roots = {"keras": keras, "keras_allreduce": keras_allreduce, "tf": tf}
    found = roots.get(node.id)
    for part in parts if found is not None else ():
        found = getattr(found, part)
    return found


# Commands --------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the script of the reader."""
    (tmp_path / "train.py").touch()
    for folder in ("examples", "benchmarks", "tests"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_is_one_that_there_is(words, here):
    check(words)


def check(words):
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    program, *rest = words
    if program in ("mpirun", "srun", "torchrun"):
        if program == "torchrun":
            assert rest[-1] == "train.py"
        elif "python" in rest:
            check(rest[rest.index("python") :])
        else:  # A line of the batch script goes on, or names options alone.
            assert all(word.startswith("-") for word in rest[::2])
    elif program == "python":
        check_python(rest)
    elif program == "pip":
        check_pip(rest)
    elif program == "make":
        check_make(rest)
    elif program == "kubectl":
        check_kubectl(rest)
    else:
        assert program == "export"
        name, _, value = rest[0].partition("=")
        assert name in ("TF_CONFIG", "TF_XLA_FLAGS")
        if name == "TF_CONFIG":
            assert set(json.loads(value)) == {"cluster", "task"}


def check_python(words):
    if words[:1] == ["-m"]:
        module, *rest = words[1:]
        if module == "keras_allreduce.launch":
            if rest:
                check_python(list(launch_options.parse(rest).command))
        elif module == "keras_allreduce.benchmark":
            benchmark_options.options_of(
                benchmark_options.parser().parse_args(rest)
            )
        elif module == "pytest":
            check_pytest(rest)
        else:
            assert module == "keras_allreduce"
            importlib.import_module("keras_allreduce.__main__")
            assert not rest
        return
    script, *rest = words
    assert Path(script).exists(), script
    if script != "train.py":
        sources = [Path(script).read_text(), shared_options()]
        for word in rest:
            if word.startswith("--"):
                assert any(f'"{word}"' in source for source in sources), word


def shared_options():
    return (REPOSITORY / "benchmarks" / "command_line.py").read_text()


def check_pytest(words):
    for word in words:
        if word.startswith("tests/"):
            assert Path(word).exists(), word
    if "-k" in words:
        text = "".join(
            Path(word).read_text()
            for word in words
            if word.startswith("tests/")
        )
        names = " ".join(re.findall(r"def (test_\w+)", text))
        for word in words[words.index("-k") + 1].split(" or "):
            assert word in names, word


def check_pip(words):
    project = (REPOSITORY / "pyproject.toml").read_text()
    _, section = project.split("[project.optional-dependencies]")
    extras = re.findall(r"(?m)^(\w+) = \[", section.partition("\n[")[0])
    assert words[0] == "install"
    for word in words[1:]:
        found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        if found and found[1]:
            assert set(found[1].split(",")) <= set(extras)
        else:
            assert re.fullmatch(
                r"\.|[a-z][\w-]*(\[\w+\])?([<>=]=[\d.]+)?", word
            )


def check_make(words):
    makefile = (REPOSITORY / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            assert f"$({name})" in makefile
        else:
            assert re.search(rf"^{name}:", makefile, re.MULTILINE)


def check_kubectl(words):
    manifest = (REPOSITORY / "docs" / "kubernetes.yaml").read_text()
    if words[0] == "apply":
        assert words[1:] == ["-f", "docs/kubernetes.yaml"]
    else:
        assert words[0] == "logs"
        assert f"name: {words[-1].partition('=')[2]}\n" in manifest


@pytest.mark.nightly
@pytest.mark.parametrize(
    "words",
    [
        command
        for command in commands()
        if re.match(
            r"python -m keras_allreduce(\.benchmark|\.launch .*benchmark|$)",
            " ".join(command.values[0]),
        )
    ],
)
def test_a_command_of_ours_runs(words):
    words = words[1:]
    if "keras_allreduce.benchmark" in words:
        words += ["--rounds", "1", "--warmup", "1", "--loops", "1"]
        if "--model" not in words:
            words += ["--max-bytes", "64K"]
    done = warm_python.run(words, forks=True)
    assert done.returncode == 0, done.stderr
