"""What holds for all tests: how they start, and in which order they run."""

import os

import garbage
import pytest
import xdist

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Whether there is one depends on how busy the machine is.
os.environ.setdefault("KERAS_ALLREDUCE_HINT", "0")
garbage.look_seldom()


# They start processes, or train for seconds: not in `make test-fast`. All are
# in `make test`. The longest come first: a long one that begins last has one
# core work while the others are idle.
SLOW_FILES = [
    "test_multi_worker.py",
    "test_one_device.py",
    "test_mpi.py",
    "test_programs.py",
    "test_drop_in.py",
    "test_data_forms.py",
    "test_worker_failures.py",
    "test_progress_bar.py",
    "test_drift.py",
    "test_examples.py",
    "test_package.py",
    "test_input.py",
    "test_docs.py",
    "test_benchmark.py",
    "test_keras_assumptions.py",
    "test_sharp_bits.py",
    "test_timeline.py",
    "test_random_faults.py",
    "test_restart.py",
    "test_notebook.py",
    "test_migrating.py",
    "test_namespaces.py",
    "test_wire.py",
    "test_randomness.py",
    "test_ray.py",
    "test_slurm.py",
    "test_saving.py",
    "test_several_strategies.py",
    "test_tensorboard.py",
    "test_explain.py",
    "test_pack_independence.py",
    "test_custom_loop.py",
    "test_launch.py",
    "test_rendezvous.py",
    "test_reduce_in_strategy.py",
    "test_one_model.py",
    "test_measurement.py",
    "test_resolvers.py",
    "test_shuffled_arrays.py",
    "test_variables.py",
    "test_keras_calls.py",
    "test_call_path.py",
    "test_bugs.py",
    "test_malloc.py",
    "test_mpi_graph.py",
    "test_hooks.py",
    "test_on_gpus.py",
]


def pytest_collection(session):
    """Makes the devices before a test can start TensorFlow."""
    if not xdist.is_xdist_controller(session):  # It runs no test.
        import five_devices  # noqa: F401


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in SLOW_FILES:
            item.add_marker("slow")
    place = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than cores: tests of workers wait for most of their time."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    return (os.cpu_count() or 1) + 1


@pytest.fixture(autouse=True)
def _same_start():
    import keras

    keras.utils.set_random_seed(7)
    yield
    keras.utils.clear_session(free_memory=False)


@pytest.fixture(scope="session", autouse=True)
def _shared_folder(tmp_path_factory, worker_id):
    import worker_cases

    own = tmp_path_factory.getbasetemp()
    # That of a process of pytest-xdist is in that of the run.
    shared = own if worker_id == "master" else own.parent
    worker_cases.SHARED = shared / "one_device"
    worker_cases.SHARED.mkdir(exist_ok=True)


@pytest.fixture(scope="session")
def needs_mpirun():
    """Skips where `mpirun` and mpi4py are not there, or do not fit."""
    import mpi_jobs

    if mpi_jobs.missing():
        pytest.skip(mpi_jobs.missing())
