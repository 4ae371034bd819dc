"""The frozen arm: the recipe's constants, each part against a plain re-derivation, the script on one and two processes."""

import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import baseline
from baseline import BLOCK, GPT, Hyperparameters, Trainer

ROOT = Path(__file__).resolve().parent.parent
FROZEN_SHA256 = "2a9032b4fdb1294124175f96fb43433ea48afb31f8c1b8b8dfd193d8e469e9ae"

CPU = torch.device("cpu")
on_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DELIMITER = 256
TINY = dict(doc_delimiter=DELIMITER, vocab_size=257, batch_tokens=1024, train_seq_len=256, val_seq_len=256, val_tokens=1024,
            num_layers=2, num_heads=2, head_dim=32, model_dim=64, num_iterations=12, window_blocks=2.0, warmup_steps=0,
            val_loss_every=5)

# The recipe, written out for its 16 layers.
LONG_LAYERS = (0, 4, 11, 15)
SKIP_FROM = {8: 7, 9: 6, 10: 5, 11: 4, 12: 3, 13: 2, 14: 1, 15: 0}
VALUE_TABLE = {0: 0, 1: 1, 2: 2, 13: 0, 14: 1, 15: 2}
NEWTON_SCHULZ = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
                 (2.8366, -3.0525, 1.2012))


@pytest.fixture(autouse=True)
def clean_process(request, monkeypatch, tmp_path):
    """No setting of the caller's environment, one thread, and no GPU unless the test asks for one."""
    for name in [field.upper() for field in Hyperparameters.__dataclass_fields__] + ["RANK", "WORLD_SIZE", "LOCAL_RANK"]:
        monkeypatch.delenv(name, raising=False)
    if not request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_shard(path, tokens, magic=20240520, version=1, promised=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if promised is None else promised
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return str(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards of slowly climbing bytes in documents of about 100 tokens: a few steps suffice to learn something."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, size in (("train_0", 9000), ("train_1", 9000), ("val_0", 3000)):
        tokens = np.cumsum(rng.integers(0, 3, size)) % 64
        tokens[rng.random(size) < 0.01] = DELIMITER
        write_shard(folder / f"{name}.bin", tokens)
    return dict(train_files=f"{folder}/train_*.bin", val_files=f"{folder}/val_*.bin")


def environment(settings):
    return {name.upper(): str(value) for name, value in settings.items()}


def read_log(path):
    """The losses of a run's log, {step: loss}, for training and validation."""
    lines = [json.loads(line) for line in path.read_text().split("\n" + "=" * 100 + "\n")[1].splitlines() if line[:1] == "{"]
    return tuple({line["step"]: line[kind] for line in lines if kind in line} for kind in ("train_loss", "val_loss"))


def run_main(monkeypatch, **settings):
    """The script in this process, as one process; returns its train and validation losses."""
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    baseline.main()
    return read_log(Path("logs/baseline.txt"))


def tokens_with_documents(T, seed, starts=None):
    """Random bytes, with a delimiter at each start, or in about every 150th place."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, DELIMITER, (T,), generator=generator)
    tokens[torch.rand(T, generator=generator) < 1 / 150 if starts is None else torch.tensor(starts, dtype=int)] = DELIMITER
    return tokens


def visible(tokens, window):
    """[T, T] by the closed rule: not the future, same document, fewer than max(window, 1) blocks away."""
    docs, t = (tokens == DELIMITER).cumsum(0), torch.arange(len(tokens))
    near = t[:, None] // BLOCK - t // BLOCK < max(window, 1)
    return (t[:, None] >= t) & (docs[:, None] == docs) & near


def shake(model, seed=0):
    """Every parameter random and alive, at a size that keeps the activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = p.shape[-1] ** -0.5 if p.ndim >= 2 else 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (0.5 if p.ndim < 2 else 0.0))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Constants


def test_frozen():
    digest = hashlib.sha256((ROOT / "baseline.py").read_bytes()).hexdigest()
    assert digest == FROZEN_SHA256, "baseline.py is frozen; SPEC.md says what may change it"


def test_hyperparameters_of_the_record():
    args = Hyperparameters.from_environment()
    assert (args.batch_tokens, args.train_seq_len, args.val_seq_len, args.val_tokens) == (524_288, 65_536, 262_144, 10_485_760)
    assert (args.vocab_size, args.doc_delimiter) == (50_257, 50_256)
    assert (args.num_layers, args.num_heads, args.head_dim, args.model_dim) == (16, 8, 128, 1024)
    assert (args.num_iterations, args.cooldown_frac, args.window_blocks) == (6950, 0.6, 13.5)
    assert (args.warmup_steps, args.val_loss_every) == (10, 125)
    assert BLOCK == 128


def default_model():
    with torch.device("meta"):
        return GPT(Hyperparameters())


def test_parameter_counts():
    model = default_model()

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters() if p.ndim >= 2)

    assert count(model.blocks) == 197_132_288
    assert count(model.embed) == 51_463_168
    assert [count(table) for table in model.value_embeds] == [51_463_168] * 3
    assert model.head_w.shape == (50_304, 1024)
    assert sum(p.numel() for p in model.parameters()) == 454_496_326  # 70 scalars: 16 + 15 pairs, 8 skips
    assert model.rotary.cos.shape == (262_144, 64)


def test_optimizer_groups():
    model = default_model()
    names = {id(p): name for name, p in model.named_parameters()}
    adam, muon = baseline.make_optimizers(model)

    def members(group):
        return {names[id(p)] for p in group["params"]}

    head, embeddings, scalars = adam.param_groups
    assert isinstance(adam, torch.optim.Adam) and not isinstance(adam, torch.optim.AdamW)
    assert [group["lr"] for group in adam.param_groups] == [0.003125, 0.3, 0.015]
    assert members(head) == {"head_w"}
    assert members(embeddings) == {"embed.weight"} | {f"value_embeds.{i}.weight" for i in range(3)}
    assert members(scalars) == {name for name in names.values() if name.endswith("lambdas")} | {"skip_weights"}
    for group in adam.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-10, 0)
        assert group["fused"] and not group["amsgrad"]
    for group in muon.param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.025, 0.01)
    blocks = [i for i in range(16) if i != 7]
    assert set().union(*map(members, muon.param_groups)) == (
        {f"blocks.{i}.attn.{w}" for i in blocks for w in ("qkv_w", "out_w")}
        | {f"blocks.{i}.mlp.{w}" for i in range(16) for w in ("fc_w", "proj_w")})
    everything = [id(p) for opt in (adam, muon) for group in opt.param_groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(names)


@pytest.mark.parametrize("place", ["nowhere", "twice"])
def test_a_parameter_outside_the_groups_or_in_two_is_noticed(place):
    model = GPT(Hyperparameters(**TINY))
    if place == "nowhere":
        model.extra_w = torch.nn.Parameter(torch.zeros(2, 2))
    else:
        model.blocks[0].mlp.tied_w = model.embed.weight
    with pytest.raises(AssertionError, match="in no group, or in two"):
        baseline.make_optimizers(model)


def test_initial_values():
    dim = 96
    model = baseline.build_model(Hyperparameters(**TINY | dict(num_layers=16, model_dim=dim, num_heads=3, head_dim=64)), CPU)
    assert not model.head_w.any()
    assert torch.equal(model.skip_weights, torch.ones(8))
    for table in (model.embed, *model.value_embeds):
        assert abs(table.weight.std() - 1) < 0.02 and abs(table.weight.mean()) < 0.02
        assert abs((table.weight.abs() < 1).float().mean() - 0.6827) < 0.02  # normal, not uniform
    bound = 3**0.5 * 0.5 * dim**-0.5
    assert model.blocks[7].attn is None
    for block in model.blocks:
        assert block.lambdas.tolist() == [1.0, 0.0]
        uniform, zeros = [block.mlp.fc_w], [block.mlp.proj_w]
        if block.attn is not None:
            assert block.attn.lambdas.tolist() == [0.5, 0.5]
            assert block.attn.qkv_w.shape == (3, 192, dim)
            uniform, zeros = uniform + [block.attn.qkv_w], zeros + [block.attn.out_w]
        assert not any(w.any() for w in zeros)
        for w in uniform:
            assert 0.999 * bound < w.abs().max() <= bound
            assert abs(w.std() / (bound / 3**0.5) - 1) < 0.02


def test_the_seed_decides_the_weights():
    one, same, other = (baseline.build_model(Hyperparameters(**TINY | dict(seed=seed)), CPU) for seed in (1, 1, 2))
    assert all(map(torch.equal, one.parameters(), same.parameters()))
    assert not torch.equal(one.embed.weight, other.embed.weight)


def test_learning_rate_schedule():
    args = Hyperparameters()
    for step in range(6951):
        x = Fraction(step, 6950)
        expected = 1 if x <= Fraction(2, 5) else (1 - x) / Fraction(3, 5)
        assert math.isclose(baseline.lr_factor(step, args), expected, rel_tol=1e-12, abs_tol=1e-12)
    assert [round(baseline.lr_factor(step, args), 12) for step in (0, 2780, 4865, 6950)] == [1, 1, 0.5, 0]


def test_momentum_schedule():
    for step, momentum in ((0, 0.85), (75, 0.875), (150, 0.9), (299, 0.85 + 0.1 * 299 / 300), (300, 0.95), (6949, 0.95)):
        assert math.isclose(baseline.muon_momentum(step), momentum, rel_tol=1e-12)


def test_window_schedule():
    args = Hyperparameters()
    windows = [baseline.window_size(step, args) for step in range(6951)]
    assert windows == [max(1, -(-27 * step // 13900)) for step in range(6951)]  # ceil(13.5 step / 6950), in integers
    assert sorted(set(windows)) == list(range(1, 15))


@pytest.mark.parametrize("step,long,short", [(0, 1, 1), (515, 2, 1), (1100, 3, 1), (3400, 7, 3), (6950, 14, 7)])
def test_lists_of_a_step(step, long, short):
    """The long window at full length on 20 blocks, one document; the short one is half of it, and never nothing."""
    trainer = SimpleNamespace(args=Hyperparameters(), device=CPU)
    lists = Trainer.lists(trainer, torch.zeros(20 * BLOCK, dtype=torch.int32), step)
    assert lists[True].num_N.tolist() == [min(i + 1, long) for i in range(20)]
    assert lists[False].num_N.tolist() == [min(i + 1, short) for i in range(20)]


# ---------------------------------------------------------------------------------------------------------------------
# Masks and attention


MASK_CASES = [  # (T, document starts; None: at random)
    (128, []),
    (896, None),
    (896, [0, 1, 2, 127, 128, 255, 256, 300, 639, 640, 895]),
    (896, [500]),
    (896, []),
    (1408, None),
]


def window_lists(tokens, window, width=14):
    return baseline.window_lists(tokens, DELIMITER, torch.tensor(window, dtype=torch.int32, device=tokens.device), width)


def blocks_of(dense):
    """[N, N] tables of the tiles with any and with all entries visible."""
    tiles = dense.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    return tiles.any(3).any(1), tiles.all(3).all(1)


@pytest.mark.parametrize("window", [0, 1, 2, 3, 14])
@pytest.mark.parametrize("T,starts", MASK_CASES)
def test_attention_equals_dense(T, starts, window):
    """Outputs and gradients, in double precision."""
    tokens = tokens_with_documents(T, T + window, starts)
    lists, dense = window_lists(tokens, window), visible(tokens, window)
    assert lists.num_N.tolist() == blocks_of(dense)[0].sum(1).tolist()
    generator = torch.Generator().manual_seed(window)
    q, k, v, weight = (torch.randn(2, 2, T, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    for t in (q, k, v):
        t.requires_grad_()
    out = baseline.block_gather_attention(q, k, v, lists)
    ref = (0.12 * q @ k.mT).masked_fill(~dense, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(out, ref, rtol=0, atol=1e-12)
    grads, ref_grads = (torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (out, ref))
    torch.testing.assert_close(grads, ref_grads, rtol=0, atol=1e-12)


class ActsAsCuda(torch.Tensor):
    """A CPU tensor that takes the branch for CUDA, where the lists for FlexAttention are made."""
    is_cuda = True


@pytest.mark.parametrize("window", [0, 1, 2, 3, 14])
@pytest.mark.parametrize("T,starts", MASK_CASES)
def test_block_mask_lists(T, starts, window):
    """Partial and full lists, and their transpose for the backward, against the tiles of the dense rule."""
    tokens = tokens_with_documents(T, T + window, starts)
    mask = window_lists(tokens.as_subclass(ActsAsCuda), window).block_mask
    dense = visible(tokens, window)
    any_NN, all_NN = blocks_of(dense)

    def table(num, idx):
        assert num.dtype == idx.dtype == torch.int32 and idx.is_contiguous()
        assert num.shape == idx.shape[:-1] == (1, 1, T // BLOCK)
        listed = torch.zeros(T // BLOCK, T // BLOCK, dtype=torch.int)
        for i, row in enumerate(idx[0, 0].tolist()):
            for j in row[: num[0, 0, i]]:
                listed[i, j] += 1
        assert listed.max() <= 1, "a block is listed twice"
        return listed.bool()

    assert mask.seq_lengths == (T, T) and mask.BLOCK_SIZE == (128, 128)
    assert torch.equal(table(mask.kv_num_blocks, mask.kv_indices), any_NN & ~all_NN)
    assert torch.equal(table(mask.full_kv_num_blocks, mask.full_kv_indices), all_NN)
    assert torch.equal(table(mask.q_num_blocks, mask.q_indices).T, any_NN & ~all_NN)
    assert torch.equal(table(mask.full_q_num_blocks, mask.full_q_indices).T, all_NN)
    # Kernels of torch 2.11 read the full lists with the strides of the partial ones.
    assert mask.kv_indices.stride() == mask.full_kv_indices.stride() and mask.q_indices.stride() == mask.full_q_indices.stride()
    for num, idx in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        for n, row in zip(num.flatten().tolist(), idx[0, 0].tolist(), strict=True):
            assert row[:n] == sorted(row[:n], reverse=True), "nearest first"
    t = torch.arange(T)
    assert torch.equal(mask.mask_mod(0, 0, t[:, None], t).as_subclass(torch.Tensor), visible(tokens, T))


@pytest.mark.parametrize("window", [pytest.param(w, marks=on_cuda) for w in (1, 2, 7, 14)])
def test_flex_attention_equals_block_gather(window):
    """Both against float32 on the same bf16 inputs. bf16 keeps 8 bits, so that the output, the softmax weights and the
    score gradients are each rounded by up to 2^-9 of their size; together they stay under 2^-6 of the tensor's norm."""
    T, H, D = 11 * BLOCK, 4, 128
    tokens = tokens_with_documents(T, window).cuda()
    lists = window_lists(tokens, window)
    generator = torch.Generator("cuda").manual_seed(window)
    q, k, v, weight = (torch.randn(1, H, T, D, generator=generator, device="cuda").bfloat16() for _ in range(4))

    def outputs(attention, *inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = attention(*inputs)
        return [out, *torch.autograd.grad((out.float() * weight.float()).sum(), inputs)]

    flex = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    precise = outputs(lambda *qkv: baseline.block_gather_attention(*qkv, lists), q.float(), k.float(), v.float())
    plain = outputs(lambda *qkv: baseline.block_gather_attention(*qkv, lists), q, k, v)
    fused = outputs(lambda *qkv: flex(*qkv, block_mask=lists.block_mask, scale=baseline.ATTENTION_SCALE), q, k, v)
    for name, ref, *results in zip(("out", "dq", "dk", "dv"), precise, plain, fused, strict=True):
        for result in results:
            assert ((result.float() - ref).norm() / ref.norm()).item() < 2**-6, name


# ---------------------------------------------------------------------------------------------------------------------
# Model


def rotate(x_BTHD):
    """Pair (x_i, x_{i + D/2}) is a complex number that turns by -t f_i; the second half of the frequencies is zero."""
    T, D = x_BTHD.shape[1], x_BTHD.shape[3]
    frequency = torch.tensor([1024.0 ** (-i / (D // 4 - 1)) for i in range(D // 4)] + [0.0] * (D // 4), dtype=torch.float64)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency
    z = torch.complex(*x_BTHD.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), -angle)[:, None]
    return torch.cat([z.real, z.imag], -1)


def test_rotary():
    T = 3000
    x = torch.randn(2, T, 3, 128, generator=torch.Generator().manual_seed(0))
    rotary = baseline.Rotary(128, 4096)
    torch.testing.assert_close(rotary(x), rotate(x).float(), rtol=0, atol=2e-6)
    assert torch.equal(rotary(x)[..., 32:64], x[..., 32:64]) and torch.equal(rotary(x)[..., 96:], x[..., 96:])
    assert rotary(x.bfloat16()).dtype == torch.bfloat16


class PlainModel:
    """The recipe's forward pass for 16 layers in double precision, with dense masks and its own constants."""

    def __init__(self, model):
        self.p = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
        self.heads = model.args.num_heads

    @staticmethod
    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def attention(self, x, layer, tokens, mask):
        p, (T, _) = {w: self.p[f"blocks.{layer}.attn.{w}"] for w in ("qkv_w", "out_w", "lambdas")}, x.shape
        q, k, v = ((x @ w.T).view(1, T, self.heads, -1) for w in p["qkv_w"])
        q, k = rotate(self.norm(q)), rotate(self.norm(k))
        v = p["lambdas"][0] * v
        if layer in VALUE_TABLE:
            v = v + p["lambdas"][1] * self.p[f"value_embeds.{VALUE_TABLE[layer]}.weight"][tokens].view_as(v)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.12
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(T, -1) @ p["out_w"].T

    def hidden(self, tokens, long, short):
        masks = {True: visible(tokens, long), False: visible(tokens, short)}
        x = x0 = self.norm(self.p["embed.weight"][tokens])
        outputs = {}
        for i in range(16):
            if i in SKIP_FROM:
                x = x + self.p["skip_weights"][i - 8] * outputs[SKIP_FROM[i]]
            x = self.p[f"blocks.{i}.lambdas"] @ torch.stack([x.flatten(), x0.flatten()])
            x = x.view_as(x0)
            if i != 7:
                x = x + self.attention(self.norm(x), i, tokens, masks[i in LONG_LAYERS])
            fc, proj = (self.p[f"blocks.{i}.mlp.{w}"] for w in ("fc_w", "proj_w"))
            x = x + (self.norm(x) @ fc.T).clamp(min=0) ** 2 @ proj.T
            outputs[i] = x
        return self.norm(x)

    def loss(self, tokens, targets, long, short):
        z = self.hidden(tokens, long, short) @ self.p["head_w"].T
        return F.cross_entropy(15 * torch.tanh(z / 15) + 15, targets)


SIXTEEN_LAYERS = TINY | dict(num_layers=16, num_heads=2, head_dim=16, model_dim=48, train_seq_len=896, batch_tokens=896,
                             window_blocks=4.0)


def test_loss_and_gradients_equal_the_plain_model():
    """Windows of 4 and 2 blocks on 7; the head is made large, so that the cap bends its logits."""
    trainer = Trainer(Hyperparameters(**SIXTEEN_LAYERS), CPU)
    model = shake(trainer.model)
    model.head_w.data *= 10
    plain = PlainModel(model)
    tokens = tokens_with_documents(897, seed=3, starts=[0, 200, 650])
    inputs, targets = tokens[:-1], tokens[1:]
    lists = trainer.lists(inputs, step=12)
    torch.testing.assert_close(model.hidden(inputs, lists)[0].double(), plain.hidden(inputs, 4, 2), rtol=0, atol=2e-5)
    loss, plain_loss = model(inputs, targets, lists), plain.loss(inputs, targets, 4, 2)
    torch.testing.assert_close(loss.double(), plain_loss, rtol=2e-6, atol=0)
    loss.backward()
    plain_loss.backward()
    for name, p in model.named_parameters():
        expected = plain.p[name].grad
        torch.testing.assert_close(p.grad.double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item(),
                                   msg=lambda text, name=name: f"{name}: {text}")


def test_wiring():
    """What each of the 16 layers is given: its input, its value embedding, its window."""
    trainer = Trainer(Hyperparameters(**SIXTEEN_LAYERS), CPU)
    model = shake(trainer.model)
    calls = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: calls.append((*inputs, output)))
    tokens = tokens_with_documents(896, seed=4)
    lists = trainer.lists(tokens, step=12)
    with torch.no_grad():
        model.hidden(tokens, lists)
    first, outputs = calls[0][0], [call[-1] for call in calls]
    torch.testing.assert_close(first, F.rms_norm(model.embed(tokens)[None], (48,)))
    for i, (x, x0, ve, _, given, _) in enumerate(calls):
        expected = outputs[i - 1] if i else first
        if i in SKIP_FROM:
            expected = expected + model.skip_weights[i - 8] * outputs[SKIP_FROM[i]]
        torch.testing.assert_close(x, expected, msg=lambda text, i=i: f"input of layer {i}: {text}")
        assert x0 is first
        assert given is lists[i in LONG_LAYERS]
        assert (ve is None) == (i not in VALUE_TABLE)
        assert ve is None or torch.equal(ve[0], model.value_embeds[VALUE_TABLE[i]].weight[tokens])
    assert [i for i, block in enumerate(model.blocks) if block.attn is None] == [7]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
def test_fp8_linear(device, monkeypatch):
    """Operands, scales and accumulation of the three products. The values reach into the subnormals of both formats,
    where a scale that is off by a power of two rounds otherwise, and beyond the largest weight that e4m3 holds."""
    calls, scaled_mm = [], torch._scaled_mm

    def spy(a, b, **options):
        assert a.stride(1) == 1 and b.stride(0) == 1, "the kernel takes a row-major and a column-major operand"
        calls.append(((a.float().cpu(), b.float().cpu()), options))
        return scaled_mm(a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    generator = torch.Generator().manual_seed(0)

    def spread(rows, cols, low, high):
        size = 2.0 ** (low + (high - low) * torch.rand(rows, cols, generator=generator))
        return (torch.randn(rows, cols, generator=generator).sign() * size).to(device)

    x, w, grad = spread(32, 64, -12, 3).bfloat16(), spread(48, 64, -20, 2), spread(32, 48, -38, -8).bfloat16()
    x.requires_grad_(), w.requires_grad_()
    out = baseline.fp8_linear(x, w)[0]
    out.backward(grad)

    x8 = (x.detach().float() / 0.5).to(torch.float8_e4m3fn).float().cpu()
    w8 = (w.detach() / 2**-9).clamp(-448, 448).to(torch.float8_e4m3fn).float().cpu()
    assert (w.detach().abs() > 448 * 2**-9).any() and out.isfinite().all()
    g8 = (grad.float() / 2**-19).to(torch.float8_e5m2).float().cpu()
    expected = [(x8, w8.T, 0.5, 2**-9, torch.bfloat16, True),
                (g8, w8, 2**-19, 2**-9, torch.bfloat16, False),
                (x8.T, g8, 0.5, 2**-19, torch.float32, False)]
    results = (out, x.grad, w.grad.T)
    for (operands, options), (a, b, scale_a, scale_b, dtype, fast), result in zip(calls, expected, results, strict=True):
        assert torch.equal(operands[0], a) and torch.equal(operands[1], b)
        assert (options["scale_a"].item(), options["scale_b"].item()) == (scale_a, scale_b)
        assert (options["out_dtype"], options["use_fast_accum"], result.dtype) == (dtype, fast, dtype)
        product = (a @ b * scale_a * scale_b).to(dtype)
        torch.testing.assert_close(result.detach().cpu(), product, rtol=2**-7, atol=2**-7 * product.abs().mean().item())


def test_fp8_is_for_training_on_hopper(monkeypatch, shards):
    gpu = torch.device("cuda", 0)
    for capability, available in (((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert baseline.fp8_available(gpu) == available
        assert not baseline.fp8_available(CPU)

    trainer = Trainer(Hyperparameters(**TINY | shards), CPU)
    tokens = tokens_with_documents(257, seed=0)
    monkeypatch.setattr(baseline, "fp8_available", lambda device: True)
    used = []
    monkeypatch.setattr(baseline, "fp8_linear", lambda x, w: used.append(w.dtype) or (F.linear(x, w),))
    for steps in (1, 2):
        trainer.train_step([(tokens[:-1], tokens[1:])], step=0)
        trainer.validate(step=0)
        assert used == [torch.float32] * steps  # the quantisation starts from the master weight


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers


def schulz_polynomial(s):
    """What the five steps make of one singular value."""
    for a, b, c in NEWTON_SCHULZ:
        s = a * s + b * s**3 + c * s**5
    return s


def polar(x, f=torch.ones_like):
    """U f(S) V^T in double precision; with f = 1, the polar factor."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ torch.diag_embed(f(s / s.norm(dim=-1, keepdim=True))) @ vh


def matrices(*shape):
    """Random singular vectors; singular values from 0.012 of the Frobenius norm (which is 7) up, evenly in the logarithm."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(*shape, generator=generator, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(-1.5, 0, min(shape[-2:]), dtype=torch.float64)
    assert s[0] / s.norm() > 0.01
    return 7 * u @ torch.diag(s / s.norm()) @ vh


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96), (3, 40, 40), (2, 3, 24, 64), (2, 64, 24)])
def test_newton_schulz_is_near_the_polar_factor(shape):
    """The steps are odd polynomials in the matrix: singular vectors stay, each singular value s (relative to the Frobenius
    norm) becomes p(s). On [0.01, 1] p lies within 0.0318 of 1, and that is how near the polar factor they come, no nearer:
    the coefficients trade accuracy at 1 for speed near 0. Below, p rises from 0 at slope 500 and never exceeds 1.146."""
    s = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    p = schulz_polynomial(s)
    assert 0 <= p.min() and p.max() < 1.146 and 490 < p[1] / s[1] < 510
    assert (p[s >= 0.01] - 1).abs().max() < 0.0318

    x = matrices(*shape)
    y = baseline.newton_schulz(x)
    assert y.shape == shape and y.dtype == x.dtype
    torch.testing.assert_close(y, polar(x, schulz_polynomial), rtol=0, atol=1e-7)  # 1e-7 is added to the norm
    assert torch.linalg.matrix_norm(y - polar(x), 2).max() < 0.0319
    single = baseline.newton_schulz(x.float())
    torch.testing.assert_close(single.double(), polar(x, schulz_polynomial), rtol=0, atol=1e-5)
    half = baseline.newton_schulz(x.bfloat16())  # as on a GPU: each of 15 products rounds to 8 bits
    assert torch.linalg.matrix_norm(half.double() - polar(x), 2).max() < 0.1
    assert not baseline.newton_schulz(torch.zeros(shape)).any()


def test_optimizer_steps_equal_plain_ones():
    """Three steps of Adam and of Muon on random gradients, in double precision and one parameter at a time.
    Adam's gradients go down to 1e-12, where its epsilon counts; a large rate shows whether weights decay before the update."""
    args = Hyperparameters(**TINY | dict(num_layers=3))
    model = shake(GPT(args))
    plain = {name: p.detach().double() for name, p in model.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in plain.items()} for _ in range(2))
    adam, muon = baseline.make_optimizers(model)
    generator = torch.Generator().manual_seed(1)
    for t, (factor, momentum) in enumerate(((1.0, 0.85), (10.0, 0.9), (0.4, 0.95)), start=1):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator) * 10 ** (-12 * torch.rand(p.shape, generator=generator))
            g, w = p.grad.double(), plain[name]
            if name.startswith("blocks.") and not name.endswith("lambdas"):
                lr, rows, cols = 0.025 * factor, *p.shape[-2:]
                first[name] = momentum * first[name] + (1 - momentum) * g
                update = polar(momentum * first[name] + (1 - momentum) * g, schulz_polynomial)
                w *= 1 - lr * 0.01
                w -= lr * (math.sqrt(rows / cols) if rows > cols else 1.0) * update
            else:
                lr = factor * (0.1 / math.sqrt(64) if name == "head_w" else 0.015 if p.ndim == 1 else 0.3)
                first[name] = 0.8 * first[name] + 0.2 * g
                second[name] = 0.95 * second[name] + 0.05 * g**2
                w -= lr * first[name] / (1 - 0.8**t) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-10)
        for opt in (adam, muon):
            for group in opt.param_groups:
                group["lr"] = group["initial_lr"] * factor
                if opt is muon:
                    group["momentum"] = momentum
            opt.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach().double(), plain[name], rtol=2e-6, atol=1e-5,
                                       msg=lambda text, name=name, t=t: f"{name}, step {t}: {text}")


@pytest.mark.parametrize("step,factor,momentum", [(0, 1.0, 0.85), (150, 1.0, 0.9), (4865, 0.5, 0.95)])
def test_train_step(step, factor, momentum, monkeypatch):
    """Each sequence's loss goes backward whole (the FP8 head's gradient scale counts on it); the optimizers see the mean
    gradient, and the rates of the step."""
    args = Hyperparameters(**TINY | dict(num_iterations=6950, batch_tokens=768))
    trainer = Trainer(args, CPU)
    model = shake(trainer.model)
    sequences = [(tokens[:-1], tokens[1:]) for tokens in (tokens_with_documents(257, seed) for seed in range(3))]
    losses = [model(*sequence, trainer.lists(sequence[0], step)) for sequence in sequences]
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]

    backward, seen = [], []
    model.head_w.register_hook(lambda grad: backward.append(grad.clone()))
    for opt in trainer.optimizers:
        monkeypatch.setattr(opt, "step", lambda opt=opt: seen.append(
            [(group["lr"] / group["initial_lr"], group.get("momentum")) for group in opt.param_groups]
            + [[p.grad.clone() for p in model.parameters()]]))
    loss = trainer.train_step(iter(sequences), step)

    torch.testing.assert_close(loss, sum(losses).detach() / 3)
    head = [name for name, _ in model.named_parameters()].index("head_w")
    torch.testing.assert_close(backward, [g[head] for g in grads])
    (*adam_rates, adam_grads), (*muon_rates, muon_grads) = seen
    assert adam_rates == [(pytest.approx(factor), None)] * 3
    assert muon_rates == [(pytest.approx(factor), pytest.approx(momentum))] * len(muon_rates)
    mean = [sum(each) / 3 for each in zip(*grads, strict=True)]
    torch.testing.assert_close(adam_grads, mean, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(muon_grads, mean, rtol=1e-5, atol=1e-8)
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Data


def test_token_batches(tmp_path):
    """Shards in the order of their names; a batch needs one token to follow its last target, else the shard is done."""
    n, sizes = 50, dict(d=2 * 50 + 2, a=3, c=51, b=2 * 50 + 1, e=52)
    start, expected = 0, []
    for name, size in sorted(sizes.items()):
        write_shard(tmp_path / f"shard_{name}.bin", np.arange(start, start + size))
        expected += [list(range(start + s, start + s + n + 1)) for s in dict(b=[0], d=[0, 50], e=[0]).get(name, [])]
        start += size
    batches = baseline.token_batches(f"{tmp_path}/shard_*.bin", n, 500)
    assert [next(batches).tolist() for _ in expected] == expected
    with pytest.raises(SystemExit, match=r"^error: .*shard_\*\.bin.* has run out of tokens; [^\n]*$"):
        next(batches)


@pytest.mark.parametrize("sequences,world_size", [(4, 1), (4, 2), (3, 2), (5, 4)])
def test_local_sequences_deal_out_the_batch(sequences, world_size, monkeypatch):
    batch = np.arange(sequences * 10 + 1, dtype=np.uint16) + 60_000
    dealt = []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        mine = list(baseline.local_sequences(batch, 10, CPU))
        assert len(mine) == len(range(rank, sequences, world_size))
        for inputs, targets in mine:
            assert (inputs.dtype, targets.dtype) == (torch.int32, torch.int64)
            assert torch.equal(targets, inputs.long() + 1)
        dealt += [(rank + i * world_size, inputs.tolist()) for i, (inputs, _) in enumerate(mine)]
    assert [inputs for _, inputs in sorted(dealt)] == batch[:-1].reshape(sequences, 10).tolist()


def shard_faults():
    tokens = list(range(40))
    yield "magic", lambda path: write_shard(path, tokens, magic=20240521)
    yield "version", lambda path: write_shard(path, tokens, version=2)
    yield "truncated", lambda path: write_shard(path, tokens, promised=41)
    yield "overlong", lambda path: write_shard(path, tokens, promised=39)
    yield "negative size", lambda path: write_shard(path, tokens, promised=-40)
    yield "half a header", lambda path: path.write_bytes(np.array([20240520, 1, 40], "<i4").tobytes())
    yield "empty file", lambda path: path.write_bytes(b"")
    yield "token range", lambda path: write_shard(path, tokens[:-1] + [50])


@pytest.mark.parametrize("write", [pytest.param(write, id=name) for name, write in shard_faults()])
def test_malformed_shards_are_refused_in_one_line(write, tmp_path):
    write(tmp_path / "bad.bin")
    with pytest.raises(SystemExit, match=r"^error: [^\n]*bad\.bin: [^\n]+$"):
        next(baseline.token_batches(f"{tmp_path}/*.bin", 10, 50))


def test_shards_at_the_edge_are_read(tmp_path):
    path = write_shard(tmp_path / "good.bin", [0, 49, 7])
    assert baseline.open_shard(path, 50).tolist() == [0, 49, 7]


# ---------------------------------------------------------------------------------------------------------------------
# The script


def test_step_0_validation_loss_at_full_vocabulary(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    files = write_shard(tmp_path / "full.bin", np.append(rng.integers(0, 50257, 800), [50256, 0]))
    settings = TINY | dict(vocab_size=50257, doc_delimiter=50256, num_iterations=1, batch_tokens=256, val_tokens=768)
    train, val = run_main(monkeypatch, **settings, train_files=files, val_files=files)
    assert val[0] == pytest.approx(math.log(50304), abs=1e-5)
    assert train[1] == pytest.approx(math.log(50304), abs=1e-5)
    assert val[1] != val[0]


def test_a_run_learns_and_its_log_is_complete(monkeypatch, shards):
    train, val = run_main(monkeypatch, **TINY, **shards)
    assert list(train) == list(range(1, 13)) and list(val) == [0, 5, 10, 12]
    assert train[1] == pytest.approx(math.log(384), abs=1e-5)
    assert val[12] < 2 < val[5]
    assert Path("logs/baseline.txt").read_text().startswith((ROOT / "baseline.py").read_text())


def test_validation_reads_the_first_tokens_with_the_window_of_the_step(shards):
    args = Hyperparameters(**SIXTEEN_LAYERS | shards | dict(val_seq_len=768, val_tokens=1536))
    trainer = Trainer(args, CPU)
    plain = PlainModel(shake(trainer.model))
    tokens = torch.from_numpy(np.fromfile(shards["val_files"].replace("*", "0"), "<u2", offset=1024).astype(int))
    for step, long, short in ((0, 1, 0), (6, 2, 1), (12, 4, 2)):
        losses = [plain.loss(tokens[s : s + 768], tokens[s + 1 : s + 769], long, short) for s in (0, 768)]
        assert trainer.validate(step) == pytest.approx((sum(losses) / 2).item(), rel=2e-6)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_warm_up_leaves_no_trace(monkeypatch, shards):
    """Bitwise the same losses with and without; every state is back in place before the first step."""
    trainer = Trainer(Hyperparameters(**TINY | dict(warmup_steps=2)), CPU)
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] for opt in trainer.optimizers]
    steps, train_step = [], trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda *args, **kwargs: steps.append(train_step(*args, **kwargs)))
    trainer.warm_up()
    assert len(steps) == 2 and steps[0] != steps[1], "the warm-up did not train"
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.state_dict().items())
    assert [opt.state_dict()["state"] for opt in trainer.optimizers] == [{}, {}]
    assert [[{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] for opt in trainer.optimizers] == groups

    runs = [run_main(monkeypatch, **TINY | shards | dict(warmup_steps=n, num_iterations=4)) for n in (0, 2)]
    assert runs[0] == runs[1]


def test_the_clock_counts_training_alone(monkeypatch, shards, capsys):
    """A clock that only training (by a second a step) and validation (by a thousand) move."""
    clock = itertools.count()
    seconds = [0.0]
    train_step, validate = Trainer.train_step, Trainer.validate

    def timed(method, duration):
        def wrapper(*args, **kwargs):
            seconds[0] += duration
            return method(*args, **kwargs)
        return wrapper

    monkeypatch.setattr(Trainer, "train_step", timed(train_step, 1.0))
    monkeypatch.setattr(Trainer, "validate", timed(validate, 1000.0))
    monkeypatch.setattr(baseline.time, "perf_counter", lambda: next(clock) * 1e-6 + seconds[0])
    run_main(monkeypatch, **TINY | shards | dict(warmup_steps=2))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["train_seconds"] for line in lines] == [pytest.approx(s, abs=0.01) for s in (0, 5, 10, 12)]
    assert lines[-1]["step_ms"] == pytest.approx(1000, abs=1)


@pytest.mark.parametrize("sequences", [2, 3])
def test_two_processes_train_like_one(sequences, monkeypatch, shards, tmp_path):
    """The same sequences in the same steps; 3 of them are dealt out unevenly. Only the order of the sums differs, and 12 steps
    of three layers (whose matrices do not divide by two either) carry that rounding to 2e-6 of the loss."""
    settings = TINY | shards | dict(batch_tokens=256 * sequences, num_layers=3)
    one = run_main(monkeypatch, **settings)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "baseline.py"],
        env=os.environ | environment(settings | dict(run_name="two")) | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 4, "only rank 0 reports"
    two = read_log(Path("logs/two.txt"))
    for mine, theirs in zip(one, two, strict=True):
        assert len(mine) == len(theirs) and theirs == pytest.approx(mine, rel=2e-5)


REFUSALS = [
    (dict(TRAIN_SEQ_LEN=200), "TRAIN_SEQ_LEN=200 is not a multiple of 128"),
    (dict(VAL_SEQ_LEN=100), "VAL_SEQ_LEN=100 is not a multiple of 128"),
    (dict(BATCH_TOKENS=1000), "BATCH_TOKENS=1000 is not a multiple of TRAIN_SEQ_LEN=256"),
    (dict(VAL_TOKENS=1000), "VAL_TOKENS=1000 is not a multiple of VAL_SEQ_LEN=256"),
    (dict(NUM_ITERATIONS="many"), "many"),
    (dict(WORLD_SIZE=5), "5 processes"),
]


@pytest.mark.parametrize("change,named", [pytest.param(*case, id="-".join(case[0])) for case in REFUSALS])
def test_refusals_are_one_line(change, named, monkeypatch, shards):
    with pytest.raises(SystemExit, match=r"^error: [^\n]+$") as refusal:
        run_main(monkeypatch, **TINY | shards | change)
    assert named in str(refusal.value)
    assert not Path("logs").exists()


def test_a_refusal_on_the_command_line(shards):
    result = subprocess.run([sys.executable, ROOT / "baseline.py"], capture_output=True, text=True, timeout=60,
                            env=os.environ | environment(TINY | shards | dict(train_seq_len=200)))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: TRAIN_SEQ_LEN=200 is not a multiple of 128\n"
