"""Faults that the tests must see, each one small and plausible.

`run_seeded.py` puts one after the other into a copy of the package and runs the
tests named here. A new fault: a bug that tests let pass, or one that a reviewer
can imagine. When the code moves, the text moves with it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault, and what sees it.

    Attributes:
        name: Short name.
        what: What goes wrong.
        file: File of the package.
        old: Text that is there once.
        new: What takes its place.
        tests: Arguments of pytest, cheapest first: names of test files, in
            whatever folder they are, and `-k`. One of them must fail.
        limit_seconds: When the tests are ended; a hang is seen as well.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    limit_seconds: int = 600


FAULTS = [
    Fault(
        "bucket_edge",
        "off by one: a bucket that is exactly full does not take the gradient",
        "reduce/buckets.py",
        "filled[dtype] + nbytes > capacity",
        "filled[dtype] + nbytes >= capacity",
        ("test_buckets.py",),
    ),
    Fault(
        "ring_gather",
        "ring: all-gather schedule off by one",
        "reduce/ring.py",
        "[(rank + 1 - step) % num_ranks for rank",
        "[(rank - step) % num_ranks for rank",
        ("test_ring.py",),
    ),
    Fault(
        "order_sparse",
        "pack positions taken for variable indices (wrong only after a sparse gradient)",
        "reduce/batch.py",
        "variables = [[order[at] for at in each.indices] for each in buckets]",
        "variables = [list(each.indices) for each in buckets]",
        ("test_batch_all_reduce.py -k Sparse",),
    ),
    Fault(
        "plan_order",
        "the plan names positions in place of variables",
        "reduce/batch.py",
        "replace(each, indices=tuple(order[at] for at in each.indices))",
        "replace(each, indices=tuple(each.indices))",
        ("test_observe.py -k after_a_sparse",),
    ),
    Fault(
        "nan_weight",
        "an empty replica's NaN is not silenced",
        "reduce/packing.py",
        "return tf.math.multiply_no_nan(value, tf.cast(weight, value.dtype))",
        "return value * tf.cast(weight, value.dtype)",
        (
            "test_batch_all_reduce.py -k silences",
            "test_programs.py -k last_batch_of_one_sample",
        ),
    ),
    Fault(
        "mean_sparse",
        "mean of sparse gradients is a sum",
        "reduce/batch.py",
        "results = [divide(total, self.mean_over) for total in totals]",
        "results = list(totals)",
        ("test_batch_all_reduce.py -k Sparse",),
    ),
    Fault(
        "elsewhere_mean",
        "mean to another device is a sum",
        "reduce/batch_all_reduce.py",
        "total = divide(_sum_on(owner, value), count)",
        "total = _sum_on(owner, value)",
        ("test_batch_all_reduce.py -k Destinations",),
    ),
    Fault(
        "workers_replica0",
        "between workers only replica 0 of each worker is sent",
        "workers/between_workers.py",
        "inside = shared_memory.add(pack, devices[0])  # [2]",
        "inside = pack[0]  # [2]",
        ("test_threads.py -k last_batch_of_one_sample",),
    ),
    Fault(
        "share_count",
        "share of a batch counts this worker's replicas only",
        "one_device/shares.py",
        "replicas = float(group.size * len(amounts))",
        "replicas = float(len(amounts))",
        ("test_shares.py", "test_threads.py -k uneven_batches"),
    ),
    Fault(
        "eager_sizes",
        "eager: equal parts here are taken for equal parts on all workers",
        "one_device/shares.py",
        "known_of_all = num_workers == 1 or not tf.executing_eagerly()",
        "known_of_all = True",
        ("test_shares.py", "test_threads.py -k eagerly"),
    ),
    Fault(
        "divided_floor",
        "train_on_batch drops the rest of an uneven batch",
        "one_device/shares.py",
        "size = -(-tf.shape(value)[0] // len(devices))",
        "size = tf.shape(value)[0] // len(devices)",
        ("test_programs.py -k train_on_batch",),
    ),
    Fault(
        "sum_loss",
        "a sum loss is scaled by the share as a mean",
        "one_device/loss.py",
        "                return value\n            return scale(value, replica.current().inverse_weight())\n        weighted",
        "                return value\n            return value\n        weighted",
        ("test_programs.py -k losses_with_sample_weight-3",),
    ),
    Fault(
        "weighted_mean",
        "mean over sample weights: correction of uneven weights is skipped",
        "one_device/loss.py",
        "return scale(value, replica.current().correction)",
        "return value",
        ("test_programs.py -k weighted_mean-3",),
    ),
    Fault(
        "mask_mean",
        "masked loss: each replica's own mean",
        "one_device/loss.py",
        "return scale(value, part * this.inverse_weight())",
        "return value",
        ("test_programs.py -k masked_loss-3",),
    ),
    Fault(
        "accumulate_when",
        "accumulated gradients are reduced one step off",
        "one_device/update.py",
        "count = keras_compat.iterations(optimizer) + 1",
        "count = keras_compat.iterations(optimizer)",
        ("test_update.py", "test_programs.py -k gradient_accumulation-3"),
    ),
    Fault(
        "accumulate_reset",
        "accumulators are not reset after the reduce",
        "one_device/update.py",
        "        accumulator.assign(tf.zeros_like(accumulator))\n",
        "        pass\n",
        ("test_programs.py -k gradient_accumulation-3",),
    ),
    Fault(
        "hook_restore",
        "a hook on a subclass is not removed after the step",
        "one_device/hooks.py",
        "            delattr(owner, name)\n",
        "            pass\n",
        ("test_hooks.py",),
    ),
    Fault(
        "hook_foreign",
        "restoring overwrites what another package has replaced",
        "one_device/hooks.py",
        "            continue  # Somebody else has replaced it since.",
        "            pass",
        ("test_hooks.py -k another_package",),
    ),
    Fault(
        "empty_trace",
        "an empty replica keeps what the borrowed sample left",
        "one_device/empty_replica.py",
        "tf.cond(has_samples, lambda: None, put_back)",
        "tf.cond(has_samples, lambda: None, lambda: None)",
        ("test_empty_replica.py",),
    ),
    Fault(
        "metric_min",
        "a metric that is a minimum agrees on the maximum",
        "one_device/metric_state.py",
        "least = tf.reduce_min(tf.stack(parts), 0)",
        "least = tf.reduce_max(tf.stack(parts), 0)",
        ("test_programs.py -k whose_state_is_no_sum",),
    ),
    Fault(
        "log_sum_empty",
        "a log that is a sum counts the borrowed sample",
        "one_device/logs.py",
        "weights = [tf.cast(weight > 0, tf.float64) for weight in weights]",
        "weights = [tf.ones([], tf.float64) for weight in weights]",
        ("test_programs.py -k plain_sum-3",),
    ),
    Fault(
        "state_share",
        "state that is a mean: replicas count alike whatever their samples",
        "one_device/shared_state.py",
        "weights = [share / count for share in shares.values]",
        "weights = [1 / count for share in shares.values]",
        ("test_programs.py -k state_that_a_step_keeps",),
    ),
    Fault(
        "state_round",
        "integer state: mean is truncated, not rounded",
        "one_device/shared_state.py",
        "mean = tf.cast(tf.round(mean), dtype)",
        "mean = tf.cast(mean, dtype)",
        ("test_one_model.py -k whole_number",),
    ),
    Fault(
        "state_empty",
        "state that is a sum: empty replicas count",
        "one_device/shared_state.py",
        "tf.where(count, pack - before, tf.zeros_like(before))",
        "pack - before",
        ("test_programs.py -k state_that_a_layer_keeps-3",),
    ),
    Fault(
        "seeds",
        "all replicas draw the same dropout mask",
        "one_device/view.py",
        "return seed + number * tf.constant([1_000_003, 0], seed.dtype)",
        "return seed",
        ("test_randomness.py",),
    ),
    Fault(
        "metric_sum",
        "keras.metrics.Sum of a sum is scaled by the share",
        "one_device/view.py",
        "            if kind != SUM:",
        "            if kind:",
        ("test_programs.py -k sums_over_batches",),
    ),
    Fault(
        "seed_grad",
        "output_gradients that the user gives are ignored",
        "one_device/gradients.py",
        "scale(tf.ones_like(one) if seed is None else seed, weight)",
        "scale(tf.ones_like(one), weight)",
        ("test_programs.py -k output_gradients",),
    ),
    Fault(
        "float8",
        "float8: mean of the largest values, not the largest",
        "one_device/shares.py",
        "own = tf.reduce_max(",
        "own = tf.reduce_mean(",
        ("test_one_model.py -k float8",),
    ),
    Fault(
        "narrow_sum",
        "bfloat16/float16 wire sums in half precision",
        "workers/wire.py",
        "        rows = tf.cast(rows, tf.float32)\n",
        "        pass\n",
        ("test_wire_formats.py -k half_precision",),
    ),
    Fault(
        "instance",
        "two shapes share one collective instance",
        "workers/collectives.py",
        "if tensor.shape.is_fully_defined():",
        "if True:",
        ("test_threads.py -k embedding", "test_wire.py"),
        limit_seconds=420,
    ),
    Fault(
        "behind",
        "a worker that is only behind is taken for one that never comes",
        "workers/progress.py",
        "(other.ended or (own_is_behind and are_ordered))",
        "(other.ended or are_ordered)",
        ("test_progress.py", "test_stall.py"),
    ),
    Fault(
        "frozen_here",
        "time that this process itself was frozen counts against the others",
        "workers/health.py",
        "return awake + min(time.monotonic() - last, self._most)",
        "return awake + time.monotonic() - last",
        ("test_health.py", "test_heartbeats.py"),
    ),
    Fault(
        "timeout",
        "the health monitor forgets timeout_seconds",
        "workers/health.py",
        "if found.waiting_seconds < self._timeout_seconds:",
        "if True:",
        ("test_health.py", "test_multi_worker.py -k falls_behind"),
    ),
    Fault(
        "needs_all",
        "a collective that failed because another ended is not explained",
        "workers/health.py",
        "self._heartbeats.needs_all = True",
        "self._heartbeats.needs_all = False",
        ("test_health.py", "test_worker_failures.py"),
    ),
    Fault(
        "store_error",
        "an error of the store while publishing is dropped",
        "workers/store.py",
        "        if isinstance(error, tf.errors.OpError):\n            raise self._lost(name, error) from error\n\n    def _read",
        "\n    def _read",
        ("test_store.py",),
    ),
    Fault(
        "store_reason",
        "others do not learn why the chief gave up",
        "workers/store.py",
        "                self._publish(name, _packed_error(error), _ALL)",
        "                pass",
        ("test_store.py",),
    ),
    Fault(
        "connect_limit",
        "connecting has no time limit",
        "workers/time_limit.py",
        "os.kill(watched, signal.SIGKILL)",
        "pass",
        ("test_time_limit.py", "test_worker_failures.py -k dies_while"),
        limit_seconds=120,
    ),
    Fault(
        "drift_optimizer",
        "drift: optimizer state is not compared",
        "workers/weight_fingerprint.py",
        "*(v for optimizer in optimizers for v in optimizer.variables),",
        "",
        ("test_weight_fingerprint.py", "test_drift.py"),
    ),
    Fault(
        "agree_missing",
        "a fact that only the other has is no difference",
        "workers/fingerprint.py",
        "for key in [*chief.facts, *missing]:",
        "for key in chief.facts:",
        ("test_data_fingerprint.py",),
    ),
    Fault(
        "slurm_rank",
        "Slurm: local rank taken for the rank",
        "workers/ranks.py",
        '_int(environment, "SLURM_PROCID"),',
        '_int(environment, "SLURM_LOCALID"),',
        ("test_ranks.py",),
    ),
    Fault(
        "launch_kill",
        "launcher: a worker that ignores SIGTERM is never killed",
        "launch/job.py",
        "self._deadline = time.monotonic() + self._options.grace_seconds",
        "self._deadline = None",
        ("test_launch.py -k does_not_end",),
        limit_seconds=120,
    ),
    Fault(
        "launch_restart",
        "launcher: restarts after Ctrl-C",
        "launch/job.py",
        "is_final=bool(self._received)",
        "is_final=False",
        ("test_launch.py -k told_to_end",),
        limit_seconds=120,
    ),
    Fault(
        "fork",
        "a forked child waits for threads of its parent",
        "input/release.py",
        "        self._of_parent = self._queue, self._pending, list(self._live)\n        self._reset()",
        "        self._of_parent = ()",
        ("test_input.py",),
    ),
    Fault(
        "static_parts",
        "split data: an uneven batch is declared even",
        "compat/split_datasets.py",
        "known = size is not None and size % count == 0",
        "known = size is not None",
        ("test_input.py -k known_size",),
    ),
    Fault(
        "stats_merge",
        "means over steps are not weighted by steps",
        "fit_output/stats.py",
        "weight = later.steps / steps",
        "weight = 0.5",
        ("test_stats.py",),
    ),
    Fault(
        "exposed",
        "exposed time counts what overlaps with backprop",
        "fit_output/stats.py",
        "_union(np.maximum(ready, last_ready), done)",
        "_union(ready, done)",
        ("test_stats.py",),
    ),
]
