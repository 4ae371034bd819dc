"""The content pointers' search against double loops, its kernels against its plain code, and strict causality."""

import math

import pytest
import torch
from test_attention import DELIMITER, random_tokens

from model.attention import BLOCK, BlockLists, Documents, pointer_attention, unpack_seen
from model.selection import (
    MAX_LOG_ODDS,
    Claims,
    Found,
    admit,
    admit_plain,
    append_claims,
    ask,
    content_lists,
    far_end,
    odds_floor,
    search,
    search_plain,
)

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


def scalar(value):
    return torch.tensor(value, dtype=torch.int32, device=DEVICE)


def documents_of(N, seed, length):
    return Documents.of(random_tokens(N * BLOCK, seed, length).to(DEVICE), DELIMITER)


def on_cpu(values):
    return [x.cpu() for x in values]


def uniform(*shape, seed, levels=0):
    """In [0, 1); with `levels` on so few values that many are equal."""
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * levels).floor() / levels if levels else x


# ---------------------------------------------------------------------------------------------------------------------
# Choice of askers


def kernels():
    pytest.importorskip("triton")
    from model import selection_triton

    return selection_triton


def asking(block, before, slots, pacing):
    """The askers of one tile, given the tiles before it."""
    nth = [sorted(scores, reverse=True)[slots // 4 - 1] for scores in before]
    threshold, asks = sum(nth) / len(nth) if nth else -math.inf, []
    for x in range(BLOCK):
        if slots == BLOCK or len(asks) < slots and block[x] > threshold + pacing * max(0, len(asks) / slots - x / BLOCK):
            asks.append(x)
    return asks + [BLOCK] * (slots - len(asks))


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("slots,memory", [(16, 1), (32, 8), (64, 3), (128, 8)])
def test_ask_takes_the_first_above_the_recent_tiles(slots, memory, kernel):
    if kernel and slots == BLOCK:
        pytest.skip("all ask: no kernel")
    N = 11
    score = uniform(1, 2, N * BLOCK, seed=slots) * torch.linspace(1, 0.3, N * BLOCK)  # falling: the last tiles are not full
    pacing = 0.0 if slots == 16 else 0.3
    idx = (kernels().ask_tokens if kernel else ask)(score.to(DEVICE), slots, memory, pacing).cpu()
    for h in range(2):
        tiles = score[0, h].view(N, BLOCK).tolist()
        for n in range(N):
            assert idx[0, h, n].tolist() == asking(tiles[n], tiles[max(0, n - memory) : n], slots, pacing)
    assert slots == BLOCK or (idx == BLOCK).any()  # some slot is free


def test_a_tile_with_more_to_ask_than_those_before_leaves_slots_to_its_last_tokens():
    """Text that asks more than the text before it, and a question at its end that asks most."""
    generator = torch.Generator().manual_seed(0)
    score = 1.5 * torch.randn(1, 400, 9, BLOCK, generator=generator)
    score[:, :, 8] += 1.5
    score[:, :, 8, 110:118] = 5.0  # above the threshold, the mean of the 4th largest of 128, by about 2
    late = {pacing: ask(score.flatten(2).to(DEVICE), 16, pacing=pacing)[0, :, 8].cpu() for pacing in (0.0, 32.0)}
    asked = {pacing: ((at >= 110) & (at < 118)).any(-1).float().mean().item() for pacing, at in late.items()}
    assert asked[32.0] > 0.99 and asked[0.0] < 0.6


# ---------------------------------------------------------------------------------------------------------------------
# Search


def search_inputs(N, H, R, d, seed, document_length, integers=False):
    """Random ones whose scores matter: exp does not see all blocks alike. Integers: exact, with many equal scores."""
    generator = torch.Generator().manual_seed(seed)
    p, l = torch.randn(2, 1, N * BLOCK, H, d, generator=generator)  # noqa: E741
    if integers:
        p, l = p.round().clamp(-1, 1), l.round().clamp(-1, 1)  # noqa: E741
    return [p, l, ask(uniform(1, H, N * BLOCK, seed=seed), R, 2),
            *Documents.of(random_tokens(N * BLOCK, seed, document_length), DELIMITER)]


def loop_search(p, l, asks, doc, start, local, globals_):  # noqa: E741
    _, H, N, R = asks.shape
    p, l = p[0].double(), l[0].double()  # noqa: E741
    blocks, odds = (torch.full((2, *asks.shape), none, dtype=dtype) for none, dtype in ((-1, asks.dtype), (-math.inf, None)))
    for h in range(H):
        for n in range(N):
            for r in range(R):
                i = n * BLOCK + int(asks[0, h, n, r])
                if i == (n + 1) * BLOCK:
                    continue
                scores = {}
                for b in range(n):
                    tokens = [j for j in range(b * BLOCK, (b + 1) * BLOCK) if doc[j] == doc[i]]
                    if tokens:
                        scores[b] = (l[tokens, h] @ p[i, h]).max().item()
                far = [b for b in scores if start[n] + globals_ <= b <= n - local]
                for place, found in enumerate(sorted(far, key=lambda b: (-scores[b], b))[:2]):
                    rest = sum(math.exp(s) for b, s in scores.items() if b != found)
                    blocks[place, 0, h, n, r] = found
                    odds[place, 0, h, n, r] = min(scores[found] - math.log(rest), MAX_LOG_ODDS) if rest else MAX_LOG_ODDS
    return Found(blocks[0], odds[0], blocks[1], odds[1])


def assert_equal(found, other, **tolerance):
    """The same blocks; no odds where there is none; the odds up to rounding."""
    for block, odds, other_block, other_odds in zip(found[::2], found[1::2], other[::2], other[1::2], strict=True):
        assert torch.equal(block, other_block) and block.dtype == torch.int32  # equal scores too: the lowest block
        assert torch.equal(odds.isneginf(), block < 0) and odds.dtype == torch.float32
        assert torch.allclose(odds, other_odds, **tolerance)


CASES = {  # N, heads, R, d, mean document, local, globals: heads and tiles that do not fill a program
    "plain": (9, 1, 16, 16, 10**6, 2, 1),
    "documents inside blocks": (7, 2, 16, 16, 300, 1, 1),
    "short documents": (6, 1, 32, 16, 90, 1, 0),
    "wide": (12, 3, 16, 32, 900, 4, 2),
    "all ask": (5, 1, 128, 16, 400, 1, 0),
    "nothing far": (4, 1, 16, 16, 500, 9, 0),
}


@pytest.mark.skipif(CUDA, reason="the oracle is checked on the CPU")
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_search_against_double_loops(name, integers):
    N, H, R, d, length, local, globals_ = CASES[name]
    inputs = search_inputs(N, H, R, d, seed=N + R, document_length=length, integers=integers)
    found = search(inputs[0].double(), inputs[1].double(), inputs[2], Documents(*inputs[3:]), scalar(local),
                   scalar(globals_))
    loop = loop_search(*inputs, local, globals_)
    assert_equal(found, loop, atol=1e-5)
    some, two = loop.block_BHNR >= 0, loop.second_BHNR >= 0
    assert some.any() == two.any() == (some & ~two).any() == (name != "nothing far")


KERNEL_CASES = [  # N, heads, R, d, mean document, local, globals, rows, columns
    (7, 2, 32, 32, 10**6, 1, 0, 128, 64),  # four tiles a program, N no multiple of it
    (12, 1, 16, 16, 10**6, 2, 1, 128, 64),
    (9, 1, 128, 16, 10**6, 3, 1, 256, 64),
    (13, 3, 32, 16, 700, 1, 1, 128, 128),
    (11, 1, 32, 64, 300, 2, 2, 256, 32),
    (14, 1, 128, 32, 900, 4, 0, 256, 64),
    (5, 1, 16, 16, 60, 1, 0, 128, 64),
    (21, 1, 16, 16, 10**6, 4, 1, 128, 128),
    (37, 1, 16, 16, 10**6, 1, 0, 128, 64),  # many groups without masks
    (1, 1, 16, 16, 300, 1, 0, 128, 64),
]


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_search_kernel_equals_the_plain_one(case, integers):
    N, H, R, d, length, local, globals_, rows, columns = case
    p, l, *rest = search_inputs(N, H, R, d, sum(case[:4]), length, integers)  # noqa: E741
    inputs = [p.to(DEVICE, DTYPE), l.to(DEVICE, DTYPE), *(x.to(DEVICE) for x in rest), scalar(local), scalar(globals_)]
    search_blocks, tiling = kernels().search_blocks, kernels().SearchTiling(rows, columns, 8, 2, 128)
    found = on_cpu(search_blocks(*inputs, MAX_LOG_ODDS, tiling))
    assert_equal(found, on_cpu(search_plain(*inputs)), atol=1e-4)
    again = on_cpu(search_blocks(*inputs, MAX_LOG_ODDS, tiling))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("N,R,opens,local,globals_",
                         [(16, 16, 4 * BLOCK + 60, 1, 0), (8, 128, 0, 0, 0), (16, 32, 8 * BLOCK, 0, 3)])
def test_search_kernel_where_its_masks_end(N, R, opens, local, globals_):
    """The last block that needs a mask is the first of a group: the rest of the group does not."""
    p, l, asks, *_ = search_inputs(N, 1, R, 16, 7, 10**6)  # noqa: E741
    documents = Documents.of(torch.where(torch.arange(N * BLOCK) == opens, DELIMITER, 0), DELIMITER)
    inputs = [p.to(DEVICE, DTYPE), l.to(DEVICE, DTYPE), *(x.to(DEVICE) for x in (asks, *documents)),
              scalar(local), scalar(globals_)]
    kernel = on_cpu(kernels().search_blocks(*inputs, MAX_LOG_ODDS, kernels().SEARCH_SMALL))
    assert_equal(kernel, on_cpu(search_plain(*inputs)), atol=1e-4)


def test_search_kernel_rounds_alike_whatever_comes_later():
    """Tiles share a program: a document that opens in a later one must not change a digit of what an earlier one finds."""
    N, R = 48, 16
    p, l, asks, *documents = (x.to(DEVICE) for x in search_inputs(N, 1, R, 16, 7, 10**6))  # noqa: E741
    doc = documents[0]
    t = 45 * BLOCK + 50
    later = torch.arange(N * BLOCK, device=DEVICE) >= t
    tokens = torch.where(later & (torch.arange(N * BLOCK, device=DEVICE) % 100 == 0), DELIMITER, 0)

    def found(p, l, documents):  # noqa: E741
        return kernels().search_blocks(p.to(DTYPE), l.to(DTYPE), asks, *documents, scalar(2), scalar(1),
                                       MAX_LOG_ODDS, kernels().SEARCH_SMALL)

    p = p / 4  # many blocks of like weight, whose sum has digits to lose
    before = found(p, l, documents)
    p, l = (torch.where(later[:, None, None], -x, x) for x in (p, l))  # noqa: E741
    after = found(p, l, Documents.of(tokens, DELIMITER))
    assert doc[0] == doc[-1] and Documents.of(tokens, DELIMITER).id_T[-1] > 2
    early = torch.arange(N, device=DEVICE)[:, None] * BLOCK + asks < t
    assert all(torch.equal(a[early], b[early]) and not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (before[0][early] >= 0).sum() > 10 * R


@pytest.mark.parametrize("scale", [0.0, 1e-3, 40.0, 1e4])
def test_search_kernel_takes_any_scale(scale):
    """Scores of 10^9 overflow no exponential, and near blocks far above the best one cost no digits."""
    p, l, *rest = search_inputs(9, 1, 16, 16, 3, 10**6)  # noqa: E741
    inputs = [(scale * p).to(DEVICE, DTYPE), l.to(DEVICE, DTYPE), *(x.to(DEVICE) for x in rest), scalar(2), scalar(1)]
    found = Found(*on_cpu(kernels().search_blocks(*inputs, MAX_LOG_ODDS)))
    assert_equal(found, on_cpu(search_plain(*inputs)), rtol=1e-5, atol=1e-4)
    two = found.second_BHNR >= 0
    assert two.any() and (found.log_odds_BHNR[two] < -5).any() == (scale > 1)  # a near block is far above all far ones


# ---------------------------------------------------------------------------------------------------------------------
# Admission and lists


def loop_admit(found, asks, slots, rank, pacing, memory, floors, lasts):
    """One head: (claims [(block, time)], tokens refused) of every tile."""
    nths, out = [], []
    tiles = zip(*(t.tolist() for t in (*found, asks)), floors, lasts, strict=True)
    for blocks, odds, seconds, second_odds, xs, floor, last in tiles:
        recent = [v for v in nths[-memory:] if v > -math.inf]
        threshold = max(floor, sum(recent) / len(recent) if recent else -math.inf)
        claims, takers, refused, highest = [], 0, 0, {}
        for b, u, second, second_u, x in zip(blocks, odds, seconds, second_odds, xs, strict=True):
            if b < 0:
                continue
            highest[b] = max(u, highest.get(b, -math.inf))
            listed = [c for c, _ in claims]
            if b in listed:
                b, u = second, second_u
            if b < 0 or b in listed or u <= threshold + pacing * (takers / rank - x / BLOCK) or u <= floor:
                continue
            if len(claims) == slots:
                refused += 1
                continue
            takers += 1
            claims.append((b, x))
            if b + 1 <= last and len(claims) < slots and b + 1 not in [c for c, _ in claims]:
                claims.append((b + 1, x))
        best = sorted(highest.values(), reverse=True)
        nths.append(best[rank - 1] if len(best) >= rank else -math.inf)
        out.append((claims, refused))
    return out


def random_found(N, H, R, seed, blocks=9):
    """Found blocks as a search would leave them: unused slots at the end, some askers without a block."""
    generator = torch.Generator().manual_seed(seed)
    asks = ask(uniform(1, H, N * BLOCK, seed=seed), R, 2)
    block = torch.randint(-1, blocks, asks.shape, generator=generator).int().masked_fill(asks == BLOCK, -1)
    odds = (2 * torch.randn(asks.shape, generator=generator)).masked_fill(block < 0, -math.inf)
    second = (block + torch.randint(1, max(blocks, 2), asks.shape, generator=generator).int()) % blocks
    alone = (block < 0) | (second == block) | (torch.rand(asks.shape, generator=generator) < 0.1)
    second, second_odds = second.masked_fill(alone, -1), odds - torch.rand(asks.shape, generator=generator)
    found = Found(block, odds, second, second_odds.masked_fill(alone, -math.inf))
    return Found(*(x.to(DEVICE) for x in found)), asks.to(DEVICE)


ADMISSIONS = [(9, 2, 16, 4, 3, 2.0, 2, -math.inf), (7, 1, 32, 16, 12, 2.0, 8, -math.inf), (12, 3, 16, 8, 6, 0.0, 3, 0.5),
              (5, 1, 64, 2, 1, 6.0, 8, -1.0), (3, 1, 128, 32, 24, 2.0, 8, -math.inf), (4, 1, 16, 4, 20, 2.0, 8, 0.0),
              (3, 1, 16, 1, 1, 2.0, 1, math.inf)]


@pytest.mark.parametrize("follow", [None, -1, 20])
@pytest.mark.parametrize("case", ADMISSIONS)
def test_admission_against_a_loop(case, follow):
    N, H, R, slots, rank, pacing, memory, floor = case
    found, asks = random_found(N, H, R, seed=N, blocks=2 * rank)
    floor_N = floor - 0.3 * torch.arange(N, device=DEVICE)
    last_N = None if follow is None else torch.arange(N, device=DEVICE, dtype=torch.int32) + follow
    claims, refused = admit(found, asks, slots, rank, pacing, memory, floor_N, last_N)
    assert [x.dtype for x in (*claims, refused)] == [torch.int32] * 4
    for h in range(H):
        rows = loop_admit(Found(*(x[0, h].cpu() for x in found)), asks[0, h].cpu(), slots, rank, pacing, memory,
                          floor_N.tolist(), [-1] * N if follow is None else last_N.tolist())
        for n, (row, left_out) in enumerate(rows):
            assert refused[0, h, n] == left_out
            num, block, time = (x[0, h, n].cpu().tolist() for x in claims)
            assert num == len(row) <= slots and list(zip(block, time, strict=True))[:num] == row
            assert block[num:] == [0] * (slots - num) and time[num:] == [BLOCK] * (slots - num)
    assert (claims.num_BHN > 0).any() == (floor < math.inf)
    assert (refused > 0).any() or case != ADMISSIONS[0]


@pytest.mark.parametrize("case", ADMISSIONS)
def test_admission_kernel_equals_the_plain_one(case):
    N, H, R, slots, rank, pacing, memory, floor = case
    found, asks = random_found(N, H, R, seed=N + 50, blocks=2 * rank)
    tile_N = torch.arange(N, device=DEVICE, dtype=torch.int32)
    rule = (floor - 0.3 * tile_N, tile_N + N // 2, slots, rank, pacing, memory)
    kernel, plain = kernels().admit_claims(*found, asks, *rule), admit_plain(*found, asks, *rule)
    assert all(torch.equal(a, b) for a, b in zip(kernel, plain, strict=True))


def test_weak_finds_leave_slots_for_a_sure_one():
    """The first tile has no threshold: what is hardly over its floor must not use up the slots, two a claim, either."""
    x = torch.arange(16, dtype=torch.int32)
    found = [2 * x, torch.full((16,), 0.6), torch.full((16,), -1, dtype=torch.int32), torch.full((16,), -math.inf)]
    found[1][15] = 1.5
    found = Found(*(t.expand(1, 1, 1, 16).to(DEVICE) for t in found))
    floor_N, last_N = torch.zeros(1, device=DEVICE), torch.full((1,), 99, device=DEVICE, dtype=torch.int32)
    for pacing, sure in ((0.0, False), (4.0, True)):
        claims, _ = admit(found, 8 * x.expand(1, 1, 1, 16).to(DEVICE), 16, 6, pacing, 8, floor_N, last_N)
        assert (claims.block_BHNW == 30).any() == sure and claims.num_BHN.item() == 16


def test_a_key_in_two_places_is_read_in_both():
    """Three askers want it: the first claims its better place, the second the other, and the third finds both listed."""
    N, x = 12, torch.tensor([3, 50, 90])
    p, l = torch.zeros(2, 1, N * BLOCK, 1, 16)  # noqa: E741
    p[0, 11 * BLOCK + x, 0, 0], l[0, [2 * BLOCK + 7, 6 * BLOCK + 9], 0, 0] = 5.0, torch.tensor([1.0, 1.2])
    asks = torch.full((1, 1, N, 16), BLOCK, dtype=torch.int32)
    asks[0, 0, 11, :3] = x
    documents = Documents.of(torch.ones(N * BLOCK, dtype=torch.int32, device=DEVICE), DELIMITER)
    found = search(p.to(DEVICE, DTYPE), l.to(DEVICE, DTYPE), asks.to(DEVICE), documents, scalar(2), scalar(0))
    for last, claimed in ((None, [(6, 3), (2, 50)]), (9, [(6, 3), (7, 3), (2, 50), (3, 50)])):
        last_N = None if last is None else torch.full((N,), last, device=DEVICE, dtype=torch.int32)
        claims, refused = admit(found, asks.to(DEVICE), 8, 3, last_N=last_N)
        num, block, time = (x[0, 0, 11].tolist() for x in claims)
        assert list(zip(block, time, strict=True))[:num] == claimed and refused[0, 0, 11] == 0


def random_claims(N, Hp, W, documents, local, globals_, seed):
    """Claims as an admission leaves them: distinct far blocks, in ascending time."""
    generator, start = torch.Generator().manual_seed(seed), documents.start_block_N.tolist()
    num, block, time = torch.zeros(1, Hp, N).int(), torch.zeros(1, Hp, N, W).int(), torch.full((1, Hp, N, W), BLOCK).int()
    for h in range(Hp):
        for n in range(N):
            far = torch.arange(start[n] + globals_, max(n - local, start[n] + globals_ - 1) + 1)
            far = far[torch.randperm(len(far), generator=generator)][: int(torch.randint(W + 1, (1,), generator=generator))]
            num[0, h, n] = len(far)
            block[0, h, n, : len(far)] = far
            time[0, h, n, : len(far)] = torch.randperm(BLOCK, generator=generator)[: len(far)].sort().values
    return Claims(num, block, time)


LISTS = [  # N, pointer heads, heads, W, mean document, local, globals, window, slots for the three
    (12, 2, 3, 4, 10**6, 2, 1, 5, 3, 1, 6), (9, 1, 1, 8, 500, 1, 2, 1, 1, 2, 1), (5, 3, 4, 16, 300, 4, 0, 2, 4, 0, 2),
    (7, 1, 4, 4, 200, 0, 9, 0, 2, 2, 3), (60, 1, 2, 32, 10**6, 3, 2, 14, 3, 2, 14), (40, 2, 3, 2, 10**6, 9, 1, 20, 4, 1, 14)]


def loop_lists(claims, start, h, n, local, globals_, window, local_slots, global_slots, window_slots, readers):
    """[(block, seen from position)] of one query block."""
    Hp = claims.num_BHN.size(1)
    num, block, time = (x[0, h % Hp, n].tolist() for x in claims)
    claimed = list(zip(block[:num], time[:num], strict=True))
    if h >= Hp:
        row = [(b, 0) for b in range(n, n - min(max(window, 1), window_slots), -1) if b >= start[n]]
        return row + [(b, t) for b, t in claimed if h < readers and (b, 0) not in row]
    row = [(b, 0) for b in range(n, n - min(max(local, 1), local_slots), -1) if b >= start[n]]
    anchors = range(start[n], start[n] + min(globals_, global_slots))
    row += [(b, 0) for b in anchors if b <= n and (b, 0) not in row]
    return row + claimed


@pytest.mark.parametrize("readers", [0, 2, "all"])
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("case", LISTS)
def test_lists_against_a_loop(case, kernel, readers):
    N, Hp, H, W, length, local, globals_, window, *slots = case
    readers = H if readers == "all" else min(readers, H)
    local_slots, global_slots, window_slots = slots
    documents = documents_of(N, N, length)
    reach = min(max(local, 1), local_slots), min(globals_, global_slots)
    claims = random_claims(N, Hp, W, documents, *reach, seed=N)
    inputs = [*(x.to(DEVICE) for x in claims), documents.start_block_N, scalar(local), scalar(globals_),
              scalar(window)]
    if kernel:
        lists = BlockLists(*kernels().write_lists(*inputs, *slots, H, readers))
    else:
        lists = content_lists(Claims(*inputs[:3]), documents, *inputs[4:], *slots, H, readers)
    width = min(max(local_slots + global_slots + W, window_slots + W * (readers > Hp)), N)
    assert lists.idx_BHNW.shape == (1, H, N, width) and lists.seen_BHTw.shape == (1, H, N * BLOCK, -(-width // 32))
    seen = unpack_seen(lists.seen_BHTw, width).view(1, H, N, BLOCK, width).cpu()
    start = documents.start_block_N.tolist()
    for h in range(H):
        for n in range(N):
            num, row = int(lists.num_BHN[0, h, n]), loop_lists(claims, start, h, n, local, globals_, window, *slots, readers)
            assert lists.idx_BHNW[0, h, n, :num].tolist() == [b for b, _ in row] and len(dict(row)) == num
            since = torch.tensor([t for _, t in row])
            assert torch.equal(seen[0, h, n, :, :num], torch.arange(BLOCK)[:, None] >= since)
            assert not seen[0, h, n, :, num:].any()


@pytest.mark.skipif(not CUDA, reason="an hour on the CPU")
@pytest.mark.parametrize("R", [16, 128])
def test_a_million_tokens_are_searched_like_a_few(R):
    """Some tiles of them, early, late and the last, each against all scores of its own."""
    N, H, d = 8192, 2, 32
    generator = torch.Generator(DEVICE).manual_seed(R)
    p, l = (torch.randn(1, N * BLOCK, H, d, device=DEVICE, generator=generator).to(DTYPE) for _ in range(2))  # noqa: E741
    score = torch.rand(1, H, N * BLOCK, device=DEVICE, generator=generator)
    asks = ask(score, R)
    documents = Documents.of(torch.ones(N * BLOCK, device=DEVICE, dtype=torch.int32), DELIMITER)
    found = search(p, l, asks, documents, scalar(4), scalar(1))
    for n in (5, 1000, 4097, 8190, 8191):
        for h in range(H):
            at = asks[0, h, n][asks[0, h, n] < BLOCK]
            s = p[0, n * BLOCK + at.long(), h].float() @ l[0, : n * BLOCK, h].float().T
            s = s.unflatten(1, (n, BLOCK)).amax(-1)
            best = s[:, 1 : n - 3].topk(min(2, n - 4))
            for place, (value, index) in enumerate(zip(best.values.unbind(-1), best.indices.unbind(-1), strict=True)):
                odds = value - s.scatter(1, index[:, None] + 1, -math.inf).logsumexp(-1)
                block, found_odds = (x[0, h, n, : len(at)] for x in found[2 * place :][:2])
                assert (block == index + 1).float().mean() > 0.98  # near ties round apart
                torch.testing.assert_close(found_odds, odds, rtol=0, atol=2e-3)
            assert n > 5 or (found.second_BHNR[0, h, n] == -1).all()


# ---------------------------------------------------------------------------------------------------------------------
# The chain


def select(p, l, score, documents, heads=3):  # noqa: E741
    local, globals_ = scalar(2), scalar(1)
    asks = ask(score, 16, 2)
    found = search(p, l, asks, documents, local, globals_)
    claims, _ = admit(found, asks, 4, 3, memory=2, floor_N=odds_floor(documents, -1.0))
    return claims, content_lists(claims, documents, local, globals_, scalar(3), 2, 1, 3, heads)


def chain_inputs(N, H, seed, length=700):
    generator = torch.Generator().manual_seed(seed)
    p, l = torch.randn(2, 1, N * BLOCK, H, 16, generator=generator).to(DEVICE, DTYPE)  # noqa: E741
    return [p, l, uniform(1, H, N * BLOCK, seed=seed).to(DEVICE)], random_tokens(N * BLOCK, seed, length)


def test_nothing_before_a_changed_token_moves():
    """What tokens before t may read, slot by slot; the chain's lists in use, too."""
    N, H = 12, 2
    inputs, tokens = chain_inputs(N, H, 1)
    other, other_tokens = chain_inputs(N, H, 5, length=200)
    q, k, v = (torch.randn(1, 3, N * BLOCK, 16, device=DEVICE, dtype=torch.float32) for _ in range(3))

    def readable(inputs, tokens, k):
        documents = Documents.of(tokens.to(DEVICE), DELIMITER)
        claims, lists = select(*inputs, documents)
        assert (claims.num_BHN <= 4).all() and (lists.num_BHN <= lists.idx_BHNW.size(-1)).all()
        out, _ = pointer_attention(q, k, v, lists, documents, scale=0.2, backend="reference")
        width = lists.idx_BHNW.size(-1)
        seen = unpack_seen(lists.seen_BHTw, width)
        listed = (torch.arange(width, device=DEVICE) < lists.num_BHN[..., None]).repeat_interleave(BLOCK, 2)
        block = torch.where(seen & listed, lists.idx_BHNW.repeat_interleave(BLOCK, 2), N)
        return block.sort(-1).values, out, claims

    before, out, claims = readable(inputs, tokens, k)
    assert (claims.num_BHN > 0).sum() > N // 2
    for t in (4 * BLOCK, 7 * BLOCK + 1, 8 * BLOCK + 77, 10 * BLOCK - 1):
        later = torch.arange(N * BLOCK) >= t
        on = later.to(DEVICE)
        mixed = [torch.where(on[:, None, None], b, a) for a, b in zip(inputs[:2], other[:2], strict=True)]
        mixed.append(torch.where(on, other[2], inputs[2]))
        after, new_out, _ = readable(mixed, torch.where(later, other_tokens, tokens), torch.where(on[:, None], -k, k))
        assert torch.equal(before[:, :, :t], after[:, :, :t]) and torch.equal(out[:, :, :t], new_out[:, :, :t])
        assert not torch.equal(before[:, :, t:], after[:, :, t:])


def test_the_chain_compiles_whole():
    """One graph, no break; with the schedule's values as data."""
    inputs, tokens = chain_inputs(6, 1, 2)
    documents = Documents.of(tokens.to(DEVICE), DELIMITER)
    plain = select(*inputs, documents)
    compiled = torch.compile(select, fullgraph=True, backend="inductor" if CUDA else "aot_eager")(*inputs, documents)
    for a, b in zip((*plain[0], *plain[1][:3]), (*compiled[0], *compiled[1][:3]), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_no_gradient_asks_for_one():
    (p, l, score), tokens = chain_inputs(3, 1, 2)  # noqa: E741
    _, lists = select(p.requires_grad_(), l, score, Documents.of(tokens.to(DEVICE), DELIMITER))
    assert not any(x.requires_grad for x in lists[:3])


@pytest.mark.skipif(CUDA, reason="the operators' contract is checked on the CPU")
def test_operators_keep_the_compilers_contract():
    (p, l, score), tokens = chain_inputs(5, 2, 3)  # noqa: E741
    documents, ops = Documents.of(tokens, DELIMITER), torch.ops.scope
    asks, local, globals_ = ask(score, 16), scalar(1), scalar(1)
    found = search(p, l, asks, documents, local, globals_)
    claims, _ = admit(found, asks, 4, 3)
    calls = [(ops.ask, (score, 16, 8, 2.0)), (ops.search, (p, l, asks, *documents, local, globals_)),
             (ops.admit, (*found, asks, odds_floor(documents, 0.0), far_end(documents, local), 4, 3, 2.0, 8)),
             (ops.content_lists, (*claims, documents.start_block_N, local, globals_, local, 2, 1, 2, 3, True))]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments)


def test_refusals():
    (p, l, score), tokens = chain_inputs(2, 1, 4)  # noqa: E741
    documents, one = Documents.of(tokens.to(DEVICE), DELIMITER), scalar(1)
    asks = ask(score, 16)
    found = search(p, l, asks, documents, one, one)
    for wrong, message in [
            (lambda: ask(score, 8), "8 slots of askers are none of 16, 32, 64, 128"),
            (lambda: ask(score[..., :-1], 16), "255 tokens are not a multiple of the block of 128"),
            (lambda: search(p[..., :8], l[..., :8], asks, documents, one, one), "last dimension one of 16, 32, 64"),
            (lambda: search(p, l[:, :BLOCK], asks, documents, one, one), "must have one shape"),
            (lambda: search(p, l, asks[:, :, :1], documents, one, one), r"ask is \[1, 1, 1, 16\]"),
            (lambda: admit(found, asks, 12, 9), "12 slots for claims are no power of two of at most 32"),
            (lambda: admit(found, asks, 64, 9), "64 slots"),
            (lambda: admit(found, asks, 16, 0), "rank 0"),
            (lambda: admit(found, asks[:, :, :1], 16, 12), "must have one shape"),
            (lambda: content_lists(admit(found, asks, 4, 3)[0], documents, one, one, one, 2, 1, 1, 0), "0 attention heads"),
            (lambda: content_lists(admit(found, asks, 4, 3)[0], documents, one, one, one, 0, 1, 1, 1), "0 local")]:
        with pytest.raises(ValueError, match=message):
            wrong()


@pytest.mark.parametrize("N,H,Hp,W,C", [(7, 3, 2, 4, 4), (12, 2, 2, 3, 8), (5, 1, 1, 5, 2), (40, 2, 1, 20, 16)])
def test_claims_behind_other_lists_against_loops(N, H, Hp, W, C):
    generator = torch.Generator().manual_seed(N)

    def draw(high, *shape):
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)

    idx = torch.stack([torch.randperm(N, generator=generator)[:W] for _ in range(H * N)]).view(1, H, N, W).int()
    block = torch.stack([torch.randperm(N, generator=generator)[:C] for _ in range(Hp * N)]).view(1, Hp, N, -1).int()
    C = block.size(-1)
    lists, claims = BlockLists(draw(W + 1, 1, H, N), idx), Claims(draw(C + 1, 1, Hp, N), block, draw(BLOCK, 1, Hp, N, C))
    found = append_claims(BlockLists(*(x.to(DEVICE) for x in lists[:2])), Claims(*(x.to(DEVICE) for x in claims)))
    num, idx, seen = on_cpu(found[:3])
    assert idx.size(-1) == min(W + C, N)
    seen = unpack_seen(seen, idx.size(-1)).view(1, H, N, BLOCK, -1)
    for h in range(H):
        for n in range(N):
            old = lists.idx_BHNW[0, h, n, : lists.num_BHN[0, h, n]].tolist()
            times = dict.fromkeys(old, 0)
            for slot in range(claims.num_BHN[0, h, n] if h < Hp else 0):
                times.setdefault(int(block[0, h, n, slot]), int(claims.time_BHNW[0, h, n, slot]))
            row = idx[0, h, n, : num[0, h, n]].tolist()
            assert row == list(times)
            for slot, time in enumerate(times.values()):
                assert seen[0, h, n, :, slot].tolist() == [x >= time for x in range(BLOCK)]


def test_appending_keeps_the_compilers_contract():
    lists = BlockLists(torch.ones(1, 2, 6, dtype=torch.int32), torch.zeros(1, 2, 6, 3, dtype=torch.int32))
    claims = (torch.ones(1, 1, 6, dtype=torch.int32), torch.ones(1, 1, 6, 2, dtype=torch.int32),
              torch.full((1, 1, 6, 2), 5, dtype=torch.int32))
    torch.library.opcheck(torch.ops.scope.append_claims.default, (*(x.to(DEVICE) for x in (*lists[:2], *claims)),))
