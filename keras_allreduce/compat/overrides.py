"""Private members of TensorFlow's classes that subclasses override or use.

A class of TensorFlow's or Keras's shares its private names with its subclasses:
a new release may rename one, change its arguments, or take a name that is ours.
Each is listed once; `tests/compat/test_overrides.py` compares the list with the
classes, and the signatures with those of the base.
"""

MEMBERS = {
    # Strategies: how a replica runs, and the reductions.
    "MirroredExtended": {
        "_call_for_each_replica": (
            "`strategy.run` ends here: a step of Keras becomes a `Step`."
        ),
        "_use_merge_call": (
            "Reduced gradients are applied by each replica by itself."
        ),
        "_replica_ctx_all_reduce": (
            "Optimizers sum here; reduced gradients pass through."
        ),
        "_batch_reduce_to": "Gradients are summed here, in packs.",
        "_create_variable": "Variables of replicas behave as numbers.",
        "_experimental_distribute_dataset": (
            "Data sets are split by us, and their iterators are cheap."
        ),
        "_distribute_datasets_from_function": (
            "The same for data sets of a function."
        ),
        "_get_cross_device_ops": (
            "TensorFlow takes other ops for each int32 value."
        ),
        "_cross_device_ops": "The ops of this strategy.",
        "_num_replicas_in_sync": (
            "Number of replicas, also where a step sees one device."
        ),
        "_container_strategy": "The strategy of an `extended`.",
    },
    "StrategyExtendedV2": {
        "_batch_gather_to": "A measured step gathers from itself alone.",
    },
    # Strategies of several workers.
    "CollectiveAllReduceExtended": {
        "_enable_check_health": (
            "The health monitor replaces TensorFlow's health check."
        ),
        "_experimental_distribute_dataset": (
            "Workers compare their data, and share its order."
        ),
        "_gather_to_implementation": (
            "The health monitor knows which collectives are in flight."
        ),
        "_reduce_to": "The same; a lone tensor is summed over the workers.",
        "_get_variable_creator_initial_value": (
            "Workers compare the first values of their variables."
        ),
        "_initialize_local_devices": (
            "A worker without GPUs has all its logical CPU devices."
        ),
        "_update_config_proto": (
            "Options of the server, which has no public ones."
        ),
        "_collective_key_base": (
            "Groups of our own are numbered from there, far above."
        ),
        "_worker_device": "The device of this worker has no public name.",
    },
    "CollectiveAllReduceStrategy": {
        "_collective_key_base": (
            "Groups of devices of each strategy get numbers of their own."
        ),
    },
    # What sums.
    "CrossDeviceOps": {
        "_gather_implementation": "The base has none for logical CPU devices.",
        "_num_between_graph_workers": (
            "With 1, a value on one device is taken for reduced."
        ),
    },
    # Data sets and iterators.
    "DistributedDataset": {
        "_create_cloned_datasets_from_dataset": (
            "TensorFlow rewrites the graph of the data set here."
        ),
        "_cloned_datasets": "Result of the function above.",
        "_enable_get_next_as_optional": (
            "All parts end together: no replica is asked alone."
        ),
    },
    "DistributedIterator": {
        "_type_spec": "A step is traced once for all iterators.",
        "_iterators": "Made when the first batch is asked for.",
    },
    "DistributedIteratorSpec": {
        "_component_specs": (
            "An iterator is passed to a `tf.function` by its parts."
        ),
        "_from_components": "The same.",
        "_to_components": "The same.",
        "_input_workers": "The same.",
    },
    "DatasetV2": {
        "_inputs": "Abstract: the data sets that this one is made of.",
        "_flat_structure": "Arguments of every op that makes a data set.",
    },
}
"""Purpose of each override, or use, by class and name.

As read in the source of TensorFlow 2.21.
"""
