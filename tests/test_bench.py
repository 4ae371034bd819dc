"""The benchmarks without a GPU: their arithmetic against counting, their tables, JSON and pictures from made-up rows."""

import json
import re
import statistics
import sys
import time
import traceback
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import scoped_medium as scope
from bench import attention, forward, peers, plot_attention, plot_step, step
from model.attention import BLOCK

SETTING = dict(passes=["forward+backward", "forward"], document_tokens=0, seconds=0.1)


def make_setting(tokens=512, backward=False, **changes) -> attention.Setting:
    return attention.Setting(tokens, backward, changes.get("document_tokens", 0), attention.Bias.make(tokens, "cpu"), "cpu")


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def stop_line(function, *args) -> str:
    """The one line with which a command refuses."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    return stop.value.code


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic of bench/attention.py


@pytest.mark.parametrize("backward", [False, True])
def test_flops_and_bytes_count_every_listed_block(backward, uncompiled):
    setting = make_setting(1024, backward)
    cell = attention.listed(setting, "reference", None)
    flops = gathered = 0
    lists = cell.inputs[0].lists
    for count in lists.num_BHN.flatten().tolist():
        for _ in range(count):
            product = 2 * BLOCK * BLOCK * attention.D
            flops += (2 + 5 * backward) * product  # forward: scores, output; backward: scores again, dp, dq, dk, dv
            gathered += (1 + 2 * backward) * 2 * BLOCK * attention.D * 2
    blocks = lists.num_BHN.float().mean().item()
    assert attention.attention_flops(1024, blocks, backward) == pytest.approx(flops)
    assert attention.gathered_bytes(1024, blocks, backward) == pytest.approx(gathered)


def test_least_bytes_are_those_of_the_tensors():
    q = torch.empty(attention.B, attention.H, 256, attention.D, dtype=torch.bfloat16)
    lse = torch.empty(attention.B, attention.H, 256)
    forward_tensors, backward_tensors = 4 * q.nbytes + lse.nbytes, 8 * q.nbytes + lse.nbytes
    assert attention.least_bytes(256, backward=False) == forward_tensors
    assert attention.least_bytes(256, backward=True) == forward_tensors + backward_tensors


@pytest.mark.parametrize("N", [1, 5, 36, 50])
def test_mean_blocks(N):
    rows = [n + 1 for n in range(N)]
    assert attention.dense_blocks(N * BLOCK) == statistics.fmean(rows)
    assert attention.budget_blocks(N * BLOCK, 36) == pytest.approx(statistics.fmean(min(n, 36) for n in rows))


def test_bytes_of_views_count_once():
    x = torch.zeros(100)
    assert attention.tensor_bytes((x, [x[:10]], None, dict(a=torch.zeros(3, dtype=torch.int16)))) == 400 + 6


def test_median_and_spread():
    assert attention.median_and_spread([2.0, 1.0, 3.0]) == (2.0, pytest.approx(0.8))


# ---------------------------------------------------------------------------------------------------------------------
# Cells


@pytest.mark.parametrize("layout", [None, "append", "fold"])
def test_a_cell_returns_outputs_or_every_gradient(layout, uncompiled):
    for backward in (False, True):
        cell = attention.listed(make_setting(256, backward), "reference", layout)
        x = cell.inputs[0]
        alone, everything = cell.attend(x), cell.everything(x)
        if backward:
            assert [g.shape for g in alone] == [leaf.shape for leaf in x.leaves()]
            assert len(alone) == (7 if layout else 3) and len(everything) == (6 if layout else 3)
            assert all(g.isfinite().all() for g in (*alone, *everything))
        else:
            assert alone.shape == everything.shape == x.q_BTHD.shape and not alone.requires_grad
            torch.testing.assert_close(alone, everything, rtol=2e-2, atol=2e-2)  # the bias is predicted anew


@pytest.mark.parametrize("copying", [False, True])
def test_the_content_cell_runs_both_passes(uncompiled, copying):
    for backward in (False, True):
        cell = attention.content(make_setting(40 * BLOCK, backward), 32, "reference", copying=copying)
        x = cell.inputs[0]
        alone, everything, lists = cell.attend(x), cell.everything(x), cell.select(x)
        assert torch.equal(lists.num_BHN, x.lists.num_BHN) and (lists.num_BHN[0, 2:] <= attention.WINDOW).all()
        assert lists.num_BHN[0, :2].max() > 18  # the pointer heads claimed something
        read = [x.lists.num_BHN[0].float().mean(-1) for x in cell.inputs]  # of every head; the pointer head's again as codes
        expected = sum((heads.sum() + copying * heads[0]).item() for heads in read) / len(read) / attention.H
        assert cell.blocks == pytest.approx(expected)
        assert [g.shape for g in everything[:3]] == [g.shape for g in alone] if backward else everything.shape == alone.shape
        assert not backward or (len(everything) == 5 and all((g != 0).any() for g in everything))
        if copying and not backward:  # the pointer head reads the codes beside the values, the other heads do not
            moved = alone - attention.content(make_setting(40 * BLOCK, False), 32, "reference", copying=False).attend(x)
            assert not moved[:, :, 1:].any() and moved[:, :, 0].abs().amin(-1).max() > 0.1


def test_lists_are_full_where_the_past_has_room():
    T = 64 * attention.BLOCK
    x = make_setting(T).input_sets()[0]
    assert x.documents.id_T[999] + 1 == x.documents.id_T[1000] == x.documents.id_T[-1]
    assert not x.delta_BHTM[0, 0].equal(x.delta_BHTM[0, 1])
    state = attention.PointerState(*(torch.tensor(n, dtype=torch.int32) for n in attention.LISTS))
    num_BHN = attention.pointer_lists(x.delta_BHTM, x.documents, state, attention.LISTS).num_BHN
    blocks_of_past = torch.arange(64) - x.documents.start_block_N + 1
    assert (num_BHN[..., blocks_of_past >= attention.SLOTS] == attention.SLOTS).all() and (num_BHN <= blocks_of_past).all()


def test_small_inputs_take_turns():
    assert len(make_setting(256).input_sets()) == attention.INPUT_SETS
    assert not torch.equal(*(x.q_BTHD for x in make_setting(256).input_sets()[:2]))


def test_missing_peer_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(peers.NotImportable, match="^not importable: flash-attn-4 .ModuleNotFoundError"):
        attention.flash_4(make_setting(256))


class HostEvent:
    """A CUDA event on the host's clock."""

    def __init__(self, enable_timing):
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_measurement_fills_every_column(uncompiled, monkeypatch):
    fakes = dict(Event=HostEvent, synchronize=lambda: None, _sleep=lambda cycles: None, memory_allocated=lambda: 2**20,
                 reset_peak_memory_stats=lambda: None, max_memory_allocated=lambda: 2**21)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    setting = make_setting(256, backward=True)
    cell = attention.listed(setting, "reference", "append")
    row = {}
    attention.measure(cell, setting, 0.01, dict(matmul_tflops=790.0), row)
    assert all(row[key] > 0 for key, *_ in attention.COLUMNS) and row["runs"] >= attention.LEAST_RUNS
    assert row["peak_gib"] == 2**-10 and row["select_share"] == row["select_ms"] / row["ms"]
    assert row["tflops"] == pytest.approx(attention.attention_flops(256, 1.5, True) / row["ms"] / 1e9)
    ran = []
    times = attention.times_ms(lambda x: ran.append(x), [1, 2, 3], seconds=10)
    assert ran[:4] == [1, 2, 3, 1] and len(times) == len(ran) - 2 >= attention.LEAST_RUNS


# ---------------------------------------------------------------------------------------------------------------------
# Report


def fake_row(**changes) -> dict:
    row = {"variant": "triton", "pass": "forward", "tokens": 65_536, "ms": 2.5, "spread": 0.01, "all_ms": 3.0, "blocks": 33.0,
           "select_ms": 0.1, "select_share": 0.04, "tflops": 450.0, "ceiling_share": 0.57, "gbps": 210.0,
           "gathered_gbps": 3000.0, "peak_gib": 0.13, "lists_gib": 0.002}
    return row | changes


def test_table_is_aligned_and_says_why_a_cell_is_empty():
    full, some = attention.line(fake_row()), attention.line(fake_row(all_ms=None, select_ms=None, lists_gib=None))
    assert len(full) == len(some) == len(attention.heading())
    assert "2.500" in full and "57" in full and " - " in some
    assert attention.line(fake_row(error="OutOfMemoryError: x")) == full + " OutOfMemoryError: x"
    nothing = {key: fake_row()[key] for key in ("variant", "pass", "tokens")} | dict(error="not importable: x")
    assert attention.line(nothing).endswith("65,536 not importable: x")


def test_summary_compares_with_dense_and_over_lengths():
    rows = [fake_row(tokens=T, ms=ms) for T, ms in ((65_536, 2.5), (2**20, 42.0))]
    rows += [fake_row(variant="dense_cudnn", tokens=2**20, ms=4200.0), fake_row(variant="nsa", error="no") | dict(tokens=1)]
    del rows[-1]["ms"]
    lines = attention.summary(rows)
    assert "triton, forward, faster than dense cuDNN at 1,048,576: 100.0x" in lines
    assert "triton, forward, ms a token from 65,536 to 1,048,576: x1.05" in lines


def test_every_row_is_written_when_it_is_there_and_errors_hide_nothing(tmp_path, capsys):
    path, seen = tmp_path / "rows.json", []

    def measure(cell, setting, seconds, ceilings, row):
        seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        row |= dict(ms=float(setting.tokens), note=cell.note)

    def out_of_memory(setting):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmuch more text")

    def absent(setting):
        peers.require("surely_not_installed", "a peer")

    build = dict(good=lambda s: attention.Cell([None], None, 1.0, note="a note"), full=out_of_memory, absent=absent)
    args = SimpleNamespace(**SETTING | dict(json=path, tokens=[256, 512], variants=list(build), forward_only_from=512))
    rows = attention.run_cells(args, build, measure, lambda tokens, device: None)
    assert seen == [0, 3, 6] and json.loads(path.read_text())["rows"] == rows
    assert [(r["pass"], r["tokens"]) for r in rows[::3]] == [("forward+backward", 256), ("forward", 256), ("forward", 512)]
    assert rows[1]["error"] == "OutOfMemoryError: CUDA out of memory." and "ms" not in rows[1]
    assert rows[2]["error"].startswith("not importable: a peer")
    printed = capsys.readouterr().out
    assert printed.count("good: a note") == printed.count("not importable") == 1 and printed.count("OutOfMemory") == 3


@pytest.mark.parametrize("arguments, says", [
    (["--tokens", "1000"], "1000 tokens are not a positive multiple of the block of 128"),
    (["--tokens", "16k"], "'16k' is not whole numbers separated by commas"),
    (["--variants", "triton,fast"], "'fast' is none of triton, "),
    (["--passes", "backward"], "'backward' is none of forward, forward+backward"),
    (["--json", "/nowhere/rows.json"], "/nowhere/rows.json: its directory does not exist"),
    (["--token-count", "1"], "--token-count"),
    (["--tokens", "4194304"], "4194304 tokens are more than the 2097152 positions that the bias knows"),
    (["--seconds", "nan"], "'nan' is not a number from 0.001 to 3,600"), (["--seconds", "0"], "'0' is not a number from"),
    (["--seconds", "inf"], "'inf' is not a number from"), (["--seconds", "soon"], "'soon' is not a number from"),
    (["--document-tokens", "-5"], "'-5' is not a whole number from 0 to 2,147,483,648"),
    (["--document-tokens", "1e4"], "'1e4' is not a whole number"),
    (["--forward-only-from", "-1"], "'-1' is not a whole number"),
    (["--passes", "forward+backward", "--tokens", "1048576"], "--forward-only-from 1048576 leaves nothing of --passes"),
])
def test_wrong_arguments_are_refused_in_one_line(arguments, says):
    assert says in stop_line(attention.parse_arguments, arguments)


def test_a_run_without_a_figure_fails_in_one_line(monkeypatch):
    rows = [fake_row(variant="nsa", error="not importable: a peer"), fake_row(error="OutOfMemoryError: CUDA out of memory.")]
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "run_cells", lambda args: rows)
    attention.main()  # one of them has a time, and then failed
    for row in rows:
        del row["ms"]
    assert stop_line(attention.main) == ("error: none of 2 cells could be measured; the last: OutOfMemoryError: CUDA out of "
                                         "memory.")


def test_defaults_are_all_of_it():
    args = attention.parse_arguments([])
    assert args.tokens == [16_384, 65_536, 262_144, 1_048_576] and args.variants == list(attention.VARIANTS)


@pytest.mark.parametrize("module, arguments, says", [
    (attention, [], "needs a CUDA GPU"), (forward, ["256"], "needs a CUDA GPU"), (step, [], "needs a CUDA GPU"),
    (forward, ["300"], "300 tokens are not"), (forward, ["x"], "invalid int value"), (step, ["--progress", "2"], "between 0"),
    (step, ["--json", "/nowhere/step.json"], "does not exist"),
])
def test_commands_refuse_in_one_line(module, arguments, says, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert says in stop_line(module.main)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_labels_keep_their_order_and_distance():
    heights = [0.5, 0.1, 0.51, 0.9, 0.505, 0.11]
    placed = plot_attention.spread_out(heights, 0.05)
    assert sorted(range(6), key=placed.__getitem__) == sorted(range(6), key=heights.__getitem__)
    ordered = sorted(placed)
    assert min(b - a for a, b in zip(ordered, ordered[1:], strict=False)) >= 0.05 - 1e-12
    assert placed[3] == 0.9 and statistics.fmean(placed) == pytest.approx(statistics.fmean(heights))


def test_attention_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    rows = [fake_row(variant=variant, tokens=T, ms=T * factor) | {"pass": which} for which in plot_attention.PASSES
            for variant, factor in (("triton", 1e-4), ("dense_cudnn", 1e-3), ("something new", 1e-2)) for T in (2**14, 2**20)]
    rows.append({"variant": "moba", "pass": "forward", "tokens": 2**20, "error": "no"})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(dict(rows=rows)))
    monkeypatch.setattr(sys, "argv", ["plot", str(path)])
    plot_attention.main()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert set(plot_attention.STYLES) == set(attention.VARIANTS)


@pytest.mark.parametrize("module", [plot_attention, plot_step])
@pytest.mark.parametrize("content, says", [("[]", "not the JSON of"), ('{"rows": [], "arm": "A", "step_ms": 1}', ""),
                                           (None, "No such file")])
def test_pictures_of_nothing_are_refused(module, content, says, tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["plot", str(path)])
    assert says in stop_line(module.main)


# ---------------------------------------------------------------------------------------------------------------------
# bench/step.py


def tiny_config(**changes) -> scope.Config:
    values = dict(num_layers=2, num_heads=2, head_dim=64, model_dim=128, vocab_size=257, doc_delimiter=256, train_seq_len=512,
                  batch_tokens=1024, val_seq_len=512, val_tokens=512, spectral_bias=True, spectral_use_pointer_mask=True,
                  spectral_l_train=512)
    return scope.Config(**values | changes)


def event(category, name, start, duration, tid=1, **args) -> dict:
    return dict(ph="X", cat=category, name=name, ts=start, dur=duration, pid=1, tid=tid, args=args)


def fake_trace(launches: list[tuple]) -> list[dict]:
    """Every launch (outer names, kernel, its operator's input sizes) takes 100 us of host and 50 us of device."""
    events = [dict(ph="M", name="process_name", args={})]
    for i, (outer, kernel, dims) in enumerate(launches):
        start = 100 * i
        for depth, name in enumerate(outer):
            category = "user_annotation" if name == "context" or name.startswith("Optimizer") else "cpu_op"
            events.append(event(category, name, start + depth, 90 - 2 * depth, **{"Input Dims": dims}))
        events.append(event("cuda_runtime", "cudaLaunchKernel", start + 40, 2, correlation=i))
        events.append(event("kernel", kernel, 50 * i + 1000, 50, tid=7, correlation=i))
    return events


def test_kernels_are_attributed():
    config = tiny_config(vocab_size=1000)  # its head has 1,024 rows; 4 x MODEL_DIM is also the sequence's length
    back = "autograd::engine::evaluate_function: CompiledFunctionBackward"
    expected = [
        (["context", "scope::block_lists", "aten::sort"], "sort", [], "lists"),
        (["scope::split_lists", "aten::sort"], "radix", [], "lists"),
        (["aten::mm"], "gemm", [[512, 128], [128, 512]], "MLP"),
        (["aten::mm"], "gemm", [[512, 128], [128, 384]], "attention projections"),
        ([back, "aten::mm"], "gemm", [[1024, 512], [512, 128]], "head and loss"),
        ([back, "aten::mm"], "gemm", [[512, 512], [512, 128]], "MLP"),
        (["aten::addmm"], "gemm", [[128, 128], [128, 512], [512, 128]], "attention projections"),
        (["aten::bmm"], "gemm", [[2, 512, 64], [2, 64, 64]], "bias prediction"),
        (["scope::pointer_attention"], "_forward_kernel", [], "attention forward"),
        ([back, "scope::pointer_attention_backward"], "_backward_q_kernel", [], "attention backward"),
        ([back], "triton_tem_fused_flex_attention_backward_3", [], "attention backward"),
        (["triton_poi_fused_relu_4"], "triton_poi_fused_relu_4", [], "MLP"),
        (["scope::fp8_linear", "aten::_scaled_mm"], "nvjet", [], "head and loss"),
        (["scope::head_loss"], "_gradient_kernel", [], "head and loss"),
        (["torch::autograd::AccumulateGrad", "aten::add_"], "add", [], "gradients"),
        (["Optimizer.step#Muon.step", "aten::bmm"], "gemm", [], "Muon"),
        (["Optimizer.step#Adam.step", "aten::_fused_adam_"], "adam", [], "Adam"),
        (["aten::something"], "unknown", [], "rest"),
    ]
    for outer, kernel, dims, component in expected:
        spent, _ = step.attribute(fake_trace([(outer, kernel, dims)]), {}, config)
        assert {name: ms for name, ms in spent.items() if ms} == {component: pytest.approx(0.05)}, (outer, kernel)
    events = fake_trace([row[:3] for row in expected])
    spent, rest = step.attribute(events, {}, config)
    assert sum(spent.values()) == pytest.approx(0.05 * len(expected)) and rest == [("unknown", pytest.approx(0.05))]
    assert step.busy_ms(events) == pytest.approx(0.05 * len(expected))


def searching_config(source="content", **changes) -> scope.Config:
    values = dict(vocab_size=1000, spectral_bias=source in ("offset", "mixed"), spectral_pointer_source=source,
                  spectral_landmark_dim=16, attn_backend="reference", torch_compile="0")
    return tiny_config(**values | changes)


def test_kernels_of_a_search_are_attributed():
    back = "autograd::engine::evaluate_function: CompiledFunctionBackward"
    registered = re.findall(r'custom_op\("(scope::\w+)"', (step.ROOT / "model/selection.py").read_text())
    assert {"scope::search", "scope::content_lists"} < set(registered)
    expected = [([name, "aten::sort"], "a_kernel", [], "search") for name in registered] + [
        (["aten::mm"], "gemm", [[512, 64], [64, 16]], "search"),  # landmarks
        ([back, "aten::mm"], "gemm", [[64, 512], [512, 16]], "search"),
        (["aten::mm"], "gemm", [[128, 16], [16, 512]], "search"),  # the probe's rows
        (["aten::mm"], "gemm", [[512, 128], [128, 1]], "search"),  # a gate of the stream
        (["aten::mm"], "gemm", [[512, 192], [192, 1024]], "head and loss"),  # with codes
        (["aten::mm"], "gemm", [[512, 128], [128, 384]], "attention projections"),
        ([back, "aten::mm"], "gemm", [[128, 512], [512, 128]], "attention projections"),
        (["scope::split_lists", "aten::sort"], "radix", [], "lists"),
    ]
    for source in ("content", "mixed"):
        bias = "bias prediction" if source == "mixed" else "search"
        by_head = [(["aten::bmm"], "gemm", [[2, 512, 64], [2, 64, 64]], bias),
                   (["aten::bmm"], "gemm", [[3, 512, 64], [3, 64, 16]], "search")]
        for outer, kernel, dims, component in expected + by_head:
            spent, _ = step.attribute(fake_trace([(outer, kernel, dims)]), {}, searching_config(source))
            assert {name: ms for name, ms in spent.items() if ms} == {component: pytest.approx(0.05)}, (source, outer, dims)
    without = step.component_of_product(event("cpu_op", "aten::bmm", 0, 1, **{"Input Dims": [[2, 512, 64], [2, 64, 64]]}),
                                        searching_config("dense"))
    assert without == "rest"


def test_fused_kernels_are_divided_by_their_origins():
    origins = {(False, "triton_a"): {step.GLUE: 6, "embedding": 2, "MLP": 1}, (True, "triton_a"): {"MLP": 3}}
    spent, _ = step.attribute(fake_trace([([], "triton_a", [])]), origins, tiny_config())
    assert spent[step.GLUE] == pytest.approx(0.0375) and spent["embedding"] == pytest.approx(0.0125) and spent["MLP"] == 0
    spent, _ = step.attribute(fake_trace([(["CompiledFunctionBackward"], "triton_a", [])]), origins, tiny_config())
    assert spent["MLP"] == pytest.approx(0.05)


def test_busy_time_counts_overlap_once():
    events = [event("kernel", "a", 0, 100, correlation=0), event("kernel", "b", 50, 100, correlation=1),
              event("gpu_memcpy", "c", 500, 10, correlation=2)]
    assert step.busy_ms(events) == pytest.approx(0.16)


@pytest.mark.parametrize("file, code, component", [
    ("scoped_medium.py", "qkv = F.linear(", "attention projections"), ("scoped_medium.py", "q, k = norm(q)", step.GLUE),
    ("scoped_medium.py", "return F.rms_norm(", step.GLUE), ("scoped_medium.py", "self.fc_w.type_as(x)).relu()", "MLP"),
    ("scoped_medium.py", "x = x0 = norm(self.embed", "embedding"),
    ("scoped_medium.py", "LOGIT_CAP * torch.sigmoid", "head and loss"),
    ("scoped_medium.py", "x2 * cos - x1 * sin", step.GLUE), ("model/attn_bias.py", "phase = delta_BHTM", "bias prediction"),
    ("model/attn_bias.py", "leaders = delta_BHTM", "lists"), ("model/attention.py", "opens_T = tokens_T", "lists"),
    ("model/attention_triton.py", "out, lse = attend(", "attention forward"),
    ("model/head.py", "grad * grad_x", "head and loss"), ("model/content.py", "total = x * taps[0]", "search"),
    ("model/content.py", "torch.einsum(\"bspe,btpe->pst\", p_BSPr", "search"),
    ("model/content.py", "q, k, v = (torch.cat(x, 2)", step.GLUE), ("model/selection.py", "def content_lists(", "search"),
    ("model/selection_triton.py", "def write_lists(", "search"),
    ("scoped_medium.py", "ATTENTION_SCALE * torch.einsum", "search"), ("scoped_medium.py", "torch.sigmoid(QUIET", "search"),
    ("scoped_medium.py", "self.codes_VD[tokens_T]", "embedding"), ("model/attn_bias.py", "(place / 10 + 1).log()", step.GLUE),
    ("model/attn_bias.py", "y, found_BTPD, placed_BTPD = read(", step.GLUE),
])
def test_source_lines_belong_to_components(file, code, component):
    path = step.ROOT / file
    numbers = [i for i, text in enumerate(path.read_text().splitlines(), 1) if code in text]
    assert numbers, f"{file} has no line with {code}: say here and in bench/step.py what became of it"
    assert {step.component_of_line(path, n, False) for n in numbers} == {component}
    frames = ("/torch/nn.py", 1), (path, numbers[0]), ("/torch/functional.py", 3)
    trace = "\n".join(f'File "{file}", line {number}, in f' for file, number in frames)
    assert step.component_of_trace(trace, False) == component
    assert step.component_of_trace('File "/torch/nn.py", line 1, in x', False) is None
    installed = f'{trace}\nFile "{F.__file__}", line 9, in f'  # of torch, even where it lies within this repository
    assert step.component_of_trace(installed, False) == component


class Components(TorchDispatchMode):
    """Of every operator of a forward that runs uncompiled: by its source line, and of a product by its sizes too."""

    def __init__(self, config):
        super().__init__()
        self.config, self.by_line, self.products = config, set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        component = step.component_of_trace("".join(traceback.format_stack()[:-1]), False)
        self.by_line.add(component)
        if name in ("aten::mm", "aten::bmm") and component != "attention forward":
            shapes = [list(x.shape) for x in args]
            by_size = step.component_of_product(dict(name=name, args={"Input Dims": shapes}), self.config)
            self.products.append((component, by_size, shapes))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("source", ["content", "mixed", "pooled", "dense", "offset"])
def test_every_line_of_a_forward_has_a_component(source):
    config = searching_config(source, spectral_length_scale=source == "dense")
    trainer = step.make_trainer(config, torch.device("cpu"), 1.0)
    (tokens, targets), *_ = step.random_sequences(config, torch.device("cpu"))
    context = trainer.context(tokens)
    with Components(config) as components:
        trainer.model.train()(tokens, targets, context)
    expected = {"embedding", "attention projections", step.GLUE, "attention forward", "MLP", "head and loss"}
    expected |= {"search"} if config.content_pointers else set()
    expected |= {"bias prediction"} if config.spectral_bias else set()
    expected |= {"lists"} if config.offset_pointers else set()
    assert components.by_line == expected
    assert components.products and all(by_line == by_size for by_line, by_size, _ in components.products)


def test_floors_are_those_of_the_matrices():
    config = tiny_config()
    model = scope.build_model(config, torch.device("cpu"))
    least = step.floors(model, scope.make_optimizers(model), config, 2, blocks=3.0)
    tokens, layers = config.batch_tokens, config.num_layers
    mlp = sum(p.numel() for block in model.blocks for p in block.mlp.parameters())
    projections = sum(block.attn.qkv_w.numel() + block.attn.out_w.numel() for block in model.blocks)
    assert least["MLP"]["flops"] == 6 * tokens * mlp
    assert least["attention projections"]["flops"] == 6 * tokens * projections
    assert least["head and loss"]["flops"] == 6 * tokens * model.head_w.numel()
    spectral = [block.attn.spectral for block in model.blocks if block.attn.spectral is not None]
    matrices = sum(s.w1[0].numel() + s.w2[0].numel() for s in spectral)
    assert least["bias prediction"]["flops"] == 6 * tokens * config.num_heads * matrices
    assert least["attention forward"]["flops"] == layers * 4 * 128 * tokens * 3 * BLOCK
    assert least["Adam"]["bytes"] + 7 / 5 * least["Muon"]["bytes"] == pytest.approx(
        7 * sum(p.numel() * p.element_size() for p in model.parameters()))
    for work in least.values():
        rate = work["flops"] / step.MATMUL_FLOPS, work["bytes"] / step.COPY_BYTES
        assert work["floor_ms"] == pytest.approx(1e3 * max(rate))
    assert set(least) == set(step.COMPONENTS) - {"rest"}
    bare = tiny_config(spectral_bias=False, spectral_use_pointer_mask=False)
    model = scope.build_model(bare, torch.device("cpu"))
    without = step.floors(model, scope.make_optimizers(model), bare, 2, blocks=3.0)
    assert without["bias prediction"]["flops"] == without["lists"]["bytes"] == 0


def test_no_bias_is_charged_without_one():
    for source in ("content", "pooled", "dense"):
        config = searching_config(source)
        model = scope.build_model(config, torch.device("cpu"))
        least = step.floors(model, scope.make_optimizers(model), config, 2, blocks=3.0, pointer_blocks=2.0, past=1.5)
        assert least["bias prediction"] == dict(flops=0, bytes=0, floor_ms=0) and least["lists"]["bytes"] > 0
        assert (least["search"]["floor_ms"] > 0) == config.content_pointers
        assert least["head and loss"]["flops"] >= 6 * config.batch_tokens * model.head_w.numel()


def counted_flops(function, *inputs) -> int:
    """Of the matrix products of a forward, and of the gradients that its result has."""
    with FlopCounterMode(display=False) as counter:
        results = function(*inputs)
        for result in results if isinstance(results, tuple) else (results,):
            if result.requires_grad:
                result.sum().backward(retain_graph=True)
    return counter.get_total_flops()


def test_floors_of_a_search_are_those_of_its_products():
    config = searching_config()
    model = scope.build_model(config, torch.device("cpu"))
    least = step.floors(model, scope.make_optimizers(model), config, 2, blocks=3.0, pointer_blocks=2.0, past=1.5)
    content, T, D, r, times = model.blocks[0].attn.content, 512, 64, 16, 2 * 2  # layers and sequences
    q, k = (torch.randn(1, T, 1, D, requires_grad=True) for _ in range(2))
    asks, keys = (x.detach()[0, :, 0] for x in content.project(q, k))
    past = 3 * BLOCK // 2  # tokens
    search = counted_flops(content.project, q, k) + counted_flops(torch.matmul, asks, keys[:past].T)
    rows, content_rows = asks[: content.shape.rows].requires_grad_(), torch.randn(content.shape.rows, D - r)
    search += counted_flops(lambda: rows @ keys[:past].requires_grad_().T)
    search += counted_flops(torch.matmul, content_rows, torch.randn(D - r, past))
    assert least["search"]["flops"] == times * search
    said, codes = torch.randn(T, D, requires_grad=True), torch.randn(len(model.head_w), D)
    head = counted_flops(F.linear, said, codes)
    assert least["head and loss"]["flops"] == 6 * config.batch_tokens * model.head_w.numel() + 2 * head
    weights = torch.rand(T, 2 * BLOCK, requires_grad=True)  # of the values, and so of the codes
    again = counted_flops(torch.matmul, weights, codes[: 2 * BLOCK]) // 2  # forward, and as much backward
    assert least["attention forward"]["flops"] == times * (4 * 128 * T * 3 * BLOCK + again)
    assert least["attention backward"]["flops"] == times * (10 * 128 * T * 3 * BLOCK + again)


def test_a_pooled_search_has_one_key_a_block():
    config = searching_config("pooled")
    model = scope.build_model(config, torch.device("cpu"))
    least = step.floors(model, scope.make_optimizers(model), config, 2, blocks=3.0, pointer_blocks=2.0, past=3.0)
    assert least["search"]["flops"] == 2 * 2 * counted_flops(torch.matmul, torch.randn(512, 32), torch.randn(32, 3))
    assert least["attention forward"]["flops"] == 2 * 4 * 128 * config.batch_tokens * 3 * BLOCK


@pytest.mark.parametrize("source, changes, slots", [
    ("offset", {}, (36, 36)), ("content", {}, (0, 22)), ("pooled", {}, (0, 22)), ("mixed", {}, (36, 52)), ("dense", {}, (0, 0)),
    ("content", dict(spectral_pointer_readers=8), (0, 30)), ("content", dict(train_seq_len=1024), (0, 8)),
])
def test_lists_are_as_wide_as_their_source_makes_them(source, changes, slots):
    config = scope.Config(spectral_use_pointer_mask=True, spectral_bias=source in ("offset", "mixed"),
                          spectral_pointer_source=source, **changes)
    assert step.list_slots(config, 0) == slots
    if "spectral_pointer_readers" in changes:
        assert step.list_slots(config, 1) == (0, 23)  # its window is half as wide


def test_a_step_tells_what_its_floors_count():
    config = searching_config()
    trainer = step.make_trainer(config, torch.device("cpu"), 1.0)
    (tokens, targets), *_ = step.random_sequences(config, torch.device("cpu"))
    tokens.clamp_(max=255)[200] = config.doc_delimiter
    trainer.accumulate([(tokens, targets)])
    blocks = step.measured_blocks(trainer)
    assert blocks["past"] == (0 + 1 + 1 + 2) / 4  # blocks 2 and 3 are of the document that begins in block 1
    lists = [layer.num_BHN[0].float().mean(-1) for layer in trainer.telemetry]
    assert blocks["pointer_blocks"] == pytest.approx(statistics.fmean(num_H[0].item() for num_H in lists))
    assert blocks["blocks"] == pytest.approx(statistics.fmean(num_H.mean().item() for num_H in lists))


def fake_step(arm: str) -> dict:
    components = [dict(component=c, ms=5.0, flops=1e12, bytes=1e9, floor_ms=None if c in ("rest", "idle") else 2.0)
                  for c in (*step.COMPONENTS, "idle")]
    return dict(arm=arm, step_ms=5.0 * len(components), components=components, sequences=8, tokens=65_536, blocks=9.0,
                peak_gib=30.0, rest=[("some_kernel", 1.5)])


def test_step_table_and_picture(tmp_path, monkeypatch):
    text = step.table(fake_step("C"))
    assert "attention backward" in text and "2.50" in text and "some_kernel" in text and "100.0" in text
    assert "the floor of search leaves out the maxima over its scores" in text
    pytest.importorskip("matplotlib")
    paths = []
    for arm in "AC":
        paths.append(tmp_path / f"step_{arm}.json")
        record = fake_step(arm)
        record["components"] = [c for c in record["components"] if (arm, c["component"]) != ("A", "search")]  # an older one
        paths[-1].write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["plot", *map(str, paths), "--output", str(tmp_path / "steps.png")])
    plot_step.main()
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_profiled_trainer_has_no_zero_weights():
    config = tiny_config(attn_backend="reference", torch_compile="0")
    trainer = step.make_trainer(config, torch.device("cpu"), 1.0)
    assert all(p.all() for p in trainer.model.parameters()) and trainer.schedule().long_window == 14
    loss, norm = trainer.train_step(step.random_sequences(config, torch.device("cpu")))
    assert loss > 0 and norm > 0 and trainer.telemetry
