"""What crosses between workers comes back as the sum, the same on all.

sent by a worker      rounded once per part, once more with 3 workers
bfloat16              1/256 of the part at most
float16               1/2048
scaled_float16        1/2048, a format that the tests add
"""

import numpy as np
import pytest
import toy_wire_format
import workers

from keras_allreduce.workers import wire_formats

pytestmark = pytest.mark.slow

ROUNDING = {
    "float32": 0.0,
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
    toy_wire_format.NAME: 2.0**-11,
}


def test_the_rounding_of_every_named_format_is_tested():
    assert set(wire_formats.wire_dtypes()) <= set(ROUNDING)


@pytest.fixture(scope="module", params=[2, 3], ids=["2 workers", "3 workers"])
def of_all(request):
    """The parts of all workers, and what each worker has got."""
    return parts_and_results(workers.results, request.param)


def parts_and_results(run, count):
    """What `count` workers send, and what `run` makes each of them return."""
    parts = [toy_wire_format.parts(worker) for worker in range(count)]
    parts = {name: [part[name] for part in parts] for name in parts[0]}
    parts["of any shape"] = parts["large"]
    results = run("sums", list(ROUNDING), num_workers=count)
    return parts, results


@pytest.mark.parametrize("wire", list(ROUNDING))
class TestEverySum:
    def test_is_the_same_on_all_workers(self, of_all, wire):
        _, (first, *others) = of_all
        assert all(other[wire] == first[wire] for other in others)

    def test_is_within_one_rounding_of_each_part_and_of_the_sum(
        self, of_all, wire
    ):
        parts, (first, *_) = of_all
        for name, of_workers in parts.items():
            exact = np.sum(np.asarray(of_workers, "float64"), axis=0)
            bound = ROUNDING[wire] * (
                np.sum(np.abs(np.asarray(of_workers, "float64")), axis=0)
                + np.abs(exact)
            )
            error = np.abs(np.asarray(first[wire][name]["values"]) - exact)
            assert np.all(error <= bound + 1e-6), name

    def test_keeps_its_shape_and_dtype(self, of_all, wire):
        parts, (first, *_) = of_all
        for name, of_workers in parts.items():
            result = first[wire][name]
            assert result["dtype"] == of_workers[0].dtype.name
            assert np.shape(result["values"]) == of_workers[0].shape

    @pytest.mark.parametrize(
        "name", ["scalar", "small", "counts", "halves", "whole"]
    )
    def test_is_exact_where_every_number_fits_the_wire(
        self, of_all, wire, name
    ):
        parts, (first, *_) = of_all
        np.testing.assert_array_equal(
            first[wire][name]["values"], np.sum(parts[name], axis=0)
        )


def test_a_narrow_wire_rounds_what_does_not_fit(of_all):
    _, (first, *_) = of_all
    exact = np.asarray(first["float32"]["large"]["values"])
    for wire in ("bfloat16", "float16", toy_wire_format.NAME):
        assert np.any(np.asarray(first[wire]["large"]["values"]) != exact)
