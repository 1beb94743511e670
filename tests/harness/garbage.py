"""How often processes of the tests look for garbage."""

import gc


def look_seldom():
    """To be called before TensorFlow and Keras are imported.

    They are a million objects. To look for garbage in them as often as Python
    does takes a tenth of the time of the tests.
    """
    gc.set_threshold(20_000, 10, 10)
