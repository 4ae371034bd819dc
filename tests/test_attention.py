"""Block lists and attention backends against dense brute force: forward and every gradient, at odd shapes."""

import pytest
import torch

from model.attention import (
    BLOCK,
    BlockLists,
    Documents,
    flex_lists,
    pack_seen,
    pointer_attention,
    prepare,
    transpose_lists,
)
from model.attn_bias import (
    BiasCoefficients,
    ListShape,
    PointerState,
    PositionTables,
    SpectralBias,
    SpectralShape,
    augment,
    pointer_lists,
    window_lists,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DELIMITER = 7
SCALE = 0.12


def random_tokens(T, seed, document_length=300):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, DELIMITER, (T,), generator=generator)
    tokens[torch.rand(T, generator=generator) < 1 / document_length] = DELIMITER
    return tokens


def random_lists(N, H, width, seed):
    """Per-head lists of distinct causal ids in random order and number, the own block always among them."""
    generator = torch.Generator().manual_seed(seed)
    num = torch.zeros(1, H, N, dtype=torch.int32)
    idx = torch.randint(0, N, (1, H, N, min(width, N)), generator=generator, dtype=torch.int32)
    for h in range(H):
        for n in range(N):
            past = torch.randperm(n, generator=generator)[: torch.randint(0, width, (1,), generator=generator)]
            row = torch.cat([torch.tensor([n]), past])[: idx.size(-1)]
            num[0, h, n], idx[0, h, n, : len(row)] = len(row), row.int()
    return BlockLists(num, idx)


def dense_visible(lists, tokens, H):
    """[H, T, T] by the definition: listed block, not the future, same document."""
    T = len(tokens)
    N = T // BLOCK
    docs = (tokens == DELIMITER).cumsum(0)
    table = torch.zeros(H, N, N, dtype=torch.bool)
    num, idx = lists.num_BHN.expand(1, H, N), lists.idx_BHNW.expand(1, H, N, -1)
    for h in range(H):
        for n in range(N):
            table[h, n, idx[0, h, n, : num[0, h, n]].long()] = True
    t = torch.arange(T)
    return table.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2) & (t[:, None] >= t) & (docs[:, None] == docs)


def dense_attention(q, k, v, visible, bias=0.0):
    scores = q @ k.mT * SCALE + bias
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


def relative_error(out, ref):
    assert out.isfinite().all()
    return ((out.double().cpu() - ref.double().cpu()).norm() / ref.double().norm().clamp(min=1e-30)).item()


def spectral_case(T, H, D, seed, impl_dtype=torch.float64, **changes):
    """A SpectralBias with every output alive, random normed queries, its coefficients and its dense bias [H, T, T]."""
    shape = SpectralShape(H, D, l_train=256, l_max=4096, **changes)
    generator = torch.Generator().manual_seed(seed)
    module = SpectralBias(shape, generator)
    with torch.no_grad():
        module.w2.copy_(torch.randn(module.w2.shape, generator=generator) * 0.3)
        module.bias.add_(torch.randn(module.bias.shape, generator=generator) * 0.3)
    return module.to(impl_dtype), PositionTables(shape.frequencies(), T, impl_dtype)


def formula(module, q_BTHD, T):
    """The bias [B, H, T, T] straight from its definition, every cosine on its own."""
    s = module.shape
    w1, w2 = (w.expand(s.num_heads, -1, -1) for w in (module.w1, module.w2))
    hidden = torch.einsum("bthd,hde->bhte", q_BTHD, w1).relu() ** 2
    z = torch.einsum("bhte,hef->bhtf", hidden, w2) + module.bias[:, None]
    z_delta, z_pi, z_centre, z_width, amplitude, z_slope, z_gate = z.split(module.sizes, -1)
    delta_star = BLOCK * (s.l_max / BLOCK) ** z_delta.sigmoid()
    pi = z_pi.softmax(-1)
    omega = s.frequencies().to(z.dtype)
    a = amplitude[..., None] * module.envelope(z_centre, z_width)
    t = torch.arange(T, dtype=z.dtype)
    delta = (t[:, None] - t)[..., None, None]  # [T, T, 1, 1]

    def waves(delta):
        return (pi[..., None, :, None] * a[..., None, :, :]
                * torch.cos(omega * (delta - delta_star[:, :, :, None, :, None]))).sum((-1, -2))

    b = waves(delta)
    if s.slope:
        b = b + z_slope.tanh() / s.l_train * (t[:, None] - t)
    if s.subtract_zero:
        b = b - waves(torch.zeros(T, 1, 1, 1, dtype=z.dtype))
    if s.gate:
        b = b - z_gate
    return s.beta * b


@pytest.mark.parametrize("T,H,D,width", [(128, 1, 16, 1), (640, 3, 16, 3), (1408, 2, 8, 20)])
def test_reference_equals_dense(T, H, D, width):
    tokens = random_tokens(T, seed=T)
    lists = random_lists(T // BLOCK, H, width, seed=T + 1)
    q, k, v = (torch.randn(1, H, T, D, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, lse = pointer_attention(q, k, v, lists, Documents.of(tokens, DELIMITER), scale=SCALE, backend="reference")
    visible = dense_visible(lists, tokens, H)
    ref = dense_attention(q, k, v, visible)
    ref_lse = (q @ k.mT * SCALE).masked_fill(~visible, float("-inf")).logsumexp(-1)
    weight, lse_weight = torch.randn_like(out), torch.randn_like(lse)
    grads, ref_grads = (torch.autograd.grad((x * weight).sum() + (y * lse_weight).sum(), (q, k, v))
                        for x, y in ((out, lse), (ref, ref_lse)))
    for mine, theirs in zip((out, lse, *grads), (ref, ref_lse, *ref_grads), strict=True):
        assert relative_error(mine, theirs) < 1e-12


def test_reference_honours_visibility_by_token_and_blind_tokens():
    T, H, W = 640, 2, 3
    tokens, lists = random_tokens(T, seed=1), random_lists(T // BLOCK, H, W, seed=2)
    seen = torch.rand(1, H, T, W) < 0.5
    lists = lists._replace(num_BHN=torch.where(torch.arange(5) == 3, 0, lists.num_BHN).int(), seen_BHTw=pack_seen(seen))
    visible = dense_visible(lists, tokens, H)
    for h in range(H):
        for i in range(T):
            for slot, j in enumerate(lists.idx_BHNW[0, h, i // BLOCK, : lists.num_BHN[0, h, i // BLOCK]].tolist()):
                if not seen[0, h, i, slot]:
                    visible[h, i, j * BLOCK : (j + 1) * BLOCK] = False
    blind = ~visible.any(-1)
    assert blind.any() and not blind.all()
    q, k, v = (torch.randn(1, H, T, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, lse = pointer_attention(q, k, v, lists, Documents.of(tokens, DELIMITER), scale=SCALE, backend="reference")
    grads = torch.autograd.grad(out.square().sum() + lse[0][~blind].square().sum(), (q, k, v))
    p = (q @ k.mT * SCALE).exp() * visible
    ref = p @ v / p.sum(-1, keepdim=True).clamp(min=1e-300)
    ref_lse = p.sum(-1)[0][~blind].log()
    ref_grads = torch.autograd.grad(ref.square().sum() + ref_lse.square().sum(), (q, k, v))
    assert (out[0][blind] == 0).all() and (lse[0][blind] == float("-inf")).all()
    for mine, theirs in zip((out, lse[0][~blind], *grads), (ref, ref_lse, *ref_grads), strict=True):
        assert relative_error(mine, theirs) < 1e-12


def test_reference_in_chunks_of_rows(monkeypatch):
    tokens, lists = random_tokens(1280, 3), random_lists(10, 2, 4, 4)
    q, k, v = (torch.randn(1, 2, 1280, 8, dtype=torch.float64) for _ in range(3))
    documents = Documents.of(tokens, DELIMITER)
    whole = pointer_attention(q, k, v, lists, documents, scale=SCALE, backend="reference")
    monkeypatch.setattr("model.attention.REFERENCE_ROWS", 3)
    parts = pointer_attention(q, k, v, lists, documents, scale=SCALE, backend="reference")
    assert all(relative_error(a, b) < 1e-14 for a, b in zip(parts, whole, strict=True))


def test_sequence_must_be_whole_blocks():
    q = torch.zeros(1, 1, 100, 8)
    with pytest.raises(ValueError, match="100 tokens are not a multiple"):
        pointer_attention(q, q, q, None, None, scale=1.0, backend="reference")


def test_documents_against_brute_force():
    tokens = random_tokens(1024, 5)
    documents = Documents.of(tokens, DELIMITER)
    start = doc = 0
    for t, token in enumerate(tokens.tolist()):
        if token == DELIMITER:
            start, doc = t, doc + 1
        assert documents.id_T[t] == doc
        if t % BLOCK == 0:
            assert documents.start_block_N[t // BLOCK] == start // BLOCK


@pytest.mark.parametrize("window,width", [(1, 1), (3, 7), (14, 14), (0, 7)])
def test_window_lists_against_the_recipe(window, width):
    """Query block i reads j iff 0 <= i-j < max(window, 1) and the documents of the blocks overlap."""
    tokens = random_tokens(20 * BLOCK, seed=window + 10)
    documents = Documents.of(tokens, DELIMITER)
    docs = documents.id_T.view(-1, BLOCK)
    lists = window_lists(documents, torch.tensor(window, dtype=torch.int32), width)
    for i in range(20):
        expected = [j for j in range(i, -1, -1) if i - j < max(window, 1) and docs[i, 0] <= docs[j, -1]]
        assert lists.idx_BHNW[0, 0, i, : lists.num_BHN[0, 0, i]].tolist() == expected


@pytest.mark.parametrize("radius,globals_,local", [(-1, 0, 4), (0, 1, 1), (1, 2, 3), (3, 1, 4)])
def test_pointer_lists_against_brute_force(radius, globals_, local):
    T, H, M = 24 * BLOCK, 3, 2
    shape = ListShape(local_blocks=4, half_blocks=3, global_blocks=2)
    tokens = random_tokens(T, seed=radius + 20, document_length=900)
    documents = Documents.of(tokens, DELIMITER)
    delta = torch.exp(torch.rand(1, H, T, M) * 9)
    state = PointerState(*(torch.tensor(x, dtype=torch.int32) for x in (local, radius, globals_)))
    lists = pointer_lists(delta, documents, state, shape)
    width = 4 + M * 7 + 2
    assert lists.idx_BHNW.shape == (1, H, 24, width) and lists.idx_BHNW.is_contiguous()
    for h in range(H):
        for n in range(24):
            first = documents.start_block_N[n].item()
            wanted = {n - o for o in range(local)} | {first + g for g in range(globals_)} | {n}
            for m in range(M):
                centre = (n * BLOCK - int(delta[0, h, n * BLOCK, m].item() + 0.5)) // BLOCK
                wanted |= {centre + o for o in range(-radius, radius + 1)}
            wanted = sorted({min(max(b, first), n) for b in wanted}, reverse=True)
            got = lists.idx_BHNW[0, h, n, : lists.num_BHN[0, h, n]].tolist()
            assert got == wanted
            assert len(got) <= local + M * max(0, 2 * radius + 1) + globals_


def test_lists_depend_on_nothing_behind_the_block_leader():
    T, H, M = 8 * BLOCK, 2, 2
    tokens, delta = random_tokens(T, 1), torch.rand(1, H, T, M) * T
    state = PointerState(*(torch.tensor(x, dtype=torch.int32) for x in (2, 1, 1)))
    before = pointer_lists(delta, Documents.of(tokens, DELIMITER), state, ListShape(2, 1, 1))
    t = 5 * BLOCK + 1  # the second token of block 5: lists of blocks 0..5 may not move
    changed, tokens2 = delta.clone(), tokens.clone()
    changed[:, :, t:] = torch.rand_like(changed[:, :, t:]) * T
    tokens2[t:] = random_tokens(T, 2)[t:]
    after = pointer_lists(changed, Documents.of(tokens2, DELIMITER), state, ListShape(2, 1, 1))
    assert torch.equal(before.num_BHN[:, :, :6], after.num_BHN[:, :, :6])
    assert torch.equal(before.idx_BHNW[:, :, :6], after.idx_BHNW[:, :, :6])
    assert not torch.equal(before.idx_BHNW[:, :, 6:], after.idx_BHNW[:, :, 6:])


@pytest.mark.parametrize("N,H,width", [(1, 1, 1), (11, 3, 4), (37, 2, 30)])
def test_transpose_against_brute_force(N, H, width):
    lists = random_lists(N, H, width, seed=N)
    num, idx = transpose_lists(lists.num_BHN, lists.idx_BHNW, q_width=N)
    for h in range(H):
        for kv in range(N):
            readers = [n for n in range(N) if kv in lists.idx_BHNW[0, h, n, : lists.num_BHN[0, h, n]].tolist()]
            assert idx[0, h, kv, : num[0, h, kv]].tolist() == readers


def test_transpose_with_a_hub():
    """Every query block reads block 0."""
    N = 40
    idx = torch.zeros(1, 1, N, 2, dtype=torch.int32)
    idx[0, 0, :, 0] = torch.arange(N)
    num = torch.full((1, 1, N), 2, dtype=torch.int32)
    num[0, 0, 0] = 1
    q_num, q_idx = transpose_lists(num, idx, q_width=N)
    assert q_num[0, 0].tolist() == [N] + [1] * (N - 1) and q_idx[0, 0, 0].tolist() == list(range(N))


def test_flex_transposes_of_shared_lists_hold_every_reader():
    """Lists that all heads share need not be a sliding window: block 0 is read by all, however narrow the lists are."""
    N = 12
    own = torch.arange(N, dtype=torch.int32).expand(1, 1, N)
    shared = BlockLists((2 - (own == 0).int()).contiguous(), torch.stack([own, torch.zeros_like(own)], -1).contiguous())
    documents = Documents.of(torch.zeros(N * BLOCK, dtype=torch.long), DELIMITER)
    window = window_lists(documents, torch.tensor(3, dtype=torch.int32), 4)
    for lists, width in ((shared, N), (window, 4)):
        parts = prepare(lists, documents, backend="flex", needs_grad=True).prepared
        pairs = {(q, k) for q in range(N) for k in lists.idx_BHNW[0, 0, q, : lists.num_BHN[0, 0, q]].tolist()}
        found = {(q, k) for num, idx in (parts[4:6], parts[6:8]) for k in range(N)
                 for q in idx[0, 0, k, : num[0, 0, k]].tolist()}
        assert found == pairs and parts[5].size(-1) == width


def test_full_blocks_need_no_mask():
    T = 30 * BLOCK
    tokens = random_tokens(T, 8, document_length=700)
    lists = random_lists(30, 2, 9, 9)
    documents = Documents.of(tokens, DELIMITER)
    partial_num, partial_idx, full_num, full_idx = flex_lists(lists.num_BHN, lists.idx_BHNW, documents.id_T, 0, False)
    visible = dense_visible(lists, tokens, 2)
    blocks = visible.view(2, 30, BLOCK, 30, BLOCK)
    for h in range(2):
        for n in range(30):
            partial = partial_idx[0, h, n, : partial_num[0, h, n]].tolist()
            full = full_idx[0, h, n, : full_num[0, h, n]].tolist()
            listed = lists.idx_BHNW[0, h, n, : lists.num_BHN[0, h, n]].tolist()
            assert sorted(partial + full) == sorted(listed)
            assert all(blocks[h, n, :, j].all() for j in full)
            assert not any(blocks[h, n, :, j].all() for j in partial)


@pytest.mark.parametrize("changes", [{}, dict(share_heads=False, pointers=3, bands=2, beta=0.5),
                                     dict(gate=False, slope=False, subtract_zero=False, pointers=1)])
def test_bias_features_equal_the_formula(changes):
    """Angle addition, key tables, slope digits and constant against the definition, with every gradient."""
    T, H, D = 384, 2, 32
    module, tables = spectral_case(T, H, D, seed=0, **changes)
    q = torch.randn(1, T, H, D, dtype=torch.float64, requires_grad=True)
    coefficients, _ = module(q, tables())
    dense = coefficients.query_features() @ tables().key_TF.T
    ref = formula(module, q, T)
    assert relative_error(dense, ref) < 1e-10
    weight = torch.randn_like(ref)
    parameters = [q, *module.parameters()]
    grads = torch.autograd.grad((dense * weight).sum(), parameters)
    ref_grads = torch.autograd.grad((ref * weight).sum(), parameters)
    for mine, theirs in zip(grads, ref_grads, strict=True):
        assert relative_error(mine, theirs) < 1e-9


def test_slope_is_exact_at_a_million_in_bf16():
    """The digits carry a position exactly; one raw bf16 position would be off by up to 2,048 tokens."""
    T = 1_048_576
    shape = SpectralShape(1, 32, bands=1)
    key = PositionTables(shape.frequencies(), T)().key_TF
    assert torch.equal(key[:, 2:5].bfloat16().float(), key[:, 2:5])
    slope = torch.tensor([[3.3e-6]]).bfloat16()
    zero = torch.zeros(1, 1, 1)
    query = BiasCoefficients(zero, zero, slope.float(), zero[..., 0], None).query_features().bfloat16().double()
    j = torch.tensor([0, 1, 127, 128, 16_383, 16_384, 999_999, T - 1])
    got = (query[0] @ key[j].bfloat16().double().T)[0]
    assert torch.equal(got, -slope.double()[0] * j)


@pytest.mark.parametrize("layout", ["append", "fold"])
def test_augmented_attention_equals_added_bias(layout):
    T, H, D = 512, 2, 64
    tokens, lists = random_tokens(T, 1), random_lists(T // BLOCK, H, 3, 2)
    documents = Documents.of(tokens, DELIMITER)
    module, tables = spectral_case(T, H, D, seed=3)
    raw = [torch.randn(1, T, H, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    q, k, v = raw
    bias, _ = module(q, tables())
    q_aug, k_aug = augment(q, k, bias, SCALE, layout)
    assert q_aug.size(-1) == (D if layout == "fold" else D + 16)
    out, _ = pointer_attention(*(t.transpose(1, 2) for t in (q_aug, k_aug, v)), lists, documents, scale=SCALE,
                               backend="reference")
    content = torch.ones(D, dtype=torch.float64)
    if layout == "fold":  # 8 of the non-rotating dimensions of each half
        content[D // 2 - 8 : D // 2] = content[D - 8 :] = 0
    visible = dense_visible(lists, tokens, H)
    ref = dense_attention(*(t.transpose(1, 2) for t in (q * content, k, v)), visible, formula(module, q, T))
    parameters = [*raw, *module.parameters()]
    weight = torch.randn_like(ref)
    grads = torch.autograd.grad((out * weight).sum(), parameters, retain_graph=True)
    ref_grads = torch.autograd.grad((ref * weight).sum(), parameters)
    assert relative_error(out, ref) < 1e-10
    for mine, theirs in zip(grads, ref_grads, strict=True):
        if theirs.norm() > 1e-9:  # what a softmax cannot see has no gradient but rounding
            assert relative_error(mine, theirs) < 1e-8


def test_reference_with_bias_argument_equals_added_bias():
    """The score_mod implementation's CPU path."""
    T, H, D = 384, 2, 16
    tokens, lists = random_tokens(T, 4), random_lists(T // BLOCK, H, 3, 5)
    module, tables = spectral_case(T, H, D, seed=6)
    q, k, v = (torch.randn(1, T, H, D, dtype=torch.float64) for _ in range(3))
    bias, _ = module(q, tables())
    out, _ = pointer_attention(*(t.transpose(1, 2) for t in (q, k, v)), lists, Documents.of(tokens, DELIMITER), scale=SCALE,
                            backend="reference", bias=bias)
    ref = dense_attention(*(t.transpose(1, 2) for t in (q, k, v)), dense_visible(lists, tokens, H), formula(module, q, T))
    assert relative_error(out, ref) < 1e-10


@needs_cuda
@pytest.mark.parametrize("T,H,width,impl,backend", [
    (640, 3, 3, "plain", "flex"), (5 * 1408, 2, 20, "plain", "flex_standalone"), (2048, 2, 6, "fold", "flex"),
    (2048, 2, 6, "append", "flex"), (1152, 2, 4, "append", "flex_standalone"), (1152, 2, 4, "score_mod", "flex_standalone")])
def test_flex_equals_dense(T, H, width, impl, backend):
    """bf16 kernels against float64 dense attention: output, q, k, v and every coefficient of the bias."""
    torch.compiler.reset()
    D = 128
    tokens, lists = random_tokens(T, T), random_lists(T // BLOCK, H, width, T + 1)
    module, tables = spectral_case(T, H, D, seed=3, impl_dtype=torch.float32)
    raw = [torch.randn(1, T, H, D).bfloat16() for _ in range(3)]
    coefficients = [] if impl == "plain" else [c.detach() for c in module(raw[0].float(), tables())[0][:3]]
    cuda_lists, documents = BlockLists(*(t.cuda() for t in lists[:2])), Documents.of(tokens.cuda(), DELIMITER)
    cuda_tables = tables.cuda()()

    def with_constant(cos, sin, slope, tables):  # slope (i - j): the slope acts through the row's constant too
        return BiasCoefficients(cos, sin, slope, slope * torch.arange(T, device=slope.device), tables)

    def attend(q, k, v, *coefficients):
        bias = with_constant(*coefficients, cuda_tables) if coefficients else None
        if impl in ("fold", "append"):
            q, k = augment(q, k, bias, SCALE, impl)
            bias = None
        return pointer_attention(*(t.transpose(1, 2) for t in (q, k, v)), cuda_lists, documents, scale=SCALE,
                                 backend=backend, bias=bias)[0]

    compiled = torch.compile(attend, dynamic=False, fullgraph=backend == "flex")
    mine = [t.cuda().requires_grad_() for t in raw + coefficients]
    out = compiled(*mine)
    weight = torch.randn(out.shape).bfloat16()
    grads = torch.autograd.grad((out * weight.cuda()).sum(), mine)
    with torch.no_grad():  # the forward-only kernel is another one
        again = compiled(*mine)

    exact = [t.double().requires_grad_() for t in raw + coefficients]
    content = torch.ones(D, dtype=torch.float64)
    if impl == "fold":
        content[D // 2 - 8 : D // 2] = content[D - 8 :] = 0
    key = PositionTables(module.shape.frequencies(), T, torch.float64)().key_TF
    bias = with_constant(*exact[3:], None).query_features() @ key.T if coefficients else torch.zeros(1, H, T, T)
    bias.retain_grad() if coefficients else None
    q, k, v = (t.transpose(1, 2) for t in (exact[0] * content, *exact[1:3]))
    ref = dense_attention(q, k, v, dense_visible(lists, tokens, H), bias)
    (ref * weight.double()).sum().backward()
    errors = {name: relative_error(a, b) for name, a, b in zip(("out", "again", "q", "k", "v"), (out, again, *grads[:3]),
                                                               (ref, ref, *(t.grad for t in exact[:3])), strict=True)}
    # The gradient of a coefficient sums dS f over the keys, and dS sums to zero: with waves longer than the reach nearly
    # all of it cancels. The rounding of dS to bf16 is to be held against sum |dS f|, of which some 3 to 9 % remains.
    functions = (key[:, :6], key[:, 6:12], None)
    distance = (torch.arange(T)[:, None] - torch.arange(T)).double()
    for name, g, leaf, f in zip(("cos", "sin", "slope"), grads[3:], exact[3:], functions, strict=False):
        size = bias.grad.abs() @ f.abs() if f is not None else (bias.grad * distance).abs().sum(-1)
        errors[name] = 3 * ((g.double().cpu() - leaf.grad).norm() / size.norm()).item()
    print(f"{backend} {impl} T={T}: " + " ".join(f"{name} {e:.1e}" for name, e in errors.items()))
    assert max(errors.values()) < 1e-2


@needs_cuda
@pytest.mark.parametrize("T,H,width", [(640, 3, 3), (2048, 2, 6)])
def test_flex_visibility_and_log_sum_exp(T, H, width):
    torch.compiler.reset()
    tokens, lists = random_tokens(T, T), random_lists(T // BLOCK, H, width, T + 1)
    lists = lists._replace(seen_BHTw=pack_seen(torch.rand(1, H, T, width) < 0.6))
    raw = [torch.randn(1, H, T, 128).bfloat16() for _ in range(3)]
    weight, lse_weight = torch.randn(1, H, T, 128), torch.randn(1, H, T)
    results = []
    for backend, device, dtype in (("flex", "cuda", torch.bfloat16), ("reference", "cpu", torch.float64)):
        leaves = [x.to(device, dtype).requires_grad_() for x in raw]
        on, documents = BlockLists(*(x.to(device) for x in lists[:3])), Documents.of(tokens.to(device), DELIMITER)

        def attend(q, k, v, on=on, documents=documents, backend=backend):
            return pointer_attention(q, k, v, on, documents, scale=SCALE, backend=backend)

        out, lse = (torch.compile(attend, dynamic=False, fullgraph=True) if backend == "flex" else attend)(*leaves)
        lse = torch.where(lse.isinf(), 0, lse)
        objective = (out * weight.to(out)).sum() + (lse * lse_weight.to(lse)).sum()
        results.append([out, lse, *torch.autograd.grad(objective, leaves)])
    errors = [relative_error(a, b) for a, b in zip(*results, strict=True)]
    print(f"flex seen T={T}:", " ".join(f"{e:.1e}" for e in errors))
    assert max(errors) < 1e-2
