"""Packed products: right to fp32's rounding, and alike in any company, in both forms of the copy."""

import pytest
import torch
from torch import Tensor

from tinsmith.models.packed import packed_itemsize, packed_product

FINE, COARSE = "fp32's own numbers", "numbers that bfloat16 holds"


def weight_of(kind: str, outputs: int, inputs: int) -> Tensor:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))
    return weight if kind == FINE else weight.bfloat16()


@pytest.mark.parametrize("kind", [FINE, COARSE])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (7, 33), (130, 320)])
def test_a_packed_products_row_is_right_and_the_same_beside_any_others(kind: str, outputs: int, inputs: int) -> None:
    weight, bias = weight_of(kind, outputs, inputs), torch.linspace(-1, 1, outputs)
    x = torch.randn(70, inputs, generator=torch.Generator().manual_seed(2))
    product = packed_product(weight, bias.to(weight.dtype), torch.float32)
    together = product(x)
    expected = x.double() @ weight.double().t() + bias.to(weight.dtype).double()
    torch.testing.assert_close(together.double(), expected, atol=1e-4, rtol=1e-5)
    for start, end in [(0, 1), (69, 70), (3, 5), (10, 26), (1, 68)]:
        assert torch.equal(product(x[start:end].contiguous()), together[start:end])


@pytest.mark.parametrize("gone", ["fbgemm_pack_gemm_matrix_fp16", "fbgemm_linear_fp16_weight_fp32_activation"])
def test_a_torch_without_products_in_half_precision_packs_in_fp32(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, gone, raising=False)
    assert packed_itemsize(torch.bfloat16, torch.float32) == 4
    weight = weight_of(COARSE, 16, 32)
    assert torch.equal(packed_product(weight, None, torch.float32)(torch.eye(32)), weight.float().t())


@pytest.mark.parametrize("large", [1e6, -3e38])
def test_numbers_beyond_half_precision_are_multiplied_as_they_are(large: float) -> None:
    weight = weight_of(COARSE, 16, 32)
    weight[3, 5] = large
    y = packed_product(weight, None, torch.float32)(torch.eye(32))
    assert torch.equal(y, weight.float().t())


@pytest.mark.parametrize(("small", "outputs"), [(1e-5, 16), (1e-7, 16), (1e-30, 16), (1e-5, 1)])
def test_outputs_whose_weights_are_all_small_are_as_exact_as_others(small: float, outputs: int) -> None:
    weight = weight_of(COARSE, 16, 256).float()
    weight[:outputs] *= small
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(3))
    expected = x.double() @ weight.double().t()
    error = (packed_product(weight, None, torch.float32)(x) - expected).abs()
    assert (error <= 2e-6 * expected.abs().amax(0)).all()


def test_a_weight_that_is_not_finite_stays_so() -> None:
    weight = weight_of(COARSE, 16, 32)
    weight[3, 5] = torch.nan
    y = packed_product(weight, None, torch.float32)(torch.ones(1, 32))
    assert y.isnan().tolist() == [[column == 3 for column in range(16)]]
