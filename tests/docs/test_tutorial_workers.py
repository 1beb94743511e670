"""The tutorial for several machines, on two workers of this one."""

import re
from pathlib import Path

import keras
import pytest
import scripts_of_docs

pytestmark = pytest.mark.nightly

PAGE = Path(__file__).parents[2] / "docs" / "tutorial_workers.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_its_script_trains_two_workers_and_saves_once(tmp_path):
    (script,) = re.findall(
        r"<!-- runs: train.py -->\n```python\n(.*?)```", TEXT, re.DOTALL
    )
    output = scripts_of_docs.run_workers(
        tmp_path, script + scripts_of_docs.REPORT
    )
    scripts_of_docs.assert_two_the_same(scripts_of_docs.weights_in(output))
    assert keras.models.load_model(tmp_path / "digits.keras").built
    (plan,) = re.findall(r"```text\n(batch_all_reduce: .*)\n```", TEXT)
    assert plan in output
    assert output.count("Epoch 3/3") == 1
