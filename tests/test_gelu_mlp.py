"""The projector's function against its written-out definition."""

import pytest
import torch

from llava_hd.kernels.gelu_mlp import gelu_mlp, gelu_mlp_reference


def inputs(rows: int, d: int, f: int, h: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(rows + d)
    shapes = [(rows, d), (f, d), (f,), (h, f), (h,)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("rows", [0, 1, 63, 257])
def test_it_is_the_exact_gelu_mlp(rows: int) -> None:
    args = inputs(rows, 17, 33, 20, torch.float64)
    torch.testing.assert_close(gelu_mlp(*args), gelu_mlp_reference(*args), rtol=1e-12, atol=1e-12)


def test_fp32_errs_at_most_twice_as_much_as_the_definition_in_fp32() -> None:
    wide = [x.detach() for x in inputs(200, 64, 96, 80, torch.float64)]
    narrow = [x.float() for x in wide]
    truth = gelu_mlp_reference(*wide)
    ours = (gelu_mlp(*narrow).double() - truth).abs().max()
    plain = (gelu_mlp_reference(*narrow).double() - truth).abs().max()
    assert ours <= 2 * plain + 1e-7


def test_only_the_named_rows_are_computed_and_receive_gradients() -> None:
    args = inputs(10, 5, 7, 6, torch.float64)
    args[0].data[3] = float("nan")  # a row that nobody names must not matter
    rows = torch.tensor([0, 9, 4, 4])
    out = gelu_mlp(*args, rows=rows)
    torch.testing.assert_close(out, gelu_mlp_reference(args[0][rows], *args[1:]))
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in args)
    assert args[0].grad[[1, 2, 3, 5, 6, 7, 8]].eq(0).all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [None, torch.tensor([3, 0, 0])])
def test_gradients_pass_gradcheck_in_fp64(rows: torch.Tensor | None, recompute: bool) -> None:
    def function(*args: torch.Tensor) -> torch.Tensor:
        return gelu_mlp(*args, rows, recompute=recompute)

    assert torch.autograd.gradcheck(function, inputs(4, 3, 5, 2, torch.float64))


def test_recompute_keeps_only_the_inputs() -> None:
    args = inputs(50, 3, 40, 2, torch.float64)
    own = {x.data_ptr() for x in args}
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    for recompute in (False, True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            gelu_mlp(*args, recompute=recompute)
        others = [tensor for tensor in kept if tensor.data_ptr() not in own]
        assert bool(others) != recompute


def test_shapes_that_do_not_chain_are_named() -> None:
    args = inputs(4, 3, 5, 2, torch.float32)
    with pytest.raises(ValueError, match=r"x \(4, 2\)"):
        gelu_mlp(args[0][:, :2], *args[1:])
    with pytest.raises(ValueError, match=r"b1 \(4,\)"):
        gelu_mlp(*args[:2], args[2][:4], *args[3:])
