"""Everything the package assumes about TensorFlow and Keras.

In: TensorFlow and Keras objects. Out: facts that have no public API. Private
names are imported only here, each with its reason, and each assumption about
behaviour has a test (`tests/compat/test_keras_assumptions.py`).

    keras.py               what Keras's trainer, layers and losses do
    keras_optimizers.py    what Keras's optimizers do
    keras_calls.py         what Keras's fit, evaluate and predict do
    keras_config.py        what a Keras model consists of
    keras_door.py          where Keras tells which of them it does
    distribute.py          private names of tf.distribute
    variables.py           distributed variables
    datasets.py            distributed data sets
    overrides.py           private members that subclasses override
    runtime.py             the coordination service and the peers of a worker
"""
