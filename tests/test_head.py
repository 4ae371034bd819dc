"""Head and loss of a training step in FP8: against autograd, against the plain path, and the kernels against both."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

import scoped_medium as S
from model import head, head_triton

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
T, C, V = (112, 64, 144) if CUDA else (100, 40, 83)  # a GPU's products take multiples of 16

pytestmark = pytest.mark.usefixtures("one_thread_on_cpu") if not CUDA else []


def inputs(seed=0, spread=1.0):
    """Activations, weights beyond e4m3's end, and targets at both ends of the vocabulary; some tokens are predicted well."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, C, generator=generator).bfloat16()
    w = spread * torch.randn(V, C, generator=generator) * C**-0.5 * 3
    w[5, 7], w[V - 1, 0] = 1.5, -2.0
    targets = torch.randint(0, V, (T,), generator=generator)
    likely = (x[::3].float() @ w.T).argmax(-1)
    targets[::3], targets[1], targets[2], targets[-1] = likely, 0, V - 1, V - 1
    return x.to(DEVICE).requires_grad_(), w.to(DEVICE).requires_grad_(), targets.to(DEVICE)


def logits_of_every_kind(R, seed=0):
    """In bf16, from saturated through flat to the other end."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(R, V, generator=generator) * torch.tensor([0.0, 1.0, 10.0, 60.0]).repeat(R)[:R, None]
    z[0, 3], z[1, 4] = 3e4, -3e4
    targets = torch.randint(0, V, (R,), generator=generator)
    targets[0], targets[1], targets[2] = 3, V - 1, 0
    return z.bfloat16().to(DEVICE), targets.to(DEVICE)


def exact(z, targets):
    """Losses and gradient of their sum, by autograd in float64."""
    z = z.detach().double().requires_grad_()
    losses = F.cross_entropy(30 * torch.sigmoid(z / 7.5), targets, reduction="none")
    losses.sum().backward()
    return losses.detach(), z.grad


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# What stands between the products


def test_the_plain_losses_and_gradient_are_those_of_autograd():
    z, targets = logits_of_every_kind(37)
    loss, dz, transposed = head.losses_and_gradient_plain(z, targets, 3.0, torch.float32)
    expected_loss, expected = exact(z, targets)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(dz.double(), 3 * expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(transposed, dz.T) and transposed.is_contiguous()
    eight_bits = head.losses_and_gradient_plain(z, targets, 3.0)
    assert torch.equal(eight_bits[1].float(), dz.to(E5M2).float()) and eight_bits[2].dtype == E5M2


@pytest.mark.parametrize("R", [1, 16, 37])
@pytest.mark.parametrize("columns, tile", [(16, (8, 16)), (64, (16, 64)), (128, (64, 128))])
def test_kernels_against_autograd(R, columns, tile):
    z, targets = logits_of_every_kind(max(R, 3), R)
    z, targets = z[:R].contiguous(), targets[:R].contiguous()
    loss, dz, transposed = head_triton.losses_and_gradient(z, targets, 3.0, torch.float32, head_triton.RowTiling(columns, 4),
                                                           head_triton.GradientTiling(*tile, 4))
    expected_loss, expected = exact(z, targets)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dz.double(), 3 * expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(transposed, dz.T)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("R", [16, 36])
def test_kernels_pack_their_eight_bits(R):
    """Rounded as Triton rounds: its interpreter drops carries into the next power of two."""
    z, targets = logits_of_every_kind(R)
    _, dz, _ = head_triton.losses_and_gradient(z, targets, 500.0, torch.float32)
    _, dz8, transposed = head_triton.losses_and_gradient(z, targets, 500.0)
    assert dz8.shape == (R, V) and transposed.shape == (V, R) and dz8.dtype == transposed.dtype == E5M2
    assert torch.equal(dz8.view(torch.uint8).T, transposed.view(torch.uint8))
    rounded = torch.empty_like(dz, dtype=E5M2)
    _cast_kernel[(R * V // 4,)](dz, rounded, 4)
    assert torch.equal(dz8.view(torch.uint8), rounded.view(torch.uint8))
    assert not CUDA or torch.equal(rounded.float(), dz.to(E5M2).float())


def test_kernels_make_nan_of_a_target_outside():
    z, targets = logits_of_every_kind(16)
    targets[4], targets[9] = -100, V
    loss = head_triton.losses_and_gradient(z, targets, 1.0)[0]
    assert loss.isnan().nonzero()[:, 0].tolist() == [4, 9]


# ---------------------------------------------------------------------------------------------------------------------
# The operator


def run(x, w, targets, loss_of):
    x.grad = w.grad = None
    loss = loss_of(x, w, targets)
    loss.backward()
    return loss.detach(), x.grad, w.grad


def plain_path(x, w, targets):
    z = S.fp8_linear(x, w)[0]
    return F.cross_entropy(30 * torch.sigmoid(z.float() / 7.5), targets)


@pytest.mark.parametrize("chunk", [16, 48, 8192])  # 16 and 48 leave a shorter last one
def test_loss_and_gradients_are_those_of_the_quantised_operands(chunk):
    """The three products with their scales, against float64 on operands that are quantised here."""
    x, w, targets = inputs()
    loss, grad_x, grad_w = run(x, w, targets, lambda *a: head.head_loss(*a, chunk=chunk))
    assert (grad_x.dtype, grad_w.dtype) == (torch.bfloat16, torch.float32) and grad_w.is_contiguous()
    x8 = (x.detach() / 0.5).to(E4M3).double() * 0.5
    w8 = (w.detach() / 2**-9).clamp(-448, 448).to(E4M3).double() * 2**-9
    losses, dz = exact((x8 @ w8.T).bfloat16(), targets)
    dz8 = (dz / T * 2**19).float().to(E5M2).double() * 2**-19
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-3 if CUDA else 2e-6)
    assert error(grad_x, dz8 @ w8) < (1e-2 if CUDA else 2e-3) and error(grad_w, dz8.T @ x8) < (1e-2 if CUDA else 1e-4)


def test_loss_and_gradients_are_the_plain_paths():
    """Which rounds the gradient to bf16 on its way to e5m2: one in some hundred falls to the other side, a quarter away."""
    x, w, targets = inputs(1)
    loss, grad_x, grad_w = run(x, w, targets, head.head_loss)
    plain_loss, plain_x, plain_w = run(x, w, targets, plain_path)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    limit = 0.05 if CUDA else 0.03  # of two roundings; the test above holds the GPU's to float64
    assert error(grad_x, plain_x) < limit and error(grad_w, plain_w) < limit


def test_loss_and_gradients_are_exact_ones_but_for_fp8s_rounding():
    """4 bits of a weight's and an activation's mantissa, 3 of a gradient's. Weights within e4m3's range."""
    x, w, targets = inputs(2, spread=0.5)
    with torch.no_grad():
        w.clamp_(-0.8, 0.8)
    loss, grad_x, grad_w = run(x, w, targets, head.head_loss)
    _, plain_x, plain_w = run(x, w, targets, plain_path)
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    exact_loss = F.cross_entropy(30 * torch.sigmoid(x64 @ w64.T / 7.5), targets)
    exact_loss.backward()
    assert loss.item() == pytest.approx(exact_loss.item(), rel=0.01)
    assert error(grad_x, x64.grad) < min(0.1, 1.05 * error(plain_x, x64.grad))
    assert error(grad_w, w64.grad) < min(0.1, 1.05 * error(plain_w, w64.grad))


def test_chunks_do_not_matter():
    x, w, targets = inputs(3)
    loss, grad_x, grad_w = run(x, w, targets, head.head_loss)
    for chunk in (16, 32, 48, 96, 128):
        other = run(x, w, targets, lambda *a, chunk=chunk: head.head_loss(*a, chunk=chunk))
        assert other[0].item() == pytest.approx(loss.item(), rel=1e-3 if CUDA else 1e-6)  # a GPU's kernel depends on the shape
        assert error(other[1], grad_x) < (0.05 if CUDA else 1e-3) and error(other[2], grad_w) < (0.05 if CUDA else 1e-6)


def test_a_factor_behind_the_loss_multiplies_the_gradients():
    x, w, targets = inputs(4)
    _, grad_x, grad_w = run(x, w, targets, head.head_loss)
    _, twice_x, twice_w = run(x, w, targets, lambda *a: 2 * head.head_loss(*a) + 1)
    assert torch.equal(twice_x, 2 * grad_x) and torch.equal(twice_w, 2 * grad_w)
    x.requires_grad_(False)
    _, none, alone = run(x, w, targets, head.head_loss)
    assert none is None and torch.equal(alone, grad_w)


class Largest(TorchDispatchMode):
    """Notes the most elements that anything computed has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def test_logits_never_exist_whole():
    """The operator from inside, where a dispatch mode does not look by itself."""
    x, w, targets = inputs(5)
    with torch.no_grad(), Largest() as chunked:
        head.loss_and_gradients(x, w, targets, 48)
    with torch.no_grad(), Largest() as whole:
        head.loss_and_gradients(x, w, targets, 8192)
    assert chunked.elements == max(48 * V, V * C, T * C) < whole.elements == T * V
    with Largest() as outside:
        run(x, w, targets, head.head_loss)
    assert outside.elements == max(V * C, T * C)


@pytest.mark.skipif(CUDA, reason="the operator's contract is checked on the CPU")
def test_operator_keeps_the_compilers_contract():
    x, w, targets = inputs(6)
    torch.library.opcheck(torch.ops.scope.head_loss.default, (x, w, targets, 48))


def test_compiled():
    x, w, targets = inputs(7)
    eager = run(x, w, targets, head.head_loss)
    torch._dynamo.reset()
    compiled = torch.compile(head.head_loss, fullgraph=True, dynamic=False, backend="inductor" if CUDA else "aot_eager")
    for found, expected in zip(run(x, w, targets, compiled), eager, strict=True):
        assert torch.equal(found, expected)


def test_refusals():
    x, w, targets = inputs(8)
    for wrong, message in [
            (lambda: head.head_loss(x, w, targets, chunk=0), "chunk 0 is not a positive multiple of 16"),
            (lambda: head.head_loss(x, w, targets, chunk=40), "chunk 40 is not"),
            (lambda: head.head_loss(x, w[:, 1:], targets), r"x \[\d+, \d+\], w .* must be \[T, C\]"),
            (lambda: head.head_loss(x, w, targets[1:]), "targets"), (lambda: head.head_loss(x[None], w, targets), "x "),
            (lambda: head.head_loss(x[:0], w, targets[:0]), "no tokens")]:
        with pytest.raises(ValueError, match=message):
            wrong()


@pytest.mark.skipif(not CUDA, reason="the CPU's products take every shape")
def test_a_gpu_refuses_shapes_that_its_products_do_not_take():
    x, w, targets = inputs(8)
    with pytest.raises(ValueError, match="multiples of 16, not T=111: pad, or take HEAD_LOSS=plain"):
        head.head_loss(x[:-1], w, targets[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# The model


def tiny_model(monkeypatch, kind, fp8=True):
    monkeypatch.setattr(S, "fp8_available", lambda device: fp8)
    settings = dict(VOCAB_SIZE=130, DOC_DELIMITER=129, NUM_LAYERS=2, NUM_HEADS=2, HEAD_DIM=16, MODEL_DIM=32,
                    TRAIN_SEQ_LEN=256, BATCH_TOKENS=256, HEAD_LOSS=kind)
    model = S.build_model(S.Config.from_environment({name: str(value) for name, value in settings.items()}),
                          torch.device("cpu"))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return model.train(), torch.randint(0, 130, (257,), generator=generator)


def loss_of(model, tokens):
    return model(tokens[:-1].int(), tokens[1:], S.Schedule(model.config, 5, 10).context(tokens[:-1].int(), True, "reference"))


@pytest.mark.skipif(CUDA, reason="on a GPU the whole model runs in bf16: bench/step.py")
def test_a_model_trains_alike(monkeypatch):
    results = []
    for kind in ("plain", "fused"):
        model, tokens = tiny_model(monkeypatch, kind)
        out = loss_of(model, tokens)
        out.objective.backward()
        results.append((out.loss, {name: p.grad for name, p in model.named_parameters()}))
    (plain, plain_grads), (fused, fused_grads) = results
    assert fused.item() == pytest.approx(plain.item(), rel=1e-6)
    for name, expected in plain_grads.items():
        assert error(fused_grads[name], expected) < 0.02, name


@pytest.mark.skipif(CUDA, reason="on a GPU the whole model runs in bf16: bench/step.py")
def test_only_a_training_step_in_fp8_takes_the_operator(monkeypatch):
    calls, operator = [], head.head_loss
    monkeypatch.setattr(S, "head_loss", lambda *args: calls.append(len(args[0])) or operator(*args))
    model, tokens = tiny_model(monkeypatch, "fused")
    loss_of(model, tokens)
    assert calls == [256]
    with torch.no_grad():
        loss_of(model, tokens)
    loss_of(model.eval(), tokens)
    loss_of(*tiny_model(monkeypatch, "fused", fp8=False))
    loss_of(*tiny_model(monkeypatch, "plain"))
    assert calls == [256] and S.Config().head_loss == "plain"


@pytest.mark.skipif(CUDA, reason="on a GPU the whole model runs in bf16: bench/step.py")
def test_the_models_loss_is_one_graph(monkeypatch):
    torch._dynamo.reset()
    model, _ = tiny_model(monkeypatch, "fused")
    x, targets = torch.randn(256, 32, requires_grad=True), torch.randint(0, 130, (256,))
    results = [run(x, model.head_w, targets, lambda x, w, t, f=f: f(x, t)) for f in (
        model.cross_entropy, torch.compile(model.cross_entropy, fullgraph=True, dynamic=False, backend="aot_eager"))]
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_weights_stay_where_the_heads_of_training_and_evaluation_agree(monkeypatch):
    model, tokens = tiny_model(monkeypatch, "plain")
    with torch.no_grad():
        model.head_w.mul_(4)
    before = model.head_w.detach().clone()
    apart = [loss_of(model.train(), tokens).loss.item(), loss_of(model.eval(), tokens).loss.item()]
    model.keep_head_in_range()
    close = [loss_of(model.train(), tokens).loss.item(), loss_of(model.eval(), tokens).loss.item()]
    assert close[0] == apart[0] and abs(close[0] - close[1]) < 0.02 < 0.1 < abs(apart[0] - apart[1])
    inside = before.abs() <= 0.875
    assert torch.equal(model.head_w[inside], before[inside]) and (model.head_w[~inside].abs() == 0.875).all()
    assert 0.3 < inside.float().mean() < 0.9


@pytest.mark.parametrize("fp8", [True, False])
def test_a_step_keeps_them_there(fp8, monkeypatch):
    calls, keep = [], S.GPT.keep_head_in_range
    monkeypatch.setattr(S.GPT, "keep_head_in_range", lambda model: calls.append(1) or keep(model))
    model, tokens = tiny_model(monkeypatch, "plain", fp8)
    trainer = S.Trainer.__new__(S.Trainer)
    trainer.config, trainer.device, trainer.model = model.config, torch.device("cpu"), model
    trainer.step, trainer.total_steps = 1, 2
    trainer.optimizers, trainer.forward, trainer.compiled, trainer.backend = S.make_optimizers(model), model, False, "reference"
    with torch.no_grad():
        model.head_w[0] = 5.0
    trainer.train_step([(tokens[:-1].int(), tokens[1:])])
    assert len(calls) == fp8 and (model.head_w.abs().max() <= 0.875) == fp8
