"""The strategies: subclasses of TensorFlow's own.

In: what Keras and users ask of a `tf.distribute.Strategy`. Out: TensorFlow's
answer, except for gradients, steps of Keras and data sets, which go to
`reduce`, `one_device` and `workers`.

    one_machine.py     AllReduceStrategy               --+--> base.py
    multi_worker.py    MultiWorkerAllReduceStrategy    --+    extended.py
"""
