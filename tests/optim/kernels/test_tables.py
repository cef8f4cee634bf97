"""Which matrices there are and where they lie: no kernels, so these run everywhere."""

import pytest
import torch
from torch import nn

from muonlab import Muon
from muonlab.optim.coefficients import resolve
from muonlab.optim.kernels import tables
from muonlab.optim.views import matrices

VIEWS = {
    "matrix": ((12, 20), ()),
    "stack": ((3, 12, 20), ()),
    "transposed stack": ((3, 12, 20), (("transpose",),)),
    "split": ((12, 20), (("split", 0, (4, 8)),)),
    "heads of columns": ((12, 20), (("heads", 1, 5),)),
    "ragged tiles": ((12, 20), (("tiles", 8),)),
    "grouped convolution": ((8, 3, 2, 2), (("conv", 2),)),
}


def group_of(**options: object) -> dict:
    return Muon([nn.Parameter(torch.zeros(8, 8))], **options).param_groups[0]


def in_turn(lanes: list[list[tables.Slice]]) -> list[tables.Slice]:
    return sorted((part for lane in lanes for part in lane), key=lambda part: part.first)


def read(tensor: torch.Tensor, matrix: tables.Matrix, side: int) -> torch.Tensor:
    place = matrix.places[side]
    return torch.as_strided(
        tensor, (matrix.rows, matrix.cols), (place.row, place.col), tensor.storage_offset() + place.offset
    )


@pytest.mark.parametrize("name", VIEWS)
def test_every_matrix_of_a_view_is_found_where_it_lies_up_to_transposition(name: str) -> None:
    shape, view = VIEWS[name]
    param = torch.randn(shape)
    found = tables.matrices_of(param, torch.randn(shape), None, view, 0, 0, group_of())
    assert found is not None
    expected = [part for stack in matrices(param, view) for part in stack.reshape(-1, *stack.shape[-2:])]
    assert len(found) == len(expected)
    for matrix, part in zip(found, expected):
        own = read(param, matrix, 0)
        assert torch.equal(own, part) or torch.equal(own, part.mT)


def test_a_transposed_gradient_is_read_with_its_own_strides_and_never_as_one_piece() -> None:
    param, grad = torch.randn(16, 24), torch.randn(24, 16).mT
    (matrix,) = tables.matrices_of(param, grad, None, (), 0, 0, group_of()) or []
    assert torch.equal(read(grad, matrix, 1), grad)
    assert not matrix.launch.flat


def test_a_parameter_that_is_transposed_as_a_whole_is_taken_as_its_transpose() -> None:
    param, grad = torch.randn(24, 16).mT, torch.randn(24, 16).mT
    (matrix,) = tables.matrices_of(param, grad, None, (), 0, 0, group_of(scale="spectral")) or []
    assert (matrix.rows, matrix.cols) == (24, 16)
    assert matrix.launch.flat
    assert matrix.factor == pytest.approx((16 / 24) ** 0.5)  # of the shape before the transposition


def test_slices_hold_every_matrix_once_and_stay_near_the_budget() -> None:
    shapes = [(64, 32)] * 9 + [(32, 64)] * 5 + [(32, 32)] * 4 + [(8, 16)] * 3
    found = []
    for owner, shape in enumerate(shapes):
        found += tables.matrices_of(torch.zeros(shape), torch.zeros(shape), None, (), owner, 0, group_of()) or []
    ordered = tables.in_order(found)
    assert sorted(matrix.owner for matrix in ordered) == list(range(len(shapes)))
    largest = max(tables.matrix_bytes(matrix) for matrix in ordered)
    for budget in (1, 5 * largest, 100 * largest):
        slices = in_turn(tables.lanes_of(ordered, budget, processors=1))
        assert [part.first for part in slices] == [0, *[part.last for part in slices[:-1]]]
        assert slices[-1].last == len(ordered)
        for part in slices:
            inside = ordered[part.first : part.last]
            assert len({matrix.short for matrix in inside}) == 1
            assert sum(tables.matrix_bytes(matrix) for matrix in inside) <= budget + largest
            for spans in (part.sections, part.runs):
                assert [index for span in spans for index in range(*span)] == list(range(part.first, part.last))
            for first, last in part.sections:
                assert len({(matrix.rows, matrix.cols) for matrix in ordered[first:last]}) == 1


def lanes_for(*shapes: tuple[tuple[int, int], int]) -> list[list[tuple[tuple[int, int], int]]]:
    """Shapes and counts of the sections of each lane, on a device of 132 multiprocessors."""
    found = []
    for shape in [shape for shape, count in shapes for _ in range(count)]:
        param = torch.empty(shape, device="meta")
        found += tables.matrices_of(param, param, None, (), len(found), 0, group_of()) or []
    ordered = tables.in_order(found)
    lanes = tables.lanes_of(ordered, tables.DEFAULT_WORKSPACE, processors=132)
    return [[((ordered[a].rows, ordered[a].cols), b - a) for part in lane for a, b in part.sections] for lane in lanes]


def test_lanes_are_cut_between_shapes_and_families_of_few_tiles_have_lanes_of_their_own() -> None:
    lanes = lanes_for(
        ((1536, 384), 48), ((384, 1536), 48), ((1152, 384), 6), ((384, 384), 6), ((64, 384), 6), ((8, 384), 6)
    )
    assert lanes[0] == [((384, 1536), 48), ((1152, 384), 6)]
    assert lanes[1] == [((1536, 384), 48)]
    assert lanes[2:] == [[((384, 384), 6), ((8, 384), 6)], [((64, 384), 6)]]  # by turns


def test_lanes_begin_with_their_largest_slices_and_share_the_work() -> None:
    lanes = lanes_for(((896, 896), 48), ((4864, 896), 48), ((896, 4864), 24))
    for lane in lanes[:2]:
        sizes = [rows * cols * count for (rows, cols), count in lane]
        assert sizes == sorted(sizes, reverse=True)
    assert [sum(count for _, count in lane) for lane in lanes] == [60, 60, 0, 0]


@pytest.mark.parametrize(
    ("m", "n", "coefficients", "steps", "blocks"),
    [
        (128, 4096, "keller", None, (1, 1, 1, 1, 1)),  # small: a block saves little
        (896, 896, "keller", None, (1, 1, 1, 1, 1)),  # square: a block saves nothing
        (384, 1536, "keller", None, (3, 2)),
        (384, 1536, "keller", 4, (2, 1, 1)),  # too few to make up for a block of three
        (384, 1536, "keller", 7, (3, 1, 1, 1, 1)),
        (896, 4864, "polar_express", None, (2, 1, 1, 1)),  # not sturdy
        (896, 4864, [(1.5, -0.5, 0.0)] * 5, None, (2, 1, 1, 1)),  # not known to be
    ],
)
def test_steps_are_taken_in_blocks_where_that_is_cheaper_and_exact_enough(
    m: int, n: int, coefficients: str | list[tuple[float, float, float]], steps: int | None, blocks: tuple[int, ...]
) -> None:
    iteration = resolve(coefficients, steps)
    assert tables.blocks_of(m, n, iteration) == blocks
    assert tables.blocks_of(m, n, iteration, "standard") == (1,) * sum(blocks)
    assert tables.blocks_of(m, n, iteration, "gram") == blocks  # on request, but not where it is not exact enough


def test_bank_offsets_follow_each_other_inside_a_slice() -> None:
    found = []
    for owner, shape in enumerate([(10, 6), (6, 10), (10, 6)]):
        found += tables.matrices_of(torch.zeros(shape), torch.zeros(shape), None, (), owner, 0, group_of()) or []
    ordered = tables.in_order(found)
    rows = tables.layout_of(ordered, tables.slices_of(ordered, 0, 3, 1 << 20))
    ends = [row[5] + row[1] * row[3] for row in rows]
    assert [row[5] for row in rows] == [0, *ends[:-1]]
    assert all(row[3] % 8 == 0 and row[3] >= row[2] for row in rows)


def test_chunks_cover_every_entry_of_every_tensor_once() -> None:
    sizes = [10, 1, 4, 25]
    chunks, starts = tables.chunks_of(sizes, 4)
    covered = [
        (owner, entry)
        for owner, index in chunks.tolist()
        for entry in range(4 * index, min(4 * index + 4, sizes[owner]))
    ]
    assert covered == [(owner, entry) for owner, size in enumerate(sizes) for entry in range(size)]
    assert starts == [0, 3, 4, 5, 12]
