"""Everything the package assumes about TensorFlow and Keras.

In: TensorFlow and Keras objects. Out: facts that have no public API. Private
names are imported only here, each with its reason, and each assumption about
behaviour has a test (`tests/compat/test_keras_assumptions.py`).

    keras.py           steps, layers, variables and optimizers of a model
    keras_calls.py     fit, evaluate and predict, as a value
    keras_door.py      the methods of Keras that make that value
    keras_config.py    the layers and options of a model, settings of threads
    distribute.py      private names of tf.distribute
    variables.py       distributed variables
    datasets.py        distributed data sets
    graphs.py          graphs of traced functions, and tapes
    overrides.py       private members that subclasses override
    runtime.py         the coordination service and the peers of a worker
"""
