"""The notebook runs, and shows the fit output as a notebook shows it."""

import re
from pathlib import Path

import pytest
from deadlines import DEADLINE_SECONDS

pytestmark = pytest.mark.nightly

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The code of each cell, and the lines that stand below it at the end."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook,
        timeout=DEADLINE_SECONDS,
        startup_timeout=DEADLINE_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": tmp_path_factory.mktemp("notebook")}},
    ).execute()
    return {
        cell.source: drawn(
            "".join(
                output.text
                for output in cell.outputs
                if output.output_type == "stream" and output.name == "stdout"
            )
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def drawn(text):
    """Lines of a text with the control characters that a notebook obeys."""
    lines = []
    for line in re.sub(r"\x1b\[[\d;]*m", "", text).split("\n"):
        shown, column = [], 0
        for character in line:
            if character == "\r":
                column = 0
            elif character == "\x08":
                column = max(0, column - 1)
            else:
                shown[column : column + 1] = [character]
                column += 1
        lines.append("".join(shown).rstrip())
    return lines


def below(executed, code):
    (lines,) = [lines for source, lines in executed.items() if code in source]
    return lines


def test_text_is_drawn_as_a_notebook_draws_it():
    assert drawn("1/2\x08\x08\x08\r\x1b[1m2/2\x1b[0m!\nnext") == [
        "2/2!",
        "next",
    ]
    assert drawn("long text\rlang") == ["lang text"]


def test_a_notebook_shows_the_plan_once_and_the_cost_of_each_epoch(executed):
    first, plan, *rest = below(executed, "AllReduceLogger()")
    assert first == "Epoch 1/3"
    assert re.fullmatch(
        r"batch_all_reduce: 8 all-reduces with algorithm = shared_memory, "
        r"num_packs = \d+ \(\S+ MiB float32\), num_replicas = 2",
        plan,
    )
    bars = [line for line in rest if line and not line.startswith("Epoch")]
    assert len(bars) == 3, rest
    for bar in bars:
        # Whole, in one line, with nothing left of the bars before it.
        assert re.fullmatch(
            r"24/24 ━{20} \d+s \S+/step - accuracy: \S+ - loss: \S+ - "
            r"all_reduce: \S+s - overlap: \d+%( - bandwidth: \S+GB/s)?",
            bar,
        )


def test_the_logs_have_the_cost(executed):
    lines = below(executed, 'history.history["all_reduce_ms"]')
    assert [line.split(":")[0] for line in lines if line] == [
        "epoch 1",
        "epoch 2",
        "epoch 3",
    ]


def test_the_weights_are_those_of_one_device(executed):
    (line, _) = below(executed, "difference = max")
    assert re.fullmatch(r"largest difference in a weight: \de-0[6-9]", line)


def test_the_notebook_is_committed_as_it_was_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [
        number + 1 for number in range(len(code))
    ]
    fit = "".join(o.text for cell in code for o in cell.outputs)
    assert "batch_all_reduce: 8 all-reduces" in fit
    assert "/home/" not in fit
