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
        r"Pass `bytes_per_pack`, in bytes",
    ):
        strategy(bucket_cap_mb=25)


def test_an_unknown_argument_is_pythons_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'nop'"):
        AllReduceStrategy(nop=1)  # type: ignore[call-arg]


def test_no_foreign_name_hides_an_argument_of_ours():
    for strategy in STRATEGIES:
        signature = inspect.signature(strategy)
        assert "bytes_per_pack" in signature.parameters
        assert not OURS.keys() & signature.parameters.keys()
