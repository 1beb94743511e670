"""What holds for all tests: how they start, and in which order they run."""

import collections
import os

import cpu_times
import garbage
import pytest
import xdist
from hypothesis import HealthCheck, settings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Whether there is one depends on how busy the machine is.
os.environ.setdefault("KERAS_ALLREDUCE_HINT", "0")
garbage.look_seldom()

# Each run tries the same examples, however slow the machine is; the nightly one
# tries more of them, and others each time.
for _name, _examples in {"same": 50, "nightly": 500}.items():
    settings.register_profile(
        _name,
        max_examples=_examples,
        derandomize=_name == "same",
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile("same")


def pytest_addoption(parser):
    parser.addoption(
        "--cpu-times",
        action="store_true",
        help="show the CPU time of each file, also of processes it starts",
    )


def pytest_configure(config):
    if config.getoption("--cpu-times"):
        config.pluginmanager.register(cpu_times.CpuTimes())


def pytest_collection(session):
    """Makes the devices before a test can start TensorFlow."""
    if not xdist.is_xdist_controller(session):  # It runs no test.
        import five_devices  # noqa: F401


def pytest_collection_modifyitems(config, items):
    """Slow files first, the large ones of them before the others.

    A long one that begins last has one core work while the others are idle.
    """
    if config.pluginmanager.hasplugin("randomly"):
        return
    size = collections.Counter(item.path for item in items)
    items.sort(
        key=lambda item: (
            item.get_closest_marker("slow") is None,
            -size[item.path],
        )
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One for each core, and one more, as some wait for their workers."""
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
    from programs import table

    own = tmp_path_factory.getbasetemp()
    # That of a process of pytest-xdist is in that of the run.
    shared = own if worker_id == "master" else own.parent
    table.SHARED = shared / "one_device"
    table.SHARED.mkdir(exist_ok=True)


@pytest.fixture(scope="session")
def needs_mpirun():
    """Skips where `mpirun` and mpi4py are not there, or do not fit."""
    import mpi_jobs

    if mpi_jobs.missing():
        pytest.skip(mpi_jobs.missing())
