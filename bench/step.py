"""Where an optimizer step goes: device time by component of the model, beside the least that arithmetic and memory allow.

    python bench/step.py --json step_A.json                                                          # arm A
    SPECTRAL_BIAS=1 SPECTRAL_USE_POINTER_MASK=1 python bench/step.py --json step_C.json              # arm C
    SPECTRAL_USE_POINTER_MASK=1 python bench/step.py --json step_content.json                        # pointers that search
    python bench/plot_step.py step_A.json step_C.json                                                # side by side

Configured by the variables of scoped_medium.py; random tokens, documents of 20k tokens on average, the schedules at
`--progress` (1: widest windows, full radius). One step is profiled, some more are timed without the profiler.

A kernel belongs to the component whose source lines it was compiled from: operators of ours and matrix products by the
operator that launched them, fused kernels by the compiler's record of their origins; the time of one that fuses several
components is divided by their numbers of origins. `search` is what pointers that search add: blend, landmarks and their
losses, gates, askers, search, admission, lists of claims, what copies say. `idle` is what the step lasts longer than its
kernels.

The floor is the larger of FLOPs / 790 TFLOP/s (twice that in FP8) and bytes / 4.3 TB/s, each operand moved once, and counts
what the computation needs, not what the kernels do: 15 activations a layer for norms, rotation and residuals, say, as many
as perfect fusion would move. What it leaves out of a component is named below the table.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import scoped_medium as scope
from model.attention import BLOCK
from model.selection import list_width

ROOT = Path(__file__).resolve().parents[1]
MATMUL_FLOPS, FP8_FLOPS, COPY_BYTES = 790e12, 2 * 790e12, 4.3e12  # per second, as measured on an H200
COMPONENTS = ("embedding", "attention projections", "norm, rotary, residual", "bias prediction", "search", "lists",
              "attention forward", "attention backward", "MLP", "head and loss", "gradients", "Muon", "Adam", "rest")
GLUE = "norm, rotary, residual"
SEARCH_OPERATORS = r"scope::(ask|search|admit|content_lists|append_claims)$"
UNCOUNTED = {"search": "the maxima over its scores and the admission, which goes token by token"}
LEAST_SHARE = 0.2  # of a fused kernel's origins, below which a component gets none of its time
DOCUMENT_TOKENS, TIMED_STEPS, SCHEDULE_STEPS = 20_000, 5, 1000

# ---------------------------------------------------------------------------------------------------------------------
# From a source line to a component


@functools.cache
def qualified_names(path: Path) -> dict[int, str]:
    """The innermost function or class of every line of a Python file."""
    names = {}

    def visit(node, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{prefix}.{child.name}" if prefix else child.name
                names.update(dict.fromkeys(range(child.lineno, child.end_lineno + 1), inner))
            visit(child, inner)

    visit(ast.parse(path.read_text()), "")
    return names


@functools.cache
def source_line(path: Path, number: int) -> str:
    return path.read_text().splitlines()[number - 1]


def component_of_line(path: Path, number: int, backward: bool) -> str:
    """The component that one line of this repository works for."""
    name, code = qualified_names(path).get(number, ""), source_line(path, number)
    if path.name == "content.py" or path.name.startswith("selection") or name.startswith("Attention.point"):
        return GLUE if name.startswith("Heads") else "search"
    if re.search(r"lists|prepare|Documents|Schedule", name):
        return "lists"
    if path.name.startswith("attention"):
        return "attention backward" if backward else "attention forward"
    if path.name == "attn_bias.py":  # two of its functions serve models without a bias
        return GLUE if name in ("read_codes", "length_scale") else "bias prediction"
    if re.match(r"Rotary|norm\b|Block\b", name):
        return GLUE
    if name.startswith("Attention"):
        return "attention projections" if "F.linear" in code else GLUE
    if name.startswith("MLP"):
        return "MLP"
    if name == "GPT.hidden":
        if re.search(r"embed|table\(|codes_VD\[", code):
            return "embedding"
        return "search" if re.search("said|quiet", code) else GLUE
    if name.startswith(("GPT", "fp8")) or path.name == "head.py":
        return "head and loss"
    return "rest"


def component_of_trace(trace: str, backward: bool) -> str | None:
    """The same for a stack trace: its innermost frame in this repository; None if it has none."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    for file, number in reversed(frames):
        path = Path(file)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path.exists():
            return component_of_line(path, int(number), backward)
    return None


@contextlib.contextmanager
def kernel_origins():
    """Yields {(backward, kernel name): components with their number of origins}, filled in while the model compiles."""
    from torch._inductor import config, debug
    from torch._inductor.virtualized import V

    origins, original = defaultdict(Counter), debug.dump_inductor_provenance_info

    def dump():
        backward = bool(getattr(V.graph, "is_backward", False))
        for name, traces in debug._inductor_kernel_stack_trace.items():
            found = (component_of_trace(trace, backward) for trace in traces)
            origins[backward, name.rpartition(":")[0]].update(c for c in found if c)
        return original()

    uncached = dict(fx_graph_cache=False, fx_graph_remote_cache=False)  # what comes from a cache has no record
    with config.patch({"trace.provenance_tracking_level": 1, **uncached}), \
            torch._functorch.config.patch(enable_autograd_cache=False):
        debug.dump_inductor_provenance_info = dump
        try:
            yield origins
        finally:
            debug.dump_inductor_provenance_info = original


# ---------------------------------------------------------------------------------------------------------------------
# From a kernel to a component

FUSED_NAMES = (("embedding", "embedding"), ("relu", "MLP"), ("nll|log_softmax|sigmoid", "head and loss"),
               ("cos|sin|rsqrt|rms_norm", GLUE))  # for kernels without a record of their origins


def launches(events: list[dict]):
    """(kernel event, [the operators and annotations that were open at its launch, innermost first]) of a Chrome trace."""
    open_at = defaultdict(list)
    for e in events:
        if e.get("ph") == "X" and e.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            open_at[e["pid"], e["tid"]].append(e)
    context = {}
    for thread in open_at.values():
        stack = []
        for e in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while stack and stack[-1]["ts"] + stack[-1]["dur"] < e["ts"]:
                stack.pop()
            if e["cat"].startswith("cuda"):
                context[e["args"].get("correlation")] = stack[::-1]
            else:
                stack.append(e)
    for e in events:
        if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            yield e, context.get(e["args"].get("correlation"), [])


def component_of_product(operator: dict, config) -> str:
    """A matrix product's component by its batch and its two sizes beside the tokens."""
    name, (C, width) = operator["name"], (config.model_dim, config.num_heads * config.head_dim)
    shapes = operator["args"].get("Input Dims", [])["add" in name :]  # without what is added
    (*batch, m, k), (*_, n) = ([shape for shape in shapes if len(shape) >= 2] + [[0, 0], [0, 0]])[:2]
    sizes = Counter((m, k, n)) - Counter([config.train_seq_len])
    others = "search" if config.content_pointers else "rest"  # landmarks, the probe's rows, the gates
    if batch:  # by head; the optimizer's are told by their annotation
        predicts = config.spectral_bias and batch == [config.num_heads] and config.spectral_hidden in sizes
        return "bias prediction" if predicts else others
    if 4 * C in sizes:
        return "MLP"
    if 128 * -(-config.vocab_size // 128) in sizes:
        return "head and loss"
    return "attention projections" if sizes in (Counter([C, width]), Counter([C, 3 * width])) else others


def components_of_kernel(kernel: dict, opened: list[dict], origins: dict, config) -> dict[str, float]:
    """Shares of one kernel's time by component; they add up to one."""
    names = [e["name"] for e in opened]
    backward = any("Backward" in name for name in names)
    for optimizer in ("Muon", "Adam"):
        if any(name.startswith(f"Optimizer.step#{optimizer}") for name in names):
            return {optimizer: 1}
    for e in opened:
        name = e["name"]
        if re.match(SEARCH_OPERATORS, name):
            return {"search": 1}
        if name == "context" or re.match(r"scope::\w*lists", name):
            return {"lists": 1}
        if name.startswith(("scope::fp8", "scope::head")):
            return {"head and loss": 1}
        if name.startswith("scope::pointer_attention"):
            return {"attention backward" if name.endswith("backward") else "attention forward": 1}
        if re.match(r"aten::(mm|addmm|bmm|baddbmm)$", name):
            return {component_of_product(e, config): 1}
        if name.startswith("aten::embedding"):
            return {"embedding": 1}
        if name.startswith(("aten::_foreach", "torch::autograd::AccumulateGrad")):
            return {"gradients": 1}
    found = origins.get((backward, kernel["name"])) or origins.get((not backward, kernel["name"]))
    if found:  # a small share is the producer of an operand, such as the product that a residual adds
        kept = {component: n for component, n in found.items() if n >= LEAST_SHARE * sum(found.values())}
        return {component: n / sum(kept.values()) for component, n in kept.items()}
    if "flex_attention" in kernel["name"]:
        return {"attention backward" if backward else "attention forward": 1}
    if kernel["name"].startswith("triton_"):
        return {next((c for pattern, c in FUSED_NAMES if re.search(pattern, kernel["name"])), "rest"): 1}
    return {"rest": 1}


def attribute(events: list[dict], origins: dict, config) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Milliseconds by component, and the longest kernels of the rest."""
    spent, rest = dict.fromkeys(COMPONENTS, 0.0), Counter()
    for kernel, opened in launches(events):
        for component, share in components_of_kernel(kernel, opened, origins, config).items():
            spent[component] += share * kernel["dur"] / 1e3
            if component == "rest":
                rest[kernel["name"]] += share * kernel["dur"] / 1e3
    return spent, rest.most_common(8)


def busy_ms(events: list[dict]) -> float:
    """Time during which at least one kernel or copy ran."""
    total, end = 0.0, float("-inf")
    for e in sorted((k for k, _ in launches(events)), key=lambda e: e["ts"]):
        stop = e["ts"] + e["dur"]
        total += max(0.0, stop - max(end, e["ts"]))
        end = max(end, stop)
    return total / 1e3


# ---------------------------------------------------------------------------------------------------------------------
# Floors


def list_slots(config, layer: int) -> tuple[int, int]:
    """Slots of a query block's list of predicted offsets in a layer with pointers, and of the list that its attention reads."""
    blocks, (local, _, anchors) = config.train_seq_len // BLOCK, config.list_shape
    offsets = min(config.list_shape.slots(config.spectral_pointers), blocks) if config.offset_pointers else 0
    if not config.content_pointers:
        return offsets, offsets
    shape = config.content_shape()
    if config.offset_pointers:
        return offsets, min(offsets + shape.far_blocks, blocks)
    window = scope.WINDOW_SLOTS[layer in scope.long_window_layers(config.num_layers)]
    return 0, list_width(local, anchors, window, shape.far_blocks, blocks, shape.readers > shape.heads)


def search_work(config, past: float) -> tuple[float, float]:
    """FLOPs and bytes of a sequence's search in all layers; `past`: mean blocks of its document before a query block.

    FLOPs of the products. Scores: p . l of every token, as in training all ask, with the tokens of the past, forward alone
    (pooled: with one mean a block). Projections: q and k to landmarks, their gradients and the maps'. Probe: the sampled rows'
    p . l over the past with both gradients, and their content logits, which have none. Bytes: blend and projections, forward
    and backward; landmarks into the search and what it finds out of it and into the admission; lists of claims; the gates
    (products too thin to be bound by FLOPs), which read the layer's input and the final stream; what is said."""
    shape = config.content_shape()
    T, D, H, layers = config.train_seq_len, config.head_dim, config.num_heads, len(config.spectral_layer_ids())
    P, r, activation, head = shape.heads, shape.dim, 2 * T * config.model_dim, 2 * T * config.head_dim
    slots = [list_slots(config, layer)[1] for layer in config.spectral_layer_ids()]
    lists = sum(4 * H * (T // BLOCK * width + T * -(-width // 32)) for width in slots)
    moved = layers * (10 * shape.matching * head + P * 32 * T) + lists  # bytes of blend and finds
    if config.pooled:  # half of every head's dimensions, no gradient
        return layers * P * D * T * past, moved + layers * P * 2 * head
    keys = past * BLOCK
    scores, projections = 2 * r * T * keys, 12 * T * D * r
    probe = shape.rows * keys * (6 * r + 2 * (D - r - config.folded_features))
    moved += layers * (P * 6 * (head + 2 * T * r) + 2 * activation)
    if config.copying:
        moved += layers * P * 3 * head + 2 * head + 3 * activation
    return layers * P * (scores + projections + probe), moved


def floors(model: scope.GPT, optimizers: list, config, sequences: int, blocks: float, pointer_blocks: float = 0.0,
           past: float = 0.0) -> dict[str, dict]:
    """FLOPs, bytes and the least milliseconds of a step's components; `blocks`: mean listed blocks of an attention layer's
    heads, `pointer_blocks`: of its heads that search, `past`: see `search_work`."""
    T, C, L, H = config.train_seq_len, config.model_dim, config.num_layers, config.num_heads
    width, vocab, N = H * config.head_dim, len(model.head_w), T // BLOCK
    attention, pointing = len(scope.attention_layers(L)), config.spectral_layer_ids()
    predicting = len(pointing) * config.spectral_bias
    activation, wide = 2 * T * C, 2 * T * width
    tables = [model.embed, *model.value_embeds]
    shape = config.spectral_shape()
    outputs = 5 * shape.pointers + 2
    pairs = attention * T * blocks * BLOCK
    # Heads that copy weigh codes as they weigh values: one more product each way, as codes have no gradient. A layer's codes
    # and what each of the heads finds are moved once. In the output head, codes are D more columns.
    copies = len(pointing) * config.spectral_pointer_heads * config.copying
    copied = 2 * config.head_dim * copies * T * pointer_blocks * BLOCK
    found = 2 * T * config.head_dim * (len(pointing) * config.copying + copies)
    code = config.head_dim * config.copying
    # Entries of lists are written, read, split and transposed; those of claims are written by the search. Dense: one table.
    entries = sum(H * N * (offsets + 3 * slots) for offsets, slots in (list_slots(config, layer) for layer in pointing))
    each = {  # of one sequence: (FLOPs, bytes)
        "embedding": (0, sum(3 * 2 * T * t.weight.size(1) + t.weight.numel() * t.weight.element_size() for t in tables)
                      + 3 * T * code),
        "attention projections": (6 * T * C * 4 * width * attention, attention * 3 * (2 * activation + 4 * wide)),
        GLUE: (0, 3 * L * 15 * activation),
        "bias prediction": (6 * T * H * shape.hidden * (shape.head_dim + outputs) * predicting,
                            3 * predicting * (wide + T * H * (2 * shape.num_features + 4 * shape.pointers))),
        "search": search_work(config, past) if config.content_pointers else (0, 0),
        "lists": (0, 4 * (4 * N * N if config.dense else entries)),
        "attention forward": (4 * width * pairs + copied, attention * 4 * wide + found),
        "attention backward": (10 * width * pairs + copied, attention * 8 * wide + found),
        "MLP": (6 * T * 8 * C * C * L, 3 * L * 10 * activation),
        "head and loss": (T * (6 * C + 4 * code) * vocab, 4 * 2 * T * vocab),
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient_bytes = sum(p.numel() * p.element_size() for p in parameters)
    muon, adam = ([p for opt in optimizers if isinstance(opt, scope.Muon) == ours for group in opt.param_groups
                   for p in group["params"]] for ours in (True, False))

    def orthogonalisation(p) -> float:
        r, c = sorted(p.shape[-2:])
        return p.numel() / (r * c) * len(scope.NEWTON_SCHULZ) * (4 * r * r * c + 2 * r**3)

    step = {
        "gradients": (0, gradient_bytes * (3 * (sequences - 1) + 3)),
        "Muon": (sum(map(orthogonalisation, muon)), 5 * sum(p.numel() * p.element_size() for p in muon)),
        "Adam": (0, 7 * sum(p.numel() * p.element_size() for p in adam)),
    }
    work = {name: (flops * sequences, size * sequences) for name, (flops, size) in each.items()} | step
    rate = {"head and loss": FP8_FLOPS if scope.fp8_available(model.head_w.device) else MATMUL_FLOPS}
    return {name: dict(flops=flops, bytes=size, floor_ms=1e3 * max(flops / rate.get(name, MATMUL_FLOPS), size / COPY_BYTES))
            for name, (flops, size) in work.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Measurement


def make_trainer(config, device: torch.device, progress: float) -> scope.Trainer:
    """A trainer without data, its schedules at `progress`. Weights that start at zero are drawn: products of zeros would be
    faster than they are in training."""
    run = SimpleNamespace(log=lambda line, echo=True: print(line, flush=True))
    trainer = scope.Trainer(dataclasses.replace(config, num_iterations=0, val_tokens=0, needle_eval=False), device, run)
    trainer.step, trainer.total_steps = round(SCHEDULE_STEPS * progress), SCHEDULE_STEPS
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.copy_(torch.where(p == 0, 0.02 * torch.randn_like(p), p))
    context = trainer.context

    def annotated(tokens):
        with torch.profiler.record_function("context"):
            return context(tokens)

    trainer.context = annotated
    return trainer


def random_sequences(config, device: torch.device) -> list[tuple]:
    sequences = []
    for _ in range(config.batch_tokens // config.train_seq_len):
        tokens = torch.randint(config.vocab_size, (config.train_seq_len + 1,), dtype=torch.int32, device=device)
        tokens[torch.rand(len(tokens), device=device) < 1 / DOCUMENT_TOKENS] = config.doc_delimiter
        sequences.append((tokens[:-1], tokens[1:].long()))
    return sequences


def profile_step(trainer: scope.Trainer, sequences: list[tuple]) -> list[dict]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        trainer.train_step(sequences)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


@torch.no_grad()
def measured_blocks(trainer: scope.Trainer) -> dict[str, float]:
    """What `floors` wants to know of the last sequence."""
    start_N, heads = trainer.telemetry_documents.start_block_N, trainer.config.spectral_pointer_heads
    searching = [layer.num_BHN[:, :heads].float().mean().item() for layer in trainer.telemetry if layer.pointing is not None]
    return dict(blocks=scope.mean_listed_blocks(trainer), pointer_blocks=statistics.fmean(searching or [0.0]),
                past=(torch.arange(len(start_N), device=start_N.device) - start_N).float().mean().item())


def measure(config, device: torch.device, progress: float) -> dict:
    trainer = make_trainer(config, device, progress)
    sequences = random_sequences(config, device)
    with kernel_origins() as origins:
        started = time.perf_counter()
        for _ in range(2):
            trainer.train_step(sequences)
        torch.cuda.synchronize()
        print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
        torch.cuda.reset_peak_memory_stats()
        steps = []
        for _ in range(TIMED_STEPS):
            started = time.perf_counter()
            trainer.train_step(sequences)
            torch.cuda.synchronize()
            steps.append(1e3 * (time.perf_counter() - started))
        peak_gib = torch.cuda.max_memory_allocated() / 2**30
        events = profile_step(trainer, sequences)
    spent, rest = attribute(events, origins, config)
    blocks = measured_blocks(trainer)
    least = floors(trainer.model, trainer.optimizers, config, len(sequences), **blocks)
    step_ms = statistics.median(steps)
    components = [dict(component=name, ms=spent[name], **least.get(name, dict(flops=0, bytes=0, floor_ms=None)))
                  for name in COMPONENTS]
    components.append(dict(component="idle", ms=max(0.0, step_ms - busy_ms(events)), flops=0, bytes=0, floor_ms=None))
    return dict(arm=config.arm, device=torch.cuda.get_device_name(device), torch=str(torch.__version__),
                backend=trainer.backend, layers=sorted(config.spectral_layer_ids()), tokens=config.train_seq_len,
                sequences=len(sequences), progress=progress, **blocks, step_ms=step_ms, steps_ms=steps,
                peak_gib=peak_gib, components=components, rest=rest)


def table(result: dict) -> str:
    lines = [f"arm {result['arm']}, {result['sequences']} x {result['tokens']:,} tokens, {result['blocks']:.1f} listed blocks "
             f"a layer: {result['step_ms']:.1f} ms a step, peak {result['peak_gib']:.1f} GiB",
             f"{'component':24} {'ms':>8} {'%':>5} {'TFLOP':>8} {'GB':>8} {'floor':>8} {'x floor':>8}"]
    for c in result["components"]:
        floor = c["floor_ms"]
        lines.append(f"{c['component']:24} {c['ms']:8.2f} {100 * c['ms'] / result['step_ms']:5.1f} {c['flops'] / 1e12:8.2f} "
                     f"{c['bytes'] / 1e9:8.2f} " + (f"{floor:8.2f} {c['ms'] / floor:8.2f}" if floor else f"{'-':>8} {'-':>8}"))
    total, least = (sum(c[key] or 0 for c in result["components"]) for key in ("ms", "floor_ms"))
    lines.append(f"{'sum':24} {total:8.2f} {100 * total / result['step_ms']:5.1f} {'':17} {least:8.2f} {total / least:8.2f}")
    lines += [f"the floor of {c['component']} leaves out {UNCOUNTED[c['component']]}" for c in result["components"]
              if c["component"] in UNCOUNTED and c["floor_ms"]]
    if result["rest"]:
        lines += ["longest of the rest:", *(f"  {ms:8.3f} ms  {name[:100]}" for name, ms in result["rest"])]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("--progress", type=float, default=1.0, help="of the schedules, 0 to 1 (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not 0 <= args.progress <= 1:
        parser.error(f"--progress {args.progress} is not between 0 and 1")
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"{args.json}: its directory does not exist")
    if not torch.cuda.is_available():
        sys.exit("error: bench/step.py needs a CUDA GPU")
    try:
        result = measure(scope.Config.from_environment(), torch.device("cuda"), args.progress)
    except scope.Stop as stop:
        sys.exit(f"error: {stop}")
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
