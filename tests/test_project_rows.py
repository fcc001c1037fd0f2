"""Projecting into the packed sequence: the public function against its definition."""

import torch

from llava_hd.kernels.project_rows import project_rows, project_rows_reference


def inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(9, 4), (6, 4), (6,), (5, 6), (5,), (8, 5), (5,)]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


SOURCE = torch.tensor([-1, 0, 2, -2, 1, 3, -2, -1])
ROWS = torch.tensor([8, 0, 3, 4])


def test_it_is_the_definition() -> None:
    args = inputs()
    for rows in (ROWS, None):
        torch.testing.assert_close(
            project_rows(*args, SOURCE, rows), project_rows_reference(*args, SOURCE, rows)
        )


def test_gradients_pass_gradcheck_in_fp64() -> None:
    assert torch.autograd.gradcheck(lambda *args: project_rows(*args, SOURCE, ROWS), inputs())


def test_without_row_ends() -> None:
    args = inputs()
    source = SOURCE.where(SOURCE != -2, -1)
    args[6] = None
    torch.testing.assert_close(
        project_rows(*args, source, ROWS), project_rows_reference(*args, source, ROWS)
    )
