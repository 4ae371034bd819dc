"""Time a forward of the whole model over one long sequence, with the schedules at their end (widest windows, full radius).

    python bench/forward.py 65536 1048576                                        # arm A
    SPECTRAL_BIAS=1 SPECTRAL_USE_POINTER_MASK=1 python bench/forward.py 1048576  # arm C

Random weights and tokens (documents of 20k tokens on average); the head scores the last 128 tokens. Configured by the
variables of scoped_medium.py. Prints the best and the median of five forwards and the peak of allocated memory.
"""

import dataclasses
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import scoped_medium as scope


@torch.no_grad()
def main(lengths: list[int]) -> None:
    if not torch.cuda.is_available():
        sys.exit("error: bench/forward.py needs a CUDA GPU")
    try:
        config = scope.Config.from_environment()
    except scope.Stop as stop:
        sys.exit(f"error: {stop}")
    config = dataclasses.replace(config, train_seq_len=max(lengths))  # the position tables' length
    device = torch.device("cuda")
    model = scope.build_model(config, device).eval()
    backend, _, reason = scope.choose_backend(dataclasses.replace(config, num_iterations=0), device)
    for block in model.blocks:
        if block.attn is not None:
            block.attn.backend = backend
    print(f"arm {config.arm}, {torch.cuda.get_device_name()}, torch {torch.__version__}, {backend} ({reason})")
    for length in lengths:
        tokens = torch.randint(config.vocab_size, (length,), dtype=torch.int32, device=device)
        tokens[torch.rand(length, device=device) < 1 / 20_000] = config.doc_delimiter
        forward = torch.compile(model.score_end, dynamic=False, fullgraph=backend == "flex")
        seconds = []
        for attempt in range(7):
            torch.cuda.synchronize()
            if attempt == 2:
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            forward(tokens, scope.Schedule(config, 1, 1).context(tokens, False, backend), 128)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        timed = sorted(seconds[2:])
        print(f"{length:9,} tokens: best {timed[0]:.3f} s, median {timed[2]:.3f} s, {length / timed[2]:,.0f} tokens/s, "
              f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)


if __name__ == "__main__":
    main([int(length) for length in sys.argv[1:]] or [65_536])
