"""What `benchmarks/emulated_cluster.py` emulates, and a run of two workers."""

import argparse
import subprocess
import sys

import emulated_cluster
import gradient_sets
import namespaces
import pytest
from deadlines import DEADLINE_SECONDS
from emulated_cluster import Setting
from gradient_sets import Profile

from keras_allreduce.reduce.cost_model import Link

MIB = 2**20

# Two gradients of 8 MiB, of which the first takes three times as much work.
PROFILE = Profile.of([(2 * MIB,), (2 * MIB,)], [3, 1], 0.3)


def options(**given):
    """The command line."""
    return argparse.Namespace(
        **{
            "stretch": 10.0,
            "shrink": 2,
            "rate": 1e9,
            "bytes_per_pack": 8 * MIB,
            "workers": [2],
            **given,
        }
    )


def test_gradients_are_ready_in_the_reverse_order_as_the_work_is_done():
    assert PROFILE.ready == (1.0, 0.25)


def test_bert_has_the_gradients_of_bert_base():
    bert = gradient_sets.bert_profile(1.0)
    assert len(bert.shapes) == 199
    assert gradient_sets.nbytes(bert.shapes) == 4 * 109_482_240
    # The embeddings are ready when backprop ends, the pooler at once.
    assert bert.ready[0] == 1.0
    assert bert.ready[-1] == 0.0
    assert list(bert.ready) == sorted(bert.ready, reverse=True)


def test_all_others_may_send_to_one_worker_and_no_queue_overflows():
    for workers in (2, 16):
        setting = Setting("", "grpc", "even", "float32", workers)
        window = emulated_cluster.links(setting, options())["window"]
        assert window > 4 * emulated_cluster.FRAME
        assert (workers - 1) * window <= emulated_cluster.QUEUE


def test_links_are_slower_by_both_factors_and_one_by_four_more():
    setting = Setting("", "grpc", "slow", "float32", 3)
    found = emulated_cluster.links(setting, options())
    assert [up for up, _ in found["rate"]] == [
        "50000000bit",
        "12500000bit",
        "50000000bit",
    ]


def test_the_model_is_asked_about_the_stretched_step():
    setting = Setting("", "grpc", "even", "float32", 2)
    # Packs of 4 MiB take a second each. They are ready after 1.5 s and 3 s.
    link = Link(alpha=0.0, bandwidth=4 * MIB)
    seconds = emulated_cluster.predicted_seconds(
        setting, PROFILE, link, options()
    )
    assert seconds == pytest.approx(4.0)


def test_packs_that_do_not_shrink_are_an_error():
    many = Profile.of([(MIB // 16,)] * 64, [1] * 64, 0.3)
    with pytest.raises(SystemExit, match="2 packs instead of 16"):
        emulated_cluster.check_packs(many, options(bytes_per_pack=0, shrink=64))


def test_rates_have_a_unit():
    assert emulated_cluster.rate("2.5gbit") == 2.5e9
    with pytest.raises(argparse.ArgumentTypeError, match="gbit or mbit"):
        emulated_cluster.rate("10")


@pytest.mark.nightly
def test_two_workers_train_in_a_cluster():
    if namespaces.missing():
        pytest.skip(namespaces.missing())
    done = subprocess.run(
        [
            sys.executable,
            emulated_cluster.__file__,
            *("--models", "BERT", "--workers", "2", "--steps", "1"),
            *("--stretch", "2", "--shrink", "40"),
            *("--limit", str(DEADLINE_SECONDS)),
        ],
        capture_output=True,
        text=True,
        timeout=4 * DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| BERT | grpc | even | float32 | 2 |" in done.stdout
