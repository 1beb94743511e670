"""Everything the package assumes about TensorFlow and Keras.

In: TensorFlow and Keras objects. Out: facts that have no public API. Private
names are imported only here, each with its reason, and each assumption about
behaviour has a test (`tests/compat/test_keras_assumptions.py`).

    keras.py           steps, layers, variables and optimizers of a model
    keras_calls.py     fit, evaluate and predict, as a value
    keras_door.py      the methods of Keras that make that value
    keras_config.py    the layers and options of a model, settings of threads
    keras_losses.py    losses, their reductions and their masks
    distribute.py      private names of tf.distribute
    variables.py       distributed variables
    datasets.py        distributed data sets, and how batches are split
    iterators.py       distributed iterators
    multi_device.py    the iterators of one worker in them
    graphs.py          graphs of traced functions, and tapes
    xla.py             the ops in a graph that XLA compiles
    overrides.py       private members that subclasses override
    runtime.py         the coordination service and the peers of a worker
    exit_code.py       the code with which a process ends
    versions.py        the versions that are tested
"""
