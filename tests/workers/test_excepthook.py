"""The last line of a process that fails because of another worker."""

import pytest
import tensorflow as tf

from keras_allreduce.workers import errors, excepthook


class Monitor:
    """A health monitor that knows `failure`, or that all is well."""

    def __init__(self, failure=None):
        self.failure = failure

    def cause(self):
        return self.failure


WHYS = {
    "as we write them": "All workers must stay. Received: worker 1 (a:1) fell",
    "other words": "Nobody is left but worker 1 ([::1]:5000).",
    "quotes and lines": 'It says "no"\nin C:\\d',
}


@pytest.mark.parametrize("why", WHYS.values(), ids=WHYS)
def test_an_error_that_another_worker_has_sent_is_explained_by_its_tag(why):
    sent = errors.tagged(errors.WorkerLostError(why))
    error = tf.errors.UnavailableError(
        None,
        None,
        "Collective ops is aborted by: Collective ops is aborted by: "
        f"{sent}\nThe error could be from a previous operation.\n"
        f'{{grpc_message:"Collective ops is aborted by: {sent}"}}',
    )
    shown = why.replace('"', "'").replace("\n", " ").replace("\\", "/")
    assert excepthook.explain(error) == shown
    again = errors.from_tagged(error.message)
    assert type(again) is errors.WorkerLostError


def test_an_error_without_a_tag_is_none_of_ours_whatever_it_says():
    text = "Collective: All workers must stay until training ends."
    assert errors.from_tagged(text) is None


BROKEN = "Collective ops is aborted by: recvmsg:Connection reset by peer"


@pytest.mark.parametrize(
    ("error", "monitors", "said"),
    [
        (
            tf.errors.UnavailableError(None, None, BROKEN),
            [Monitor(), Monitor(errors.WorkerLostError("Worker 1 is gone."))],
            "Worker 1 is gone.",
        ),
        (
            tf.errors.UnavailableError(None, None, BROKEN),
            [Monitor()],
            "a connection broke, and no worker is gone or silent "
            f"(UnavailableError: {BROKEN})",
        ),
        (tf.errors.UnavailableError(None, None, BROKEN), [], None),
        (tf.errors.InternalError(None, None, BROKEN), [Monitor()], None),
        (tf.errors.UnavailableError(None, None, "a disk"), [Monitor()], None),
    ],
    ids=["a worker is gone", "all are there", "one process", "other", "no sum"],
)
def test_a_connection_that_broke_is_explained(
    error, monitors, said, monkeypatch
):
    monkeypatch.setattr(excepthook, "_monitors", monitors)
    explanation = excepthook.explain(error)
    assert explanation is said is None or said in explanation
