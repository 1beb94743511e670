"""The last line of a process that fails because of another worker."""

import tensorflow as tf

from keras_allreduce.workers import exit_message


def test_an_error_that_another_worker_has_sent_is_explained_by_its_words():
    why = "All workers must stay until training ends. Received: worker 1 (a)"
    error = tf.errors.UnavailableError(
        None,
        None,
        "Collective ops is aborted by: Collective ops is aborted by: "
        f"{why}\nThe error could be from a previous operation.\n"
        f'{{grpc_message:"Collective ops is aborted by: {why}"}}',
    )
    assert exit_message.explain(error) == why
