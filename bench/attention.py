"""Time one layer's attention on a CUDA GPU: what the lists, the pointers and each form of the spectral bias cost.

    python bench/attention.py [--tokens 65536] [--forward-tokens 1048576] [--json FILE]      (0 tokens: leave that part out)

bf16, B=1, H=8, head dim 128, random pointers in 36-block lists (16 local + 2 x 9 + 2 global), documents on, K=6 bands. The
median of several runs between CUDA events; bias prediction, list building and the mask are inside every time. TFLOP/s count
the listed blocks: 4 D per query and key forward, 2.5 times that for the backward.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.attention import BLOCK, Documents, pointer_attention
from model.attn_bias import (
    ListShape,
    PointerState,
    PositionTables,
    SpectralBias,
    SpectralShape,
    augment,
    pointer_lists,
    window_lists,
)

SCALE, H, D = 0.12, 8, 128
LISTS = ListShape(local_blocks=16, half_blocks=4, global_blocks=2)
VARIANTS = ("window", "pointers", "fold", "append", "score_mod")


def make_step(variant: str, T: int, spectral: SpectralBias, tables: PositionTables, backward: bool):
    """One attention of the variant as a closure without arguments, and the mean number of listed blocks."""
    generator = torch.Generator("cuda").manual_seed(T)
    tokens = torch.randint(0, 20_000, (T,), device="cuda", generator=generator)  # a document of 20k tokens on average
    documents = Documents.of(tokens, 0)
    q, k, v = (torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_(backward)
               for _ in range(3))
    grad = torch.randn(1, H, T, D, device="cuda", dtype=torch.bfloat16, generator=generator)
    random_delta = torch.rand(1, H, T, 2, device="cuda", generator=generator) * T
    state = PointerState(*(torch.tensor(x, dtype=torch.int32, device="cuda") for x in LISTS))
    window = torch.tensor(14, dtype=torch.int32, device="cuda")

    def attend(q, k, v):
        bias = None
        if variant == "window":
            lists = window_lists(documents, window, 14)
        else:
            lists = pointer_lists(random_delta, documents, state, LISTS)
        if variant in ("fold", "append", "score_mod"):
            bias, _ = spectral(q, tables())
            if variant != "score_mod":
                q, k = augment(q, k, bias, SCALE, variant)
                bias = None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        backend = "flex_standalone" if variant == "score_mod" else "flex"
        return pointer_attention(q, k, v, lists, documents, scale=SCALE, backend=backend, bias=bias), lists.num_BHN

    compiled = torch.compile(attend, dynamic=False, fullgraph=variant != "score_mod")

    def step():
        with torch.set_grad_enabled(backward):
            out, num = compiled(q, k, v)
            if backward:
                torch.autograd.grad(out, (q, k, v, *spectral.parameters()), grad, allow_unused=True)
        return num

    return step


def median_ms(step, repeats: int) -> float:
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--forward-tokens", type=int, default=1_048_576)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: bench/attention.py needs a CUDA GPU")
    shape = SpectralShape(H, D)
    spectral = SpectralBias(shape, torch.Generator().manual_seed(0)).cuda()
    torch.nn.init.normal_(spectral.w2, std=0.05)
    tables = PositionTables(shape, max(args.tokens, args.forward_tokens)).cuda()
    rows = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'variant':10} {'pass':17} {'tokens':>9} {'ms':>9} {'blocks':>7} {'TFLOP/s':>8} {'peak GiB':>9}")
    cells = [(v, args.tokens, backward) for backward in (True, False) for v in VARIANTS if args.tokens]
    cells += [(v, args.forward_tokens, False) for v in VARIANTS if args.forward_tokens and v != "score_mod"]
    for variant, T, backward in cells:
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            step = make_step(variant, T, spectral, tables, backward)
            blocks = step().float().mean().item()
            ms = median_ms(step, repeats=3 if variant == "score_mod" else 15)
        except Exception as error:  # one variant that a compiler refuses must not hide the others
            print(f"{variant:10} refused: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
            rows.append(dict(variant=variant, tokens=T, backward=backward, error=str(error)[:2000]))
            continue
        flops = 4 * D * H * T * blocks * BLOCK * (3.5 if backward else 1)
        row = dict(variant=variant, tokens=T, backward=backward, ms=ms, blocks=blocks, tflops=flops / ms / 1e9,
                   peak_gib=torch.cuda.max_memory_allocated() / 2**30)
        rows.append(row)
        print(f"{variant:10} {'forward+backward' if backward else 'forward':17} {T:9,} {ms:9.2f} {blocks:7.1f} "
              f"{row['tflops']:8.0f} {row['peak_gib']:9.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
