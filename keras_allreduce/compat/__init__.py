"""Everything the package assumes about TensorFlow and Keras.

In: objects of TensorFlow and Keras. Out: what no public API tells about them.
Each private name is imported here alone, with its reason; each assumption
about behavior has a test that names it (`tests/test_keras_assumptions.py`).

    keras.py         what Keras's Trainer, optimizers and layers do
    distribute.py    private names of tf.distribute
    datasets.py      distributed data sets
    runtime.py       the coordination service and the peers of a worker
"""
