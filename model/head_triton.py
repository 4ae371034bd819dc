"""The kernels of `model.head`: what stands between its FP8 products on a GPU, equal to its plain PyTorch up to rounding.

Both are bound by memory and by exponentials alike, three a logit. So the logits are read twice in bf16 and written never:
one kernel sums exponentials over a row, the other writes the gradient in both layouts that the products take. (Packing four
rows of FP8 into a word to store the transpose came out wrong on an H200, every other pair of columns of every fourth row.)

Shape suffixes as in `model.head`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.head import LOGIT_CAP, LOGIT_TEMPERATURE

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
CAP, TEMPERATURE = tl.constexpr(LOGIT_CAP), tl.constexpr(LOGIT_TEMPERATURE)


class RowTiling(NamedTuple):
    """How the loss kernel walks over a row."""

    columns: int  # logits at once, a power of two
    warps: int


class GradientTiling(NamedTuple):
    """The gradient kernel's tile, powers of two."""

    rows: int
    columns: int
    warps: int


ROW = RowTiling(columns=2048, warps=8)
GRADIENT = GradientTiling(rows=64, columns=64, warps=4)  # of four; 0.88 ms at 8,192 x 50,304


@triton.jit
def _sigmoid(z):
    """Of z / TEMPERATURE."""
    return 1.0 / (1.0 + tl.exp2(z.to(tl.float32) * (-LOG2_E / TEMPERATURE)))


@triton.jit
def _capped(z):
    """The capped logit, in powers of two."""
    return _sigmoid(z) * (CAP * LOG2_E)


@triton.jit
def _loss_kernel(z_ptr, target_ptr, loss_ptr, lse_ptr, V, COLUMNS: tl.constexpr):
    """One row: its loss in nats, and the log-sum-exp of its capped logits in powers of two."""
    r = tl.program_id(0).to(tl.int64)
    total = tl.zeros([COLUMNS], tl.float32)
    whole = V // COLUMNS * COLUMNS
    for start in range(0, whole, COLUMNS):
        total += tl.exp2(_capped(tl.load(z_ptr + r * V + start + tl.arange(0, COLUMNS))))
    v = whole + tl.arange(0, COLUMNS)
    z = tl.load(z_ptr + r * V + v, mask=v < V, other=0.0)
    total += tl.where(v < V, tl.exp2(_capped(z)), 0.0)
    lse = tl.log2(tl.sum(total, 0))
    target = tl.load(target_ptr + r)
    z = tl.load(z_ptr + r * V + target, mask=(target >= 0) & (target < V), other=float("nan"))
    tl.store(lse_ptr + r, lse)
    tl.store(loss_ptr + r, (lse - _capped(z)) * LN_2)


@triton.jit
def _gradient_kernel(z_ptr, target_ptr, lse_ptr, dz_ptr, transposed_ptr, scale, R, V, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr):
    """dz [R, V] and its transpose, of one tile."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    v = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < R)[:, None] & (v < V)[None, :]
    target = tl.load(target_ptr + r, mask=r < R, other=-1).to(tl.int32)
    lse = tl.load(lse_ptr + r, mask=r < R, other=0.0)
    s = _sigmoid(tl.load(z_ptr + r[:, None] * V + v[None, :], mask=inside, other=0.0))
    p = tl.exp2(s * (CAP * LOG2_E) - lse[:, None]) - (v[None, :] == target[:, None]).to(tl.float32)
    dz = (p * (s - s * s) * scale).to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr + r[:, None] * V + v[None, :], dz, mask=inside)
    inside = (v < V)[:, None] & (r < R)[None, :]
    tl.store(transposed_ptr + v.to(tl.int64)[:, None] * R + r[None, :], tl.trans(dz), mask=inside)


def losses_and_gradient(z_RV: Tensor, targets_R: Tensor, scale: float, dtype=torch.float8_e5m2, row: RowTiling = ROW,
                        gradient: GradientTiling = GRADIENT) -> tuple[Tensor, Tensor, Tensor]:
    """`model.head.losses_and_gradient_plain`."""
    R, V = z_RV.shape
    loss, lse = (torch.empty(R, device=z_RV.device, dtype=torch.float32) for _ in range(2))
    _loss_kernel[(R,)](z_RV, targets_R, loss, lse, V, row.columns, num_warps=row.warps)
    dz, transposed = (torch.empty(*shape, device=z_RV.device, dtype=dtype) for shape in ((R, V), (V, R)))
    grid = (triton.cdiv(R, gradient.rows), triton.cdiv(V, gradient.columns))
    _gradient_kernel[grid](z_RV, targets_R, lse, dz, transposed, scale * LOGIT_CAP / LOGIT_TEMPERATURE, R, V, gradient.rows,
                           gradient.columns, num_warps=gradient.warps)
    return loss, dz, transposed
