"""NCCL by its graph: ops, devices, names and order, without a GPU."""

import itertools

import pytest
import tensorflow as tf
from graph_walk import ancestors, ops_of_type

from keras_allreduce import BatchAllReduce
from keras_allreduce.compat import distribute
from keras_allreduce.reduce import nccl
from keras_allreduce.workers.between_workers import (
    BetweenWorkers,
    WorkerAllReduce,
)
from keras_allreduce.workers.collectives import CollectiveGroup, Collectives
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.wire import Wire
from keras_allreduce.workers.wire_formats import WIRE_FORMATS

GPUS = ["/device:GPU:0", "/device:GPU:1", "/device:GPU:2"]
SUM = tf.distribute.ReduceOp.SUM
MEAN = tf.distribute.ReduceOp.MEAN


def pack_on(devices, dtype=tf.float32, shape=(4,)):
    """One placeholder per device, in the current graph."""
    pack = []
    for device in devices:
        with tf.device(device):
            pack.append(tf.compat.v1.placeholder(dtype, shape))
    return pack


def launches(graph):
    return ops_of_type(graph, "NcclAllReduce")


@pytest.fixture
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


@pytest.mark.parametrize("num_gpus", [1, 2, 3])
def test_a_pack_is_one_op_on_each_gpu(graph, num_gpus):
    devices = GPUS[:num_gpus]
    pack = pack_on(devices)
    (sums,) = nccl.all_reduce([pack], devices)
    assert [op.device for op in launches(graph)] == devices
    assert [total.op for total in sums] == launches(graph)
    for op, tensor in zip(launches(graph), pack, strict=True):
        assert op.inputs[0] is tensor
        assert op.get_attr("reduction") == b"sum"
        assert op.get_attr("num_devices") == num_gpus


def test_the_gpus_of_a_pack_find_each_other_by_a_name_of_their_own(graph):
    nccl.all_reduce([pack_on(GPUS) for _ in range(3)], GPUS)
    nccl.all_reduce([pack_on(GPUS)], GPUS)
    names = [op.get_attr("shared_name") for op in launches(graph)]
    packs = [set(names[start : start + 3]) for start in (0, 3, 6, 9)]
    assert [len(pack) for pack in packs] == [1, 1, 1, 1]
    assert len(set(names)) == 4


def test_names_differ_between_two_graphs():
    names = set()
    for _ in range(2):
        with tf.Graph().as_default() as graph:
            nccl.all_reduce([pack_on(GPUS)], GPUS)
        names |= {op.get_attr("shared_name") for op in launches(graph)}
    assert len(names) == 2


def test_every_gpu_launches_the_packs_in_the_same_order(graph):
    sums = nccl.all_reduce([pack_on(GPUS) for _ in range(4)], GPUS)
    for replica, device in enumerate(GPUS):
        assert sums[0][replica].op.control_inputs == []
        for earlier, later in itertools.pairwise(sums):
            assert later[replica].op.control_inputs == [earlier[replica].op]
            assert later[replica].op.device == device


def test_a_launch_waits_for_no_launch_on_another_gpu(graph):
    sums = nccl.all_reduce([pack_on(GPUS) for _ in range(3)], GPUS)
    for replica, device in enumerate(GPUS):
        waits_for = ancestors(sums[-1][replica].op)
        assert {op.device for op in waits_for} == {device}


def test_results_stay_on_their_gpu_and_keep_the_shape(graph):
    pack = pack_on(GPUS, shape=(2, 3))
    (sums,) = nccl.all_reduce([pack], GPUS)
    assert [total.device for total in sums] == GPUS
    assert [total.shape.as_list() for total in sums] == [[2, 3]] * 3


def reduce(values, reduce_op=SUM, **arguments):
    return BatchAllReduce("nccl", **arguments).batch_reduce(
        reduce_op, [(value, value) for value in values]
    )


def gradient(dtype, shape=(2,), devices=GPUS[:2]):
    return distribute.PerReplica(tuple(pack_on(devices, dtype, shape)))


def test_gradients_travel_in_packs(graph):
    # 8 bytes each: two in a pack.
    results = reduce(
        [gradient(tf.float32) for _ in range(4)], bytes_per_pack=16
    )
    assert [op.device for op in launches(graph)] == GPUS[:2] * 2
    for op in launches(graph):
        assert op.inputs[0].shape.as_list() == [4]
        assert op.inputs[0].op.type == "ConcatV2"
    for result in results:
        assert [value.device for value in result.values] == GPUS[:2]
        assert [value.shape.as_list() for value in result.values] == [[2], [2]]


def test_the_pack_of_the_last_layer_is_launched_first(graph):
    gradients = [gradient(tf.float32) for _ in range(2)]
    reduce(gradients, bytes_per_pack=8)
    first, _, second, _ = launches(graph)
    assert first.inputs[0] is gradients[1].values[0]
    assert second.inputs[0] is gradients[0].values[0]


@pytest.mark.parametrize(
    "dtype",
    [tf.float16, tf.float32, tf.float64, tf.int64],
    ids=lambda dtype: dtype.name,
)
def test_nccl_sums_the_dtypes_it_has_a_kernel_for(graph, dtype):
    reduce([gradient(dtype)])
    assert len(launches(graph)) == 2
    assert ops_of_type(graph, "AddN") == []


@pytest.mark.parametrize(
    "dtype",
    [tf.bfloat16, tf.complex64, tf.int32],
    ids=lambda dtype: dtype.name,
)
def test_other_dtypes_are_summed_on_one_device(graph, dtype):
    (result,) = reduce([gradient(dtype)])
    assert launches(graph) == []
    (add,) = ops_of_type(graph, "AddN")
    assert add.device in GPUS[:2]
    assert [value.device for value in result.values] == GPUS[:2]
    assert [value.dtype for value in result.values] == [dtype, dtype]


def test_packs_nccl_cannot_sum_do_not_disturb_the_others(graph):
    dtypes = [tf.float32, tf.bfloat16, tf.float16, tf.complex64, tf.float32]
    results = reduce([gradient(dtype) for dtype in dtypes])
    assert [result.values[0].dtype for result in results] == dtypes
    launched = [op.inputs[0].dtype for op in launches(graph)]
    added = {op.inputs[0].dtype for op in ops_of_type(graph, "AddN")}
    assert sorted(d.name for d in launched) == ["float16"] * 2 + ["float32"] * 2
    assert added == {tf.bfloat16, tf.complex64}
    for result, dtype in zip(results, dtypes, strict=True):
        summed_by_nccl = any(
            op.type == "NcclAllReduce"
            for op in ancestors(result.values[0].op) | {result.values[0].op}
        )
        assert summed_by_nccl == (dtype in (tf.float16, tf.float32))


def test_the_mean_is_divided_after_the_sum(graph):
    (result,) = reduce([gradient(tf.float32)], MEAN)
    for value, launch in zip(result.values, launches(graph), strict=True):
        assert value.op.type == "RealDiv"
        assert value.op.inputs[0].op is launch
        assert value.device == launch.device


LOCAL = "/job:localhost/replica:0/task:0"
WORKERS = [f"/job:worker/replica:0/task:{index}" for index in range(2)]


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many physical and logical GPUs."""

    def pretend(physical, logical=None, has_nccl=True, workers=(LOCAL,)):
        count = physical if logical is None else logical
        names = [
            f"{worker}/device:GPU:{index}"
            for worker in workers
            for index in range(count)
        ]
        for name, listed in {
            "list_physical_devices": ["GPU"] * physical,
            "list_logical_devices": [
                tf.config.LogicalDevice(name, "GPU") for name in names
            ],
        }.items():
            monkeypatch.setattr(
                tf.config, name, lambda kind, listed=listed: listed
            )
        monkeypatch.setattr(distribute, "has_nccl", lambda: has_nccl)

    return pretend


def test_auto_is_nccl_between_gpus(machine):
    machine(physical=2)
    assert BatchAllReduce().choose(GPUS[:2]) == ("nccl", "")


def test_auto_without_nccl_in_the_build_says_so(machine):
    machine(physical=2, has_nccl=False)
    algorithm, reason = BatchAllReduce().choose(GPUS[:2])
    assert algorithm == "shared_memory"
    assert reason == "this TensorFlow is built without NCCL"


def test_auto_between_virtual_gpus_says_why_it_is_not_nccl(machine):
    machine(physical=1, logical=2)
    algorithm, reason = BatchAllReduce().choose(GPUS[:2])
    assert algorithm == "shared_memory"
    assert reason == "NCCL does not work between virtual GPUs"


@pytest.mark.parametrize(
    ("logical", "algorithm"), [(1, "nccl"), (2, "shared_memory")]
)
def test_gpus_of_other_workers_do_not_make_virtual_ones(
    machine, logical, algorithm
):
    machine(physical=1, logical=logical, workers=WORKERS)
    devices = [f"{WORKERS[1]}/device:GPU:{index}" for index in range(logical)]
    assert BatchAllReduce().choose(devices)[0] == algorithm


@pytest.mark.parametrize("algorithm", ["nccl", "ring", "shared_memory"])
def test_an_algorithm_that_was_asked_for_is_not_overruled(machine, algorithm):
    machine(physical=1, logical=2, has_nccl=False)
    assert BatchAllReduce(algorithm).choose(GPUS[:2]) == (algorithm, "")


class TestBetweenWorkers:
    """Two workers with two GPUs each, seen from one of them."""

    HOST = "/device:CPU:0"
    DEVICES = GPUS[:2]

    @pytest.fixture
    def reduced(self, graph, monkeypatch):
        """Traces the sums of gradients; `(graph, results)`."""
        monkeypatch.setattr(distribute, "has_nccl", lambda: True)

        def reduce(gradients, wire_format="exact"):
            between = Collectives(CollectiveGroup(2, self.HOST), InFlight())
            gpus = Collectives(CollectiveGroup(4, self.HOST), InFlight())
            wire = Wire(between, 2, WIRE_FORMATS[wire_format])
            transport = BetweenWorkers(wire, gpus, 2)
            ops = WorkerAllReduce(transport, 2, bytes_per_pack=1)

            def step():
                values = [
                    distribute.PerReplica(tuple(pack_on(self.DEVICES, *each)))
                    for each in gradients
                ]
                pairs = [(value, value) for value in values]
                totals = ops.batch_reduce(SUM, pairs)
                return [total.values for total in totals]

            return self.traced(step)

        return reduce

    def traced(self, step):
        """The graph of a step, and what it returns there.

        Variables that it makes are in the graph of the test, where they need
        no GPU.
        """
        returned = []

        def keep_returned():
            returned[:] = [step()]

        function = tf.function(keep_returned).get_concrete_function()
        return function.graph, returned[0]

    def collectives_of(self, graph):
        return ops_of_type(graph, "CollectiveReduceV2")

    def input_of(self, op, name):
        names = [arg.name for arg in op.op_def.input_arg]
        return int(tf.get_static_value(op.inputs[names.index(name)]))

    def test_a_pack_is_one_op_on_each_gpu_of_the_worker(self, reduced):
        graph, _ = reduced([(tf.float32, [4])])
        ops = self.collectives_of(graph)
        assert [op.device for op in ops] == self.DEVICES
        for op in ops:
            assert op.get_attr("communication_hint") == b"nccl"
            assert op.get_attr("merge_op") == b"Add"
            assert self.input_of(op, "group_size") == 4
        for name in ("group_key", "instance_key"):
            assert len({self.input_of(op, name) for op in ops}) == 1

    def test_packs_have_names_of_their_own(self, reduced):
        graph, _ = reduced([(tf.float32, [4])] * 3)
        keys = [
            self.input_of(op, "instance_key")
            for op in self.collectives_of(graph)
        ]
        assert len(keys) == 6
        assert len(set(keys)) == 3

    def test_every_gpu_launches_them_in_one_order(self, reduced):
        graph, _ = reduced([(tf.float32, [4])] * 4)
        ops = self.collectives_of(graph)
        for device in self.DEVICES:
            mine = [op for op in ops if op.device == device]
            for earlier, later in itertools.pairwise(mine):
                assert earlier in later.control_inputs

    def test_the_order_goes_on_in_the_next_batch(self, graph):
        gpus = Collectives(CollectiveGroup(4, self.HOST), InFlight())

        def step():
            for _ in range(2):
                pack = pack_on(self.DEVICES)
                gpus.all_reduce_on_gpus(pack, self.DEVICES, "pack")

        ops = self.collectives_of(self.traced(step)[0])
        assert ops[0] in ops[2].control_inputs
        assert ops[1] in ops[3].control_inputs

    def test_a_gpu_does_not_wait_for_another(self, reduced):
        # It would for ever: a sum is there when all have come to it.
        graph, _ = reduced([(tf.float32, [4])] * 2)
        ops = self.collectives_of(graph)
        for one, other in [ops[:2], ops[2:]]:
            assert one not in ancestors(other)
            assert other not in ancestors(one)

    def test_results_stay_on_their_gpu(self, reduced):
        _, results = reduced([(tf.float32, [2, 3]), (tf.float64, [])])
        for replicas, shape in zip(results, [[2, 3], []], strict=True):
            assert [part.device for part in replicas] == self.DEVICES
            assert all(part.shape == shape for part in replicas)

    def test_what_nccl_does_not_take_crosses_from_the_host(self, reduced):
        graph, results = reduced([(tf.bfloat16, [4]), (tf.float32, [4])])
        assert len(self.collectives_of(graph)) == 2
        (exchange,) = ops_of_type(graph, "CollectiveGatherV2")
        assert exchange.device == self.HOST
        assert [part.device for part in results[0]] == self.DEVICES

    def test_a_narrow_wire_is_narrow_only_between_gpus(self, reduced):
        graph, results = reduced([(tf.float32, [4])], "float16")
        dtypes = {op.inputs[0].dtype for op in self.collectives_of(graph)}
        assert dtypes == {tf.float16}
        assert {part.dtype for part in results[0]} == {tf.float32}
