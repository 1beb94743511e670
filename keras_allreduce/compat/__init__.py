"""Everything the package assumes about TensorFlow and Keras.

In: objects of TensorFlow and Keras. Out: what no public API tells about them.
Each private name is imported here alone, with its reason; each assumption
about behaviour has a test that names it (`tests/test_keras_assumptions.py`).

    keras.py               what Keras's trainer, layers and losses do
    keras_optimizers.py    what Keras's optimizers do
    keras_calls.py         what Keras's fit, evaluate and predict do
    distribute.py          private names of tf.distribute
    variables.py           distributed variables
    datasets.py            distributed data sets
    runtime.py             the coordination service and the peers of a worker
"""
