"""Time a forward of the whole model over one long sequence, the loss of every position included.

    python bench/forward.py 65536 1048576                                        # arm A
    SPECTRAL_BIAS=1 SPECTRAL_USE_POINTER_MASK=1 python bench/forward.py 1048576  # arm C
    python bench/forward.py 1048576 --json forward.json

Random weights and tokens (documents of 20k tokens on average), the schedules at their end (widest windows, full radius); the
mean cross-entropy over all positions, computed in chunks, so that no tensor of [tokens, vocabulary] exists. Configured by the
variables of scoped_medium.py. Prints the best and the median of five forwards and the peak of allocated memory.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import scoped_medium as scope

WARM_UPS, FORWARDS = 2, 5
DOCUMENT_TOKENS = 20_000


@torch.no_grad()
def measure(model: scope.GPT, config: scope.Config, backend: str, length: int) -> dict:
    """Seconds of each forward over `length` tokens, their loss, and the peak memory."""
    device = model.head_w.device
    generator = torch.Generator(device).manual_seed(length)
    tokens = torch.randint(config.vocab_size, (length + 1,), dtype=torch.int32, device=device, generator=generator)
    tokens[torch.rand(length + 1, device=device, generator=generator) < 1 / DOCUMENT_TOKENS] = config.doc_delimiter
    forward = torch.compile(model, dynamic=False, fullgraph=backend in ("flex", "triton"))
    seconds = []
    for attempt in range(WARM_UPS + FORWARDS):
        torch.cuda.synchronize()
        if attempt == WARM_UPS:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        context = scope.Schedule(config, 1_000_000, 1_000_000).context(tokens[:-1], False, backend)
        loss = forward(tokens[:-1], tokens[1:].long(), context).loss
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return dict(tokens=length, seconds=seconds[WARM_UPS:], loss=loss.item(),
                peak_gib=torch.cuda.max_memory_allocated() / 2**30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("tokens", type=int, nargs="*", default=[65_536])
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"{args.json}: its directory does not exist")
    uneven = [length for length in args.tokens if length <= 0 or length % scope.BLOCK]
    if uneven:
        parser.error(f"{uneven[0]} tokens are not a positive multiple of the block of {scope.BLOCK}")
    if not torch.cuda.is_available():
        sys.exit("error: bench/forward.py needs a CUDA GPU")
    try:
        config = scope.Config.from_environment()
        config = dataclasses.replace(config, train_seq_len=max(args.tokens), num_iterations=0)  # the position tables' length
        device = torch.device("cuda")
        backend, _, reason = scope.choose_backend(config, device)
        model = scope.build_model(config, device).eval()
    except scope.Stop as stop:
        sys.exit(f"error: {stop}")
    model.use_backend(backend)
    print(f"arm {config.arm}, {torch.cuda.get_device_name()}, torch {torch.__version__}, {backend} ({reason})")
    rows = []
    for length in args.tokens:
        row = measure(model, config, backend, length) | dict(arm=config.arm, backend=backend)
        rows.append(row)
        median = statistics.median(row["seconds"])
        print(f"{length:9,} tokens: best {min(row['seconds']):.3f} s, median {median:.3f} s, {length / median:,.0f} tokens/s, "
              f"loss {row['loss']:.4f}, peak {row['peak_gib']:.1f} GiB", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
