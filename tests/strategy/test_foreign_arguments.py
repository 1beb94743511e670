"""Arguments that other packages have under another name."""

import inspect

import pytest

from keras_allreduce import AllReduceStrategy, MultiWorkerAllReduceStrategy
from keras_allreduce.strategy.checks import OURS

STRATEGIES = (AllReduceStrategy, MultiWorkerAllReduceStrategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_argument_of_ddp_names_ours(strategy):
    with pytest.raises(
        TypeError,
        match=r"no argument of this name. Received: bucket_cap_mb=25. "
        r"Pass `bytes_per_pack=26214400`, in bytes",
    ):
        strategy(bucket_cap_mb=25)


REMEDIES = {
    "bucket_cap_mb": (None, "Pass `bytes_per_pack`, in bytes"),
    "output_device": (0, "Leave it out"),
    "init_sync": (False, "same value on all replicas"),
    "mixed_precision": (None, "keras.mixed_precision.set_global_policy"),
    "delay_all_reduce_named_params": ([], "when its gradients are ready"),
    "backend": ("nccl", "`transport` to `MultiWorkerAllReduceStrategy`"),
    "init_method": ("env://", "`cluster_resolver`"),
    "world_size": (2, "`cluster_resolver`"),
    "rank": (0, "`cluster_resolver`"),
    "gradient_predivide_factor": (2.0, "Leave it out"),
    "process_set": (None, "`cluster_resolver`"),
    "device_dense": ("", "Leave it out"),
    "device_sparse": ("", "Leave it out"),
    "average_aggregated_gradients": (True, "`gradient_accumulation_steps`"),
    "op": ("Adasum", "Adasum is not supported"),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", REMEDIES)
def test_an_argument_of_another_package_has_a_remedy(name, strategy):
    value, remedy = REMEDIES[name]
    with pytest.raises(TypeError) as error:
        strategy(**{name: value})
    assert f"of this name. Received: {name}={value!r}. " in str(error.value)
    assert remedy in str(error.value)


@pytest.mark.parametrize("name", ["wire_dtype", "compression"])
def test_one_process_has_no_argument_about_what_crosses(name):
    with pytest.raises(
        TypeError,
        match="argument of `MultiWorkerAllReduceStrategy`: inside one process "
        "nothing crosses",
    ):
        AllReduceStrategy(**{name: None})


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("no_sync", "`gradient_accumulation_steps`"),
        ("join", "takes part with weight 0"),
        ("register_comm_hook", "`wire_dtype` or `compression`"),
    ],
)
@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_method_of_ddp_names_ours(kind, name, ours):
    strategy = kind.__new__(kind)
    with pytest.raises(AttributeError, match=f"Received: {name}") as error:
        getattr(strategy, name)
    assert ours in str(error.value)
    assert not hasattr(strategy, name)


def test_another_attribute_that_is_not_there_is_pythons_error():
    strategy = AllReduceStrategy.__new__(AllReduceStrategy)
    with pytest.raises(
        AttributeError, match="'AllReduceStrategy' object has no attribute 'no"
    ):
        strategy.nop  # noqa: B018


def test_an_unknown_argument_is_pythons_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'nop'"):
        AllReduceStrategy(nop=1)  # type: ignore[call-arg]


def test_no_foreign_name_hides_an_argument_of_ours():
    for strategy in STRATEGIES:
        signature = inspect.signature(strategy)
        assert "bytes_per_pack" in signature.parameters
        assert not OURS.keys() & signature.parameters.keys()
