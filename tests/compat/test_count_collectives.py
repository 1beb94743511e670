"""TensorFlow numbers the collectives that it launches, through one method."""

import importlib
import inspect

from keras_allreduce.compat import distribute

utils = importlib.import_module(
    "tensorflow.python.distribute.cross_device_utils"
)


class Extended:
    def __init__(self):
        self._collective_keys = utils.CollectiveKeys()


def test_each_number_that_is_taken_is_counted_and_stays_what_it_was():
    stock, extended, counted = Extended(), Extended(), []
    distribute.count_collectives(extended, lambda: counted.append(1))
    numbers = []
    for each in (stock, extended):
        keys = each._collective_keys
        group = keys.get_group_key(["/cpu:0"])
        numbers.append([keys.get_instance_key(group, "/cpu:0") for _ in "ab"])
    assert numbers[0] == numbers[1]
    assert counted == [1, 1]


def test_whatever_launches_a_collective_asks_for_its_number():
    launcher = inspect.getsource(utils.CollectiveReplicaLauncher)
    assert launcher.count("self._collective_keys.get_instance_key(") == 2
    assert launcher.count("instance_key = self._next_instance_key()") >= 2
    of_variables = inspect.getsource(
        distribute.CollectiveAllReduceExtended._get_variable_creator_initial_value
    )
    assert "self._collective_keys.get_instance_key(" in of_variables
