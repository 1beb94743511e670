"""Writes a timeline as the file that a viewer reads."""

import gzip
import json
import os
from typing import Any

from keras_allreduce.fit_output import xplane


def write(path: str | os.PathLike[str], drawn: dict[str, Any]) -> None:
    """Writes a trace.

    Args:
        path: The file: an XSpace for TensorBoard's profile plugin if it ends
            in `.xplane.pb`; else JSON, compressed if it ends in `.gz`.
        drawn: What `chrome_trace.trace` returned.
    """
    path = os.fspath(path)
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    if path.endswith(".xplane.pb"):
        with open(path, "wb") as file:
            file.write(xplane.encode(drawn))
        return
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8") as text:
        json.dump(drawn, text, allow_nan=False)
