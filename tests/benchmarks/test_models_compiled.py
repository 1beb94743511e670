"""XLA compiles the matmuls and convolutions of the benchmarks' models."""

import keras
import models
import pytest
from clusters import Clustered
from five_devices import DEVICES

import keras_allreduce

pytestmark = pytest.mark.nightly

# Of the forward pass and of backprop, on both replicas.
LEAST_SHARE = 0.9


@pytest.mark.parametrize(
    "name",
    ["cnn", "deep_narrow", "embedding", "mlp", "resnet50", "transformer"],
)
def test_most_matmuls_and_convolutions_are_in_programs(name):
    setup = models.MODELS[name]
    data = models.batches(models.batch(setup, 4), 4)
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2], fit_log=False)
    with strategy.scope():
        model = models.compiled(setup, jit_compile=True)
    clustered = Clustered.of(
        lambda: model.fit(data, steps_per_epoch=1, verbose=0)
    )
    keras.utils.clear_session()
    assert clustered.share >= LEAST_SHARE
