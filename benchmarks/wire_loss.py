"""The loss of the digits example with and without a narrow wire.

    python benchmarks/wire_loss.py

Two workers on this machine train the network of examples/digits.py from the
same seed, once for each `wire_dtype`, and print the loss by epoch and the
accuracy on the 297 images that were held out.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

WIRE_DTYPES = ["float32", "bfloat16", "float16"]
EXAMPLES = Path(__file__).parent.parent / "examples"


def train(wire_dtype: str, result: Path) -> None:
    """What every worker runs; the chief leaves losses and accuracy."""
    import keras
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    import keras_allreduce

    strategy = keras_allreduce.MultiWorkerAllReduceStrategy(
        wire_dtype=None if wire_dtype == "float32" else wire_dtype
    )
    sys.path.insert(0, str(EXAMPLES))
    import digits

    data = load_digits()
    x, x_test, y, y_test = train_test_split(
        data.images[..., None].astype("float32") / 16,
        data.target,
        test_size=297,
        random_state=0,
    )
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = digits.make_model()
    history = model.fit(
        x, y, batch_size=digits.BATCH_SIZE, epochs=digits.EPOCHS, verbose=0
    ).history
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    if strategy.extended.is_chief:
        result.write_text(json.dumps([history["loss"], accuracy]))


def main() -> None:
    if len(sys.argv) == 3:
        train(sys.argv[1], Path(sys.argv[2]))
        return
    losses, accuracies = [], []
    for wire_dtype in WIRE_DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder, "result")
            command = [sys.executable, "-m", "keras_allreduce.launch"]
            command += ["--workers", "2", __file__, wire_dtype, str(result)]
            subprocess.run(command, check=True)
            loss, accuracy = json.loads(result.read_text())
        losses.append(loss)
        accuracies.append(f"{accuracy:.4f}")
    print("| epoch | " + " | ".join(WIRE_DTYPES) + " |")
    print("|---" * (len(WIRE_DTYPES) + 1) + "|")
    for epoch, row in enumerate(zip(*losses, strict=True), start=1):
        print(f"| {epoch} | " + " | ".join(f"{x:.5f}" for x in row) + " |")
    print("| test accuracy | " + " | ".join(accuracies) + " |")


if __name__ == "__main__":
    main()
