"""Private members of TensorFlow's classes that subclasses override or use.

A class of TensorFlow's or Keras's shares its private names with its subclasses:
a new release may rename one, change its arguments, or take a name that is ours.
Each is listed once; `tests/compat/test_overrides.py` compares the list with the
classes, and the signatures with those of the base.
"""

from typing import NamedTuple


class PrivateMember(NamedTuple):
    """A private member of a foreign class.

    Attributes:
        member: Class and name.
        read_in: Version of TensorFlow whose source was read.
        reason: Purpose of the override or of the use.
    """

    member: str
    read_in: str
    reason: str


MEMBERS = [
    PrivateMember(*each)
    for each in (
        # Strategies: how a replica runs, and the reductions.
        (
            "MirroredExtended._call_for_each_replica",
            "2.21",
            "`strategy.run` ends here: a step of Keras becomes a `Step`.",
        ),
        (
            "MirroredExtended._use_merge_call",
            "2.21",
            "Reduced gradients are applied by each replica by itself.",
        ),
        (
            "MirroredExtended._replica_ctx_all_reduce",
            "2.21",
            "Optimizers sum here; reduced gradients pass through.",
        ),
        (
            "MirroredExtended._batch_reduce_to",
            "2.21",
            "Gradients are summed here, in packs.",
        ),
        (
            "StrategyExtendedV2._batch_gather_to",
            "2.21",
            "A measured step gathers from itself alone.",
        ),
        (
            "MirroredExtended._create_variable",
            "2.21",
            "Variables of replicas behave as numbers.",
        ),
        (
            "MirroredExtended._experimental_distribute_dataset",
            "2.21",
            "Data sets are split by us, and their iterators are cheap.",
        ),
        (
            "MirroredExtended._distribute_datasets_from_function",
            "2.21",
            "The same for data sets of a function.",
        ),
        (
            "MirroredExtended._get_cross_device_ops",
            "2.21",
            "TensorFlow takes other ops for each int32 value.",
        ),
        (
            "MirroredExtended._cross_device_ops",
            "2.21",
            "The ops of this strategy.",
        ),
        (
            "MirroredExtended._num_replicas_in_sync",
            "2.21",
            "Number of replicas, also where a step sees one device.",
        ),
        (
            "MirroredExtended._container_strategy",
            "2.21",
            "The strategy of an `extended`.",
        ),
        # Strategies of several workers.
        (
            "CollectiveAllReduceExtended._enable_check_health",
            "2.21",
            "The health monitor replaces TensorFlow's health check.",
        ),
        (
            "CollectiveAllReduceExtended._experimental_distribute_dataset",
            "2.21",
            "Workers compare their data, and share its order.",
        ),
        (
            "CollectiveAllReduceExtended._gather_to_implementation",
            "2.21",
            "The health monitor knows which collectives are in flight.",
        ),
        (
            "CollectiveAllReduceExtended._reduce_to",
            "2.21",
            "The same; a lone tensor is summed over the workers.",
        ),
        (
            "CollectiveAllReduceExtended._get_variable_creator_initial_value",
            "2.21",
            "Workers compare the first values of their variables.",
        ),
        (
            "CollectiveAllReduceExtended._initialize_local_devices",
            "2.21",
            "A worker without GPUs has all its logical CPU devices.",
        ),
        (
            "CollectiveAllReduceExtended._update_config_proto",
            "2.21",
            "Options of the server, which has no public ones.",
        ),
        (
            "CollectiveAllReduceExtended._is_chief",
            "2.21",
            "Facts of the cluster that have no public name.",
        ),
        ("CollectiveAllReduceExtended._num_workers", "2.21", "The same."),
        ("CollectiveAllReduceExtended._worker_device", "2.21", "The same."),
        (
            "CollectiveAllReduceStrategy._collective_key_base",
            "2.21",
            "Groups of devices of each strategy get numbers of their own.",
        ),
        # What sums.
        (
            "CrossDeviceOps._gather_implementation",
            "2.21",
            "The base has none for logical CPU devices.",
        ),
        (
            "CrossDeviceOps._num_between_graph_workers",
            "2.21",
            "With 1, a value on one device is taken for reduced.",
        ),
        # Data sets and iterators.
        (
            "DistributedDataset._create_cloned_datasets_from_dataset",
            "2.21",
            "TensorFlow rewrites the graph of the data set here.",
        ),
        (
            "DistributedDataset._cloned_datasets",
            "2.21",
            "Result of the function above.",
        ),
        (
            "DistributedDataset._enable_get_next_as_optional",
            "2.21",
            "All parts end together: no replica is asked alone.",
        ),
        (
            "DistributedIterator._type_spec",
            "2.21",
            "A step is traced once for all iterators.",
        ),
        (
            "DistributedIterator._iterators",
            "2.21",
            "Made when the first batch is asked for.",
        ),
        (
            "DistributedIteratorSpec._component_specs",
            "2.21",
            "An iterator is passed to a `tf.function` by its parts.",
        ),
        ("DistributedIteratorSpec._from_components", "2.21", "The same."),
        ("DistributedIteratorSpec._to_components", "2.21", "The same."),
        ("DistributedIteratorSpec._input_workers", "2.21", "The same."),
        (
            "DatasetV2._inputs",
            "2.21",
            "Abstract: the data sets that this one is made of.",
        ),
        (
            "DatasetV2._flat_structure",
            "2.21",
            "Arguments of every op that makes a data set.",
        ),
    )
]
