"""The path of a call through the package, from a recorded stack."""

import traceback
from pathlib import Path

import keras_allreduce

PACKAGE = Path(keras_allreduce.__file__).parent


class Recorder:
    """Stands in for a function, and records the path to each of its calls.

    Attributes:
        paths: For each call, `"file.py:function"` of every frame of the
            package in this thread, the outermost first. A comprehension is a
            frame in some versions of Python, and left out.
    """

    def __init__(self, function):
        self._function = function
        self.paths = []

    def __call__(self, *args, **kwargs):
        frames = [
            (Path(frame.filename), frame.name)
            for frame in traceback.extract_stack()
        ]
        self.paths.append(
            [
                f"{path.relative_to(PACKAGE)}:{name}"
                for path, name in frames
                if path.is_relative_to(PACKAGE) and name[-5:] != "comp>"
            ]
        )
        return self._function(*args, **kwargs)

    def paths_of_gradients(self):
        """The paths that come through `BatchAllReduce`."""
        return [
            path
            for path in self.paths
            if any("batch_all_reduce" in frame for frame in path)
        ]


def returns(path):
    """How often a path comes back to a file that it had left."""
    files = [frame.split(":")[0] for frame in path]
    entered = [
        file
        for before, file in zip([None, *files], files, strict=False)
        if file != before
    ]
    return len(entered) - len(set(entered))
