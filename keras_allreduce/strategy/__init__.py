"""The strategies: subclasses of TensorFlow's own.

In: calls of Keras and users to a `tf.distribute.Strategy`. Out: TensorFlow's
behaviour, except for gradients, Keras steps and datasets, which are handled by
`reduce`, `one_device`, `workers` and `input`.

    one_machine.py     AllReduceStrategy               --+--> base.py
    multi_worker.py    MultiWorkerAllReduceStrategy    --+    extended.py
"""
