"""The sizes of packs are those that the documents tell."""

import re
from pathlib import Path

import pytest

from keras_allreduce.reduce import pack_sizes
from keras_allreduce.reduce.pack_sizes import PackSize

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms.md"
KIB, MIB = 2**10, 2**20


def table_of(title):
    """Rows of the table under a title, as lists of cells."""
    text = DOCUMENT.read_text(encoding="utf-8")
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]
    ]


def bytes_in(cell):
    """`[2**18]` of "256 KiB at least": all sizes that a cell tells."""
    units = {"KiB": KIB, "MiB": MIB}
    found = re.findall(r"(\d+) (KiB|MiB)", cell)
    return [int(number) * units[unit] for number, unit in found]


def documented():
    rows = table_of("Pack sizes")
    return {row[0].strip("`"): row[1:] for row in rows if row[0][0] == "`"}


def test_every_algorithm_has_its_row_in_the_documents():
    assert set(documented()) == set(pack_sizes.DEFAULTS)


@pytest.mark.parametrize("algorithm", pack_sizes.DEFAULTS)
def test_the_documents_tell_the_size_of_a_pack(algorithm):
    told = [*map(bytes_in, documented()[algorithm])]
    sizes = [size[0] if size else None for size in told]
    assert PackSize(*sizes) == pack_sizes.DEFAULTS[algorithm]


def test_the_documents_tell_the_size_of_a_pack_between_workers():
    (row,) = [row for row in table_of("Pack sizes") if "workers" in row[0]]
    least, most, alone_at_least = bytes_in(row[1]) + bytes_in(row[3])
    # One worker, whose root is 1: 9/16 of all, the least, a sixteenth.
    for nbytes, capacity in [
        (MIB // 2, MIB // 2 * 9 // 16),
        (4 * MIB, least),
        (16 * MIB, 16 * MIB // 16),
    ]:
        size = pack_sizes.between_workers(1, nbytes)
        assert size.bytes_per_pack == capacity
        assert size.alone_above == max(capacity // 2, alone_at_least)
    assert least == 512 * KIB
    size = pack_sizes.between_workers(16, 1024 * MIB)
    assert size == PackSize(most, alone_above=most // 2)
    assert most == 25 * MIB


@pytest.mark.parametrize(("workers", "root"), [(4, 2), (9, 3), (15, 3)])
def test_packs_between_workers_grow_as_the_root_of_their_number(workers, root):
    one = pack_sizes.between_workers(1, 64 * MIB)
    size = pack_sizes.between_workers(workers, 64 * MIB)
    assert size.bytes_per_pack == root * one.bytes_per_pack


@pytest.mark.parametrize(("workers", "kib"), [(2, 256), (3, 16), (64, 16)])
def test_a_small_tensor_crosses_in_one_round_trip(workers, kib):
    assert pack_sizes.small_bytes(workers) == kib * KIB
