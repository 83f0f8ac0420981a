"""What the layers of one KV group see of a step, as paged attention kernels take it: pages of all sequences in a row.

    sequences      a           b       c            blocks are pages; only those that a row sees are named
    indices     [ 7 3 9  |  4 1  |  2 ]
    indptr      0        3       5   6              last_page_len: tokens in 9, 1 and 2

Positions count from the first page that is named. Shapes: T rows of N sequences, M pages. All are int32.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from core.kv_groups import KVGroup
from engine.step_inputs import StepInputs, device_tensor


@dataclass(frozen=True)
class PageTables:
    """What kernels read, on the device."""

    indptr: Tensor  # [N + 1]
    indices: Tensor  # [M], or more
    last_page_len: Tensor  # [N]
    owners: Tensor  # [T]: the sequence of each row
    positions: Tensor  # [T]

    def take(self, other: "PageTables") -> None:
        """Holds the same from now on; of indices, as many as the other has."""
        self.indptr.copy_(other.indptr)
        self.indices[: len(other.indices)].copy_(other.indices)
        self.last_page_len.copy_(other.last_page_len)
        self.owners.copy_(other.owners)
        self.positions.copy_(other.positions)


@dataclass(frozen=True)
class PagePart:
    """Neighbouring sequences, as if there were no others. All is on the host but the indices."""

    rows: slice  # of the step
    row_indptr: Tensor  # [N + 1]: where a sequence's rows begin
    indptr: Tensor  # [N + 1]
    last_page_len: Tensor  # [N]
    indices: Tensor  # [M]

    def num_seen(self, page_size: int) -> Tensor:
        """Tokens of each sequence in the pages that are named, [N] on the host."""
        return (self.indptr[1:] - self.indptr[:-1] - 1) * page_size + self.last_page_len


@dataclass(frozen=True)
class PagedRows:
    """`single` and `chunks`: the sequences of one row, and those of several; None where there are none."""

    tables: PageTables
    single: PagePart | None
    chunks: PagePart | None


def paged_rows(inputs: StepInputs, page_size: int, number: int, group: KVGroup, device: torch.device) -> PagedRows:
    """The one place where block tables are read for such kernels; copies to the device once, without waiting."""
    pages, last_page_len, owners, positions = [], [], list[int](), list[int]()
    for owner, sequence in enumerate(inputs.sequences):
        first = group.first_needed(sequence.first_position, page_size)
        end = sequence.first_position + len(sequence.token_ids)
        pages.append(sequence.block_tables[number].between(range(first, -(-end // page_size))))
        last_page_len.append((end - 1) % page_size + 1)
        owners += [owner] * len(sequence.token_ids)
        positions += range(sequence.first_position - first * page_size, end - first * page_size)
    indptr = list(accumulate(map(len, pages), initial=0))
    row_indptr = list(accumulate((len(sequence.token_ids) for sequence in inputs.sequences), initial=0))
    indices = [page for table in pages for page in table]
    parts = (indptr, indices, last_page_len, owners, positions)
    on_device = device_tensor([number for part in parts for number in part], torch.int32, device)
    tables = PageTables(*torch.split(on_device, [len(part) for part in parts]))

    def part(sequences: range) -> PagePart | None:
        if not sequences:
            return None
        first_row, first_page = row_indptr[sequences.start], indptr[sequences.start]
        ends = slice(sequences.start, sequences.stop + 1)
        return PagePart(
            slice(first_row, row_indptr[sequences.stop]),
            torch.tensor(row_indptr[ends], dtype=torch.int32) - first_row,
            torch.tensor(indptr[ends], dtype=torch.int32) - first_page,
            torch.tensor(last_page_len[sequences.start : sequences.stop], dtype=torch.int32),
            tables.indices[first_page : indptr[sequences.stop]],
        )

    num_single = inputs.num_single
    return PagedRows(tables, part(range(num_single)), part(range(num_single, len(pages))))


def fixed_tables(num_rows: int, num_pages: int, device: torch.device) -> PageTables:
    """Of so many sequences of one row each, with at most so many pages together; for `take`."""

    def ints(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=device)

    return PageTables(ints(num_rows + 1), ints(num_pages), ints(num_rows), ints(num_rows), ints(num_rows))
