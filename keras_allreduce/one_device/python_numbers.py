"""Numbers in Python attributes of a model, which a step finds as on one device.

The replicas of a step run its Python code in turn, each as far as the next
merge_call, and a measurement runs it before them. So that all of them find the
numbers as they were before the step, they are put back:

    self.n += 1     measured   replica 0   replica 1   after the step
    found              0           0           0
    left               1           1           1             1

Only numbers and strings: anything else that a step changes, such as a list, is
shared by the replicas.
"""

import keras

from keras_allreduce.compat import keras as keras_compat

_KINDS = (bool, int, float, str)


class PythonNumbers:
    """The numbers and strings in attributes of a model, at this moment.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        # Past `__getattr__` and `__setattr__` of Keras.
        self._names = set(vars(model))
        self._values = {
            name: value
            for name, value in vars(model).items()
            if type(value) in _KINDS
        }

    def put_back(self) -> None:
        """Gives the attributes their values of that moment.

        Attributes of Keras, and those that are something else by now, stay as
        they are; a new one is removed where the class has one of its name.
        """
        own = vars(self._model)
        for name in own.keys() - keras_compat.attributes_of_any_model():
            if type(own[name]) not in _KINDS:
                continue
            if name in self._values:
                own[name] = self._values[name]
            elif name not in self._names and self._is_of_class(name):
                del own[name]

    def _is_of_class(self, name: str) -> bool:
        return type(getattr(type(self._model), name, None)) in _KINDS
