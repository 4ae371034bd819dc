"""Head and loss of a training step in FP8, chunk by chunk, with the gradients made on the way.

Logits are c = LOGIT_CAP * sigmoid(z / LOGIT_TEMPERATURE), z = x @ w.T. They lie in (0, 30), so a softmax needs no maximum:
exp(c) < 1.1e13. The mean's gradient by z is (softmax(c) - onehot(target)) * dc/dz / T. It depends on nothing behind the loss
but a factor, hence the forward finishes both products of the backward while a chunk's logits exist, and no tensor of T x V
elements ever does. The elementwise part is plain PyTorch on the CPU, which is the oracle, `model.head_triton` on a GPU.

Shape suffixes: T tokens, R tokens of one chunk, C model dim, V vocabulary.
"""

import torch
from torch import Tensor

LOGIT_CAP, LOGIT_TEMPERATURE = 30.0, 7.5
FP8_X_SCALE, FP8_W_SCALE, FP8_GRAD_SCALE = 0.5, 2.0**-9, 2.0**-19
FP8_W_LARGEST = FP8_W_SCALE * torch.finfo(torch.float8_e4m3fn).max
CHUNK = 8192  # tokens: the matrix products are large, and grad_w is added to few times
MULTIPLE = 16  # of every dimension of an FP8 product on a GPU


def quantise_x(x_TC: Tensor) -> Tensor:
    """x / FP8_X_SCALE in e4m3."""
    return x_TC.div(FP8_X_SCALE).to(torch.float8_e4m3fn)


def quantise_w(w_VC: Tensor) -> Tensor:
    """w / FP8_W_SCALE in e4m3, saturating: weights reach its end, and a plain cast would make NaN of what is beyond."""
    return w_VC.clamp(-FP8_W_LARGEST, FP8_W_LARGEST).div_(FP8_W_SCALE).to(torch.float8_e4m3fn)


def losses_and_gradient_plain(z_RV: Tensor, targets_R: Tensor, scale: float, dtype=torch.float8_e5m2):
    """(cross-entropy of every row in nats, float32; scale * its gradient by z, in `dtype`; the same transposed)."""
    s_RV = torch.sigmoid(z_RV.float() / LOGIT_TEMPERATURE)
    c_RV = LOGIT_CAP * s_RV
    lse_R = c_RV.exp().sum(-1).log()
    loss_R = lse_R - c_RV.gather(-1, targets_R[:, None])[:, 0]
    p_RV = (c_RV - lse_R[:, None]).exp()
    p_RV.scatter_add_(-1, targets_R[:, None], p_RV.new_full((len(p_RV), 1), -1.0))
    dz_RV = (p_RV * (s_RV - s_RV * s_RV) * (scale * LOGIT_CAP / LOGIT_TEMPERATURE)).to(dtype)
    return loss_R, dz_RV, dz_RV.T.contiguous()


def losses_and_gradient(z_RV: Tensor, targets_R: Tensor, scale: float):
    if z_RV.is_cuda:
        from model import head_triton

        return head_triton.losses_and_gradient(z_RV, targets_R, scale)
    return losses_and_gradient_plain(z_RV, targets_R, scale)


def loss_and_gradients(x_TC: Tensor, w_VC: Tensor, targets_T: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss in nats, its gradients by x (bfloat16) and by w (float32)."""
    T = len(x_TC)
    x_scale, w_scale, grad_scale = (x_TC.new_full((), s, dtype=torch.float32)
                                    for s in (FP8_X_SCALE, FP8_W_SCALE, FP8_GRAD_SCALE))
    x8_TC, w8_VC = quantise_x(x_TC), quantise_w(w_VC)
    w8_columns = w8_VC.T.contiguous().T  # a product takes a row-major and a column-major operand
    losses_T = x_TC.new_empty(T, dtype=torch.float32)
    grad_x = torch.empty_like(x_TC, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    grad_w = None
    for x8_RC, targets_R, losses_R, grad_x_RC in zip(*(t.split(chunk) for t in (x8_TC, targets_T, losses_T, grad_x)),
                                                     strict=True):
        z_RV = torch._scaled_mm(x8_RC, w8_VC.T, scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16,
                                use_fast_accum=True)
        loss_R, dz8_RV, dz8_VR = losses_and_gradient(z_RV, targets_R, 1 / (T * FP8_GRAD_SCALE))
        del z_RV  # its memory serves the products' results
        losses_R.copy_(loss_R)
        grad_x_RC.copy_(torch._scaled_mm(dz8_RV, w8_columns, scale_a=grad_scale, scale_b=w_scale, out_dtype=torch.bfloat16,
                                         use_fast_accum=False))
        part = torch._scaled_mm(dz8_VR, x8_RC.T.contiguous().T, scale_a=grad_scale, scale_b=x_scale,
                                out_dtype=torch.float32, use_fast_accum=False)
        grad_w = part if grad_w is None else grad_w.add_(part)
    return losses_T.mean(), grad_x, grad_w


_head_loss = torch.library.custom_op("scope::head_loss", loss_and_gradients, mutates_args=())


@_head_loss.register_fake
def _(x_TC, w_VC, targets_T, chunk):
    return (x_TC.new_empty((), dtype=torch.float32), x_TC.new_empty(x_TC.shape, dtype=torch.bfloat16),
            w_VC.new_empty(w_VC.shape, dtype=torch.float32))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the gradients are outputs too: nobody needs zeros of their size
    ctx.save_for_backward(output[1], output[2])


def _backward(ctx, grad, _grad_x, _grad_w):
    if grad is None:
        return None, None, None, None
    grad_x, grad_w = ctx.saved_tensors
    return grad * grad_x, grad * grad_w, None, None


_head_loss.register_autograd(_backward, setup_context=_setup_context)


def head_loss(x_TC: Tensor, w_VC: Tensor, targets_T: Tensor, chunk: int = CHUNK) -> Tensor:
    """Mean cross-entropy, in nats, of the capped logits of x @ w.T, by FP8 products over `chunk` tokens at a time.

    x_TC: activations; w_VC: the master weight; targets_T: int64 in [0, V). The gradient's fixed scale is made for a mean over
    one sequence: a factor behind the loss multiplies the finished gradients. A target that is outside fails on the CPU and
    makes the loss NaN on a GPU. ValueError where a GPU's products do not take the shape."""
    if chunk < MULTIPLE or chunk % MULTIPLE:
        raise ValueError(f"chunk {chunk} is not a positive multiple of {MULTIPLE} tokens")
    if x_TC.ndim != 2 or w_VC.ndim != 2 or x_TC.size(1) != w_VC.size(1) or targets_T.shape != x_TC.shape[:1]:
        raise ValueError(f"x {list(x_TC.shape)}, w {list(w_VC.shape)} and targets {list(targets_T.shape)} must be [T, C], "
                         f"[V, C] and [T]")
    sizes = dict(T=x_TC.size(0), C=x_TC.size(1), V=w_VC.size(0))
    if not sizes["T"]:
        raise ValueError("no tokens: a mean needs one")
    odd = [f"{name}={size}" for name, size in sizes.items() if size % MULTIPLE]
    if x_TC.is_cuda and odd:
        raise ValueError(f"FP8 products take multiples of {MULTIPLE}, not {', '.join(odd)}: pad, or take HEAD_LOSS=plain")
    return _head_loss(x_TC.contiguous(), w_VC.contiguous(), targets_T.contiguous(), chunk)[0]
