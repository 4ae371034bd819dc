"""SCOPE: a GPT-2-medium-class model with a spectral bias on its attention logits and pointer-driven block-sparse attention.

    torchrun --standalone --nproc_per_node=8 scoped_medium.py      # any number of processes
    python scoped_medium.py                                        # one process; CUDA where there is one, else CPU
    python scoped_medium.py --help                                 # every variable, its default and its meaning
    python scoped_medium.py --check                                # validate configuration, data and shapes, train nothing
    LOAD_CHECKPOINT=logs/run/state_step001000.pt NUM_ITERATIONS=0 NEEDLE_EVAL=1 python scoped_medium.py   # evaluate only

Arms: A is SPECTRAL_BIAS=0, numerically baseline.py; B is SPECTRAL_BIAS=1; C adds SPECTRAL_USE_POINTER_MASK=1 and
SPECTRAL_POINTER_SCHEDULE=1. Everything is configured by environment variables. The order of the file: configuration, model,
optimizers and schedules, data, checkpoints, evaluation, training loop, start. lifecycle.py holds what surrounds a run:
processes, signals, run directory, checkpoint files. SPEC.md is the design.

Shape suffixes: B batch (always 1), T tokens, H heads, D head dim, C model dim, V vocabulary, N blocks of 128 tokens.
"""

import contextlib
import copy
import dataclasses
import difflib
import json
import math
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle CPU threads sleep: spinning is 5 times slower on a busy machine

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import shards
from data.retrieval import Mixer, MixerProcess, count_tokens
from eval.needle import Haystack, check_needle_shape, draw_needles, evaluate_needles
from lifecycle import (
    PROGRESS,
    SIGNALS,
    WEIGHT_KEYS,
    Preempted,
    RunDirectory,
    Stop,
    all_ranks,
    all_reduce,
    check_run_directory,
    collective,
    exit_at_once,
    free_space,
    newest_readable,
    read_checkpoint,
    set_up_device,
    world,
)
from model.attention import (
    BLOCK,
    MAX_TABLE_BLOCKS,
    TRITON_CAPABILITY,
    TRITON_HEAD_DIMS,
    BlockLists,
    Documents,
    prepare,
)
from model.attn_bias import (
    MAX_POSITION,
    BiasCoefficients,
    LayerTelemetry,
    ListShape,
    PointerState,
    PositionTables,
    SpectralBias,
    SpectralShape,
    augment,
    length_scale,
    past_lists,
    place_frequencies,
    pointer_lists,
    read_codes,
    scope_bins,
    scope_stats,
    window_lists,
)
from model.content import CODE, LOSSES, ContentPointers, ContentShape, ContentTelemetry, Heads, token_codes
from model.head import (
    FP8_GRAD_SCALE,
    FP8_W_LARGEST,
    FP8_W_SCALE,
    FP8_X_SCALE,
    LOGIT_CAP,
    LOGIT_TEMPERATURE,
    head_loss,
    quantise_w,
    quantise_x,
)
from model.selection import POINTER_DIMS, Claims

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: every variable is declared once, here. Help, README table, validation and config.json come from it.


def var(group: str, default, help: str, low=None, high=None, choices=None):
    return dataclasses.field(default=default, metadata=dict(group=group, help=help, low=low, high=high, choices=choices))


_training, _model, _spectral = (partial(var, g) for g in ("training", "model", "spectral"))
_run, _validation, _compiler, _needle = (partial(var, g) for g in ("run", "validation", "compiler", "needle"))
RESUME_MUST_MATCH = ("training", "model", "spectral")  # groups in which a resumed run may differ in nothing but
RESUME_MAY_DIFFER = {  # these: shards are compared by content, and training does not see what an evaluation alone does
    "train_files", "epochs", "warmup_steps", "spectral_pointer_asking", "spectral_pointer_focus", "spectral_pointer_follow",
    "spectral_pointer_shrink"}
CHECKED_PREFIXES = ("SPECTRAL_", "NEEDLE_", "SCOPE_", "FLEXATTN_", "RETRIEVAL_")  # ours: unknown names are refused


@dataclass(frozen=True)
class Config:
    num_iterations: int = _training(2000, "optimizer steps; 0 evaluates only", low=0)
    train_files: str = _training("data/fineweb10B/fineweb_train_*.bin", "glob of the training shards, read in sorted order")
    epochs: int = _training(1, "passes over the training shards that a run may take; 0: as many as it needs", low=0)
    train_seq_len: int = _training(65536, "tokens in one training sequence", low=BLOCK)
    batch_tokens: int = _training(524288, "tokens in one optimizer step, over all processes (by accumulation)", low=BLOCK)
    seed: int = _training(0, "seed of the weights, of the needles and of RETRIEVAL_MIX", low=0, high=2**63 - 1)
    retrieval_mix: float = _training(0.0, "share of training tokens that statements, questions and copied passages overwrite",
                                     low=0, high=0.5)
    retrieval_passages: float = _training(0.5, "share of those tokens that are copied passages", low=0, high=1)
    cooldown_frac: float = _training(0.6, "share of the steps over which the learning rate falls to 0", low=1e-9, high=1)
    warmup_steps: int = _training(10, "untimed steps on random tokens before step 0 (compiled runs only; state restored)",
                                  low=0)

    vocab_size: int = _model(50257, "tokens in the vocabulary; the head is padded to a multiple of 128", low=2, high=65536)
    doc_delimiter: int = _model(50256, "token that opens every document; attention does not cross it", low=0)
    num_layers: int = _model(16, "transformer blocks", low=2, high=1024)
    num_heads: int = _model(8, "attention heads", low=1, high=1024)
    head_dim: int = _model(128, "dimensions of a head, a multiple of 4", low=16, high=1024)
    model_dim: int = _model(1024, "width of the residual stream", low=16, high=65536)

    spectral_bias: bool = _spectral(False, "spectral bias on attention logits (0, and no pointer mask: arm A)")
    spectral_use_pointer_mask: bool = _spectral(False, "pointer lists in the spectral layers (arm C) instead of the "
                                                       "sliding window (arm B)")
    spectral_pointer_source: str = _spectral("auto", "what points: offsets predicted from the query, a search of the past by "
                                                     "content, or both; auto: offset with SPECTRAL_BIAS=1, else content, which "
                                                     "retrieves better; for comparison: pooled searches blocks by their mean "
                                                     "key, dense reads all of the past, at quadratic cost",
                                             choices=("auto", "offset", "content", "mixed", "pooled", "dense"))
    spectral_layers: str = _spectral("long", "layers with bias and pointers: long (the long-window layers), all, or ids "
                                             "like 0,4,11")
    spectral_impl: str = _spectral("qk_aug", "bias as extra q.k dimensions, or as a FlexAttention score_mod (very slow)",
                                   choices=("qk_aug", "score_mod"))
    spectral_qk_layout: str = _spectral("fold", "qk_aug: fold the features into non-rotating dimensions, or append them",
                                        choices=("fold", "append"))
    spectral_bands: int = _spectral(6, "K, frequencies of the bias", low=1)
    spectral_pointers: int = _spectral(2, "M, offsets predicted per query", low=1)
    spectral_hidden: int = _spectral(64, "hidden width of the predicting MLP", low=1)
    spectral_beta: float = _spectral(1.0, "factor on the whole bias", low=0)
    spectral_l_train: int = _spectral(0, "shortest wavelength in tokens; 0: TRAIN_SEQ_LEN", low=0)
    spectral_l_max: int = _spectral(1048576, "longest wavelength and largest offset in tokens", low=256)
    spectral_gate: bool = _spectral(True, "predict and subtract a gate per query")
    spectral_slope: bool = _spectral(True, "predict a slope per query, at most 1/l_train nats a token")
    spectral_subtract_zero: bool = _spectral(True, "subtract b(0), so that the bias is relative to the query's own place")
    spectral_share_heads: bool = _spectral(True, "one MLP for all heads of a layer (its output bias stays per head)")
    spectral_lr: float = _spectral(0.003, "Adam learning rate of the spectral parameters", low=0)
    spectral_reg_high: float = _spectral(1e-3, "weight of the high-band energy", low=0)
    spectral_reg_mean: float = _spectral(1e-3, "weight of the squared mean of the bias over [0, l_train]", low=0)
    spectral_reg_entropy: float = _spectral(1e-2, "weight of the entropy deficit of pi", low=0)
    spectral_reg_edge: float = _spectral(1e-2, "weight of offsets at the edges of their range", low=0)
    spectral_entropy_floor: float = _spectral(0.3, "entropy of pi below which the regulariser acts, nats", low=0)
    spectral_pointer_local_blocks: int = _spectral(16, "local band of the pointer lists, blocks of 128 tokens", low=1,
                                                   high=65536)
    spectral_pointer_half_blocks: int = _spectral(4, "blocks on each side of a pointer", low=0, high=65536)
    spectral_pointer_global_blocks: int = _spectral(1, "blocks at the start of the document that every query reads", low=0,
                                                    high=2)
    spectral_pointer_global_blocks_warmup: int = _spectral(2, "the same during the first warm-up steps", low=0, high=2)
    spectral_pointer_global_blocks_warmup_steps: int = _spectral(300, "steps of that warm-up", low=0)
    spectral_pointer_schedule: bool = _spectral(False, "pointers off, then half radius, then full radius (0: always full)")
    spectral_pointer_mid_frac: float = _spectral(0.1, "share of the steps after which the pointers start", low=0, high=1)
    spectral_pointer_full_frac: float = _spectral(0.3, "share of the steps after which their radius is full", low=0, high=1)

    spectral_window_hold: float = _spectral(0.0, "share of the steps before the sliding windows grow beyond 2 blocks: what "
                                                 "lies farther, pointers alone can reach, and so they learn", low=0, high=0.99)
    spectral_pointer_heads: int = _spectral(1, "content: heads of a layer that search and read far blocks", low=1)
    spectral_pointer_readers: int = _spectral(0, "content: heads of a layer that read what is found, those that search among "
                                                 "them; 0: those that search", low=0)
    spectral_pointer_far_blocks: int = _spectral(16, "content: far blocks that a query block reads at most", low=1, high=32)
    spectral_pointer_near_blocks: int = _spectral(4, "content: local band of the heads that search, blocks; few, or they learn "
                                                     "to search no further (mixed: SPECTRAL_POINTER_LOCAL_BLOCKS)", low=1,
                                                     high=65536)
    spectral_length_scale: bool = _spectral(False, "dense: logits grow with the logarithm of the past, against its growing "
                                                   "noise (scale-invariant attention)")
    spectral_pointer_floor: float = _spectral(2.0, "content: log-odds of a block, over those of an average one of the "
                                                   "past, below which it is not read")
    spectral_pointer_asking: int = _spectral(16, "content: tokens of a block that search, at most; in training all do",
                                             low=16, high=BLOCK)
    spectral_pointer_focus: float = _spectral(1.0, "content, in evaluation: part by which logits grow where codes are read, "
                                                   "if the last three tokens were found just before they came", low=0)
    spectral_pointer_follow: float = _spectral(0.0, "content, in evaluation: nats by which a bias draws the reading of codes "
                                                    "to what stands behind the place that was surely found last", low=0)
    spectral_landmark_dim: int = _spectral(32, "content: dimensions of a landmark", low=16, high=64)
    spectral_pointer_copy: bool = _spectral(True, "content: heads that search read, beside values, which tokens stand there, "
                                                 "and the output head says them, however rarely training does")
    spectral_pointer_quiet: bool = _spectral(True, "content: a learnt gate of each token lowers the output head's own logits "
                                                    "against its copies")
    spectral_pointer_trust: bool = _spectral(True, "content: copies are as loud as they have just been right")
    spectral_pointer_shrink: float = _spectral(1.0, "content, in evaluation: standard deviations of what codes say by chance "
                                                    "that they do not say", low=0, high=3)
    spectral_reg_landmark: float = _spectral(1.0, "content: weight of the losses that teach landmarks and who searches", low=0)

    val_files: str = _validation("data/fineweb10B/fineweb_val_*.bin", "glob of the validation shards")
    val_seq_len: int = _validation(65536, "tokens in one validation sequence", low=BLOCK)
    val_tokens: int = _validation(10485760, "tokens of one validation; 0: none", low=0)
    val_loss_every: int = _validation(125, "steps between validations; 0: only at the end", low=0)
    spectral_pointer_val_force: bool = _validation(False, "validate with a fixed radius instead of the schedule's")
    spectral_pointer_val_half_blocks: int = _validation(-1, "that radius in blocks; -1: SPECTRAL_POINTER_HALF_BLOCKS", low=-1)

    run_name: str = _run("", "directory of the run inside LOG_DIR; empty: arm, seed and time")
    log_dir: str = _run("logs", "directory of the run directories")
    save_checkpoint: bool = _run(True, "save state_step%06d.pt at the end and every CHECKPOINT_EVERY steps")
    checkpoint_every: int = _run(0, "steps between checkpoints; 0: only at the end", low=0)
    keep_checkpoints: int = _run(3, "newest checkpoints that are kept; 0: all", low=0)
    keep_every: int = _run(0, "checkpoints at multiples of so many steps are kept for good; 0: none", low=0)
    resume: str = _run("0", "0: a new run; auto: continue from the run directory's newest sound checkpoint; or a checkpoint's "
                            "path")
    resume_other_data: bool = _run(False, "resume although the training shards are not the checkpoint's")
    load_checkpoint: str = _run("", "checkpoint whose weights to start from, unless RESUME=auto finds one of the run's own, or "
                                "to evaluate with NUM_ITERATIONS=0")
    scope_log_every: int = _run(200, "steps between SCOPE_STATS lines; 0: none", low=0)
    log_every: int = _run(10, "steps between plain log lines", low=1)
    log_all_ranks: bool = _run(False, "one log file a rank")
    rank_check_every: int = _run(100, "steps between comparisons of the parameters of all processes; 0: only at the start",
                                 low=0)
    rank_timeout: int = _run(1800, "seconds without any progress after which a run of several processes ends as hung", low=1)

    attn_backend: str = _compiler("auto", "triton: own kernels, for Hopper and newer; flex: FlexAttention, any CUDA GPU; "
                                          "reference: plain block gather, the CPU's; auto: the fastest that fits, and logged",
                                  choices=("auto", "reference", "flex", "triton"))
    head_loss: str = _compiler("plain", "training with the FP8 head: fused makes logits, loss and gradients a chunk of tokens "
                                        "at a time, plain all logits at once", choices=("plain", "fused"))
    torch_compile: str = _compiler("auto", "compile the model: auto is 1 on CUDA and 0 on CPU", choices=("auto", "0", "1"))
    torch_compile_mode: str = _compiler("default", "mode of torch.compile",
                                        choices=("default", "reduce-overhead", "max-autotune"))
    torchdynamo_verbose: bool = _compiler(False, "read by torch itself: longer compiler errors")
    torchdynamo_suppress_errors: bool = _compiler(False, "read by torch itself: run in eager mode what fails to compile")
    torch_compile_fallback_to_eager: bool = _compiler(False, "if compiling fails, log it and go on without")
    flexattn_dynamo_disable: bool = _compiler(False, "break the graph around FlexAttention (auto then takes flex)")
    flexattn_compile: bool = _compiler(True, "compile FlexAttention by itself when it is outside a compiled graph "
                                             "(0: the slow reference takes its place; auto then takes flex)")

    needle_eval: bool = _needle(False, "needle evaluation after the last step")
    needle_files: str = _needle("", "glob of the haystack's shards; empty: VAL_FILES")
    needle_seq_len: int = _needle(65536, "tokens in one needle sequence", low=BLOCK)
    needle_distances: tuple = _needle((4096, 8192, 16384, 32768), "tokens between the needle's value and its question")
    needle_samples_per_distance: int = _needle(8, "samples for each distance", low=1)
    needle_anchor_len: int = _needle(4, "tokens of the needle's key", low=1)
    needle_value_len: int = _needle(8, "tokens of the needle's value", low=1)

    @classmethod
    def from_environment(cls, environment=os.environ, checkpoint: dict | None = None) -> "Config":
        """Read and validate; raises Stop with every problem found."""
        config, problems, unread = cls.read(environment, checkpoint)
        problems += config.impossible_combinations(unread)
        if problems:
            raise Stop("; ".join(problems))
        return config

    @classmethod
    def read(cls, environment, checkpoint: dict | None = None) -> tuple["Config", list[str], set[str]]:
        """(configuration, problems, variables that could not be read and have their defaults instead). A checkpoint's model
        and spectral settings serve as defaults, so that an evaluation need not repeat them."""
        problems, values, unread = unknown_variables(environment), {}, set()
        for field in dataclasses.fields(cls):
            name = field.name.upper()
            inherited = checkpoint and field.metadata["group"] in ("model", "spectral") and field.name in checkpoint
            if name in environment:
                try:
                    values[field.name] = parse(field, environment[name])
                except ValueError as error:
                    problems.append(f"{name}={environment[name]}: {error}")
                    unread.add(name)
            elif inherited:
                values[field.name] = checkpoint[field.name]
        config = cls(**values)
        # Resolved now, so that a checkpoint of this run knows its frequencies whatever length it is evaluated at.
        config = dataclasses.replace(config, spectral_l_train=config.spectral_l_train or config.train_seq_len)
        if config.spectral_use_pointer_mask and not config.copying and not unread:  # these are on where they can be
            problems += [f"{name}=1 {config.lacking_copies}" for name in (f"SPECTRAL_POINTER_{x}" for x in (
                "COPY", "QUIET", "TRUST")) if name in environment and values[name.lower()]]
        return config, problems, unread

    def impossible_combinations(self, unread: set[str] = frozenset()) -> list[str]:
        """Combinations that cannot run, each as one line with its arithmetic; none with a variable that was not read."""
        problems = []

        def refuse(broken, text: str) -> None:
            if broken:
                problems.append(text)

        for name in ("train_seq_len", "val_seq_len", *(["needle_seq_len"] if self.needle_eval else [])):
            length = getattr(self, name)
            refuse(length % BLOCK, f"{name.upper()}={length} is not a multiple of {BLOCK}: {length // BLOCK * BLOCK} and "
                                   f"{(length // BLOCK + 1) * BLOCK} are")
        for total, part in (("batch_tokens", "train_seq_len"), ("val_tokens", "val_seq_len")):
            a, b = getattr(self, total), getattr(self, part)
            refuse(a % b, f"{total.upper()}={a} is not a multiple of {part.upper()}={b}: {a} / {b} = {a / b:.2f}")
        refuse(self.head_dim % 4, f"HEAD_DIM={self.head_dim} is not a multiple of 4: {self.head_dim // 4 * 4} and "
                                  f"{(self.head_dim // 4 + 1) * 4} are (half-truncated rotary embedding)")
        refuse(self.doc_delimiter >= self.vocab_size,
               f"DOC_DELIMITER={self.doc_delimiter} is outside VOCAB_SIZE={self.vocab_size}")
        refuse(self.resume not in ("0", "auto") and self.load_checkpoint, "RESUME with a path and LOAD_CHECKPOINT exclude each "
               "other: the first continues a run, the second starts from its weights")
        refuse(self.resume == "auto" and not self.run_name, "RESUME=auto needs RUN_NAME, to know which run to continue")
        refuse("/" in self.run_name or self.run_name in (".", ".."), f"RUN_NAME={self.run_name} is not a directory name")
        interval = self.checkpoint_every
        refuse(self.keep_every and not interval, f"KEEP_EVERY={self.keep_every} needs CHECKPOINT_EVERY, which is 0")
        refuse(interval and self.keep_every % interval, f"KEEP_EVERY={self.keep_every} is not a multiple of CHECKPOINT_EVERY="
               f"{interval}: {self.keep_every} / {interval} = {self.keep_every / max(interval, 1):.2f}")
        refuse(not (self.num_iterations or self.needle_eval or self.val_tokens),
               "NUM_ITERATIONS=0, NEEDLE_EVAL=0 and VAL_TOKENS=0 leave nothing to do")
        refuse(self.needle_files and not self.needle_eval, "NEEDLE_FILES is set, but NEEDLE_EVAL is 0")
        refuse(self.retrieval_passages != Config.retrieval_passages and not self.retrieval_mix,
               f"RETRIEVAL_PASSAGES={self.retrieval_passages:g} is a share of RETRIEVAL_MIX, which is 0")
        if self.attn_backend == "triton":
            refuse(self.head_dim not in TRITON_HEAD_DIMS, f"ATTN_BACKEND=triton knows HEAD_DIM "
                   f"{', '.join(map(str, TRITON_HEAD_DIMS))}, not {self.head_dim}: take ATTN_BACKEND=flex")
            refuse(self.needs_flex, f"ATTN_BACKEND=triton contradicts {self.needs_flex}, which FlexAttention alone knows")
        if self.needle_eval:
            problems += check_needle_shape(self.needle_seq_len, self.needle_distances, self.needle_anchor_len,
                                           self.needle_value_len)
        refuse(self.offset_pointers and not self.spectral_bias, f"SPECTRAL_POINTER_SOURCE={self.pointer_source} needs "
               "SPECTRAL_BIAS=1, which predicts the offsets: set it, or SPECTRAL_POINTER_SOURCE=content")
        problems += self.impossible_spectral() if self.spectral_bias or self.spectral_use_pointer_mask else []
        return [text for text in problems if unread.isdisjoint(re.findall(r"\w+", text))]

    def impossible_spectral(self) -> list[str]:
        problems = []
        shape = self.spectral_shape()
        if shape.l_train >= shape.l_max:
            problems.append(f"the wavelengths are empty: SPECTRAL_L_MAX={shape.l_max} must exceed l_train={shape.l_train} "
                            f"(SPECTRAL_L_TRAIN, else TRAIN_SEQ_LEN)")
        if shape.l_train <= BLOCK:
            problems.append(f"SPECTRAL_L_TRAIN={shape.l_train} must exceed the block of {BLOCK} tokens")
        if self.max_seq_len > MAX_POSITION:
            problems.append(f"sequences of {self.max_seq_len} tokens: the bias knows positions up to {MAX_POSITION}")
        if self.spectral_impl == "qk_aug" and self.spectral_qk_layout == "fold" and shape.num_features > self.head_dim // 2:
            problems.append(f"fold needs 2 x SPECTRAL_BANDS + 4 = {shape.num_features} of the HEAD_DIM / 2 = "
                            f"{self.head_dim // 2} dimensions that do not rotate: take fewer bands or "
                            f"SPECTRAL_QK_LAYOUT=append")
        problems += self.impossible_content() if self.content_pointers else []
        for name in ("focus", "follow", "shrink") if self.spectral_use_pointer_mask and not self.copying else ():
            value = getattr(self, f"spectral_pointer_{name}")
            if value not in (0, getattr(Config, f"spectral_pointer_{name}")):
                problems.append(f"SPECTRAL_POINTER_{name.upper()}={value:g} {self.lacking_copies}")
        if self.spectral_length_scale and not self.dense:
            problems.append(f"SPECTRAL_LENGTH_SCALE=1 is for SPECTRAL_POINTER_SOURCE=dense, not {self.pointer_source}")
        if self.spectral_pointer_mid_frac > self.spectral_pointer_full_frac:
            problems.append(f"SPECTRAL_POINTER_MID_FRAC={self.spectral_pointer_mid_frac} comes after "
                            f"SPECTRAL_POINTER_FULL_FRAC={self.spectral_pointer_full_frac}")
        if self.spectral_pointer_val_half_blocks > self.spectral_pointer_half_blocks:
            problems.append(f"SPECTRAL_POINTER_VAL_HALF_BLOCKS={self.spectral_pointer_val_half_blocks} exceeds the lists' "
                            f"width, SPECTRAL_POINTER_HALF_BLOCKS={self.spectral_pointer_half_blocks}")
        try:
            chosen = self.spectral_layer_ids()
        except ValueError:
            problems.append(f"SPECTRAL_LAYERS={self.spectral_layers} is neither long, all, nor ids like 0,4,11")
        else:
            bad = sorted(chosen - attention_layers(self.num_layers))
            if bad or not chosen:
                problems.append(f"SPECTRAL_LAYERS={self.spectral_layers}: layers {bad} have no attention in a model of "
                                f"{self.num_layers} layers" if bad else "SPECTRAL_LAYERS is empty")
        return problems

    def impossible_content(self) -> list[str]:
        problems = [f"{name.upper()}={getattr(self, name)} is not a power of two" for name in (
            "spectral_pointer_far_blocks", "spectral_pointer_asking", "spectral_landmark_dim")
            if getattr(self, name).bit_count() != 1 and not (self.pooled and name == "spectral_landmark_dim")]
        if self.spectral_pointer_heads > self.num_heads:
            problems.append(f"SPECTRAL_POINTER_HEADS={self.spectral_pointer_heads} exceeds NUM_HEADS={self.num_heads}")
        if self.spectral_pointer_readers > self.num_heads:
            problems.append(f"SPECTRAL_POINTER_READERS={self.spectral_pointer_readers} exceeds NUM_HEADS={self.num_heads}")
        if 0 < self.spectral_pointer_readers < self.spectral_pointer_heads:
            problems.append(f"SPECTRAL_POINTER_READERS={self.spectral_pointer_readers}: the SPECTRAL_POINTER_HEADS="
                            f"{self.spectral_pointer_heads} heads that search read in any case")
        if self.pooled and self.head_dim // 2 not in POINTER_DIMS:
            problems.append(f"SPECTRAL_POINTER_SOURCE=pooled knows HEAD_DIM {', '.join(str(2 * d) for d in POINTER_DIMS)}, not "
                            f"{self.head_dim}")
        if self.pooled and self.folded_features:
            problems.append("SPECTRAL_POINTER_SOURCE=pooled searches with dimensions that a folded bias takes: take "
                            "SPECTRAL_QK_LAYOUT=append")
        if not self.pooled and self.spectral_landmark_dim + self.folded_features > self.head_dim // 2:
            problems.append(f"SPECTRAL_LANDMARK_DIM={self.spectral_landmark_dim} and the bias's {self.folded_features} "
                            f"features exceed the HEAD_DIM / 2 = {self.head_dim // 2} dimensions that do not rotate")
        if self.spectral_bias and self.spectral_impl == "score_mod":
            problems.append(f"SPECTRAL_IMPL=score_mod does not go with SPECTRAL_POINTER_SOURCE={self.pointer_source}: "
                            f"take qk_aug")
        return problems

    @property
    def pointer_source(self) -> str:
        source = self.spectral_pointer_source
        return source if source != "auto" else "offset" if self.spectral_bias else "content"

    @property
    def content_pointers(self) -> bool:
        return self.spectral_use_pointer_mask and self.pointer_source in ("content", "mixed", "pooled")

    @property
    def offset_pointers(self) -> bool:
        return self.spectral_use_pointer_mask and self.pointer_source in ("offset", "mixed")

    @property
    def pooled(self) -> bool:
        return self.spectral_use_pointer_mask and self.pointer_source == "pooled"

    @property
    def dense(self) -> bool:
        return self.spectral_use_pointer_mask and self.pointer_source == "dense"

    @property
    def copying(self) -> bool:
        return self.content_pointers and self.spectral_pointer_copy and not self.pooled

    @property
    def lacking_copies(self) -> str:
        """Why what goes with copies is of no use."""
        return (f"goes with copies: it needs SPECTRAL_POINTER_COPY=1 and landmarks, SPECTRAL_POINTER_SOURCE=content or mixed "
                f"(it is {self.pointer_source})")

    @property
    def folded_features(self) -> int:
        """Dimensions of a head that the bias's features take."""
        folds = self.spectral_bias and self.spectral_impl == "qk_aug" and self.spectral_qk_layout == "fold"
        return self.spectral_shape().num_features if folds else 0

    def content_shape(self) -> ContentShape:
        return ContentShape(self.spectral_pointer_heads, self.head_dim, self.model_dim, self.spectral_landmark_dim,
                            self.spectral_pointer_asking, self.spectral_pointer_far_blocks,
                            -math.inf if self.pooled else self.spectral_pointer_floor, readers=self.spectral_pointer_readers,
                            pooled=self.pooled, copying=self.copying, trusting=self.copying and self.spectral_pointer_trust)

    def spectral_layer_ids(self) -> set[int]:
        """Layers with the bias, the pointers, or both."""
        if not (self.spectral_bias or self.spectral_use_pointer_mask):
            return set()
        if self.spectral_layers in ("long", "all"):
            return attention_layers(self.num_layers) & (long_window_layers(self.num_layers) if self.spectral_layers == "long"
                                                        else set(range(self.num_layers)))
        return {int(i) for i in self.spectral_layers.split(",")}

    def spectral_shape(self) -> SpectralShape:
        return SpectralShape(self.num_heads, self.head_dim, self.spectral_bands, self.spectral_pointers,
                             self.spectral_hidden, self.spectral_beta, self.spectral_l_train or self.train_seq_len,
                             self.spectral_l_max, self.spectral_slope, self.spectral_gate, self.spectral_subtract_zero,
                             self.spectral_share_heads, self.spectral_entropy_floor)

    @property
    def pointer_band(self) -> int:
        """Blocks of the local band next to the pointers."""
        return (self.spectral_pointer_near_blocks if self.pointer_source in ("content", "pooled")
                else self.spectral_pointer_local_blocks)

    @property
    def list_shape(self) -> ListShape:
        return ListShape(self.pointer_band, self.spectral_pointer_half_blocks,
                         max(self.spectral_pointer_global_blocks, self.spectral_pointer_global_blocks_warmup))

    @property
    def needs_flex(self) -> str:
        """The setting that only FlexAttention can serve, or nothing."""
        asked = {"SPECTRAL_IMPL=score_mod": self.spectral_bias and self.spectral_impl == "score_mod",
                 "FLEXATTN_DYNAMO_DISABLE=1": self.flexattn_dynamo_disable, "FLEXATTN_COMPILE=0": not self.flexattn_compile}
        return next((setting for setting, wanted in asked.items() if wanted), "")

    @property
    def arm(self) -> str:
        return "C" if self.spectral_use_pointer_mask else "B" if self.spectral_bias else "A"

    @property
    def max_seq_len(self) -> int:
        return max(self.train_seq_len, self.val_seq_len, self.needle_seq_len if self.needle_eval else 0)


def parse(field, text: str):
    """One variable's value from its text; ValueError says what would be right."""
    meta, kind = field.metadata, type(field.default)
    if meta["choices"] and text not in meta["choices"]:
        raise ValueError(f"must be one of {', '.join(meta['choices'])}")
    if kind is str:
        return text
    if kind is bool:
        if text not in ("0", "1"):
            raise ValueError("must be 0 or 1")
        return text == "1"
    if kind is tuple:
        try:
            return tuple(int(part) for part in text.split(","))
        except ValueError:
            raise ValueError("must be whole numbers separated by commas") from None
    try:
        value = kind(text)
    except ValueError:
        raise ValueError("must be a whole number" if kind is int else "must be a number") from None
    low, high = meta["low"], meta["high"]
    if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"must be {'' if low is None else f'at least {low:g}'}{' and ' if None not in (low, high) else ''}"
                         f"{'' if high is None else f'at most {high:g}'}" if (low, high) != (None, None) else "must be finite")
    return value


def unknown_variables(environment) -> list[str]:
    """Misspelt variables: any unknown name with one of our prefixes, and near misses of the other names."""
    known = [field.name.upper() for field in dataclasses.fields(Config)]
    problems = []
    for name in sorted(set(environment) - set(known)):
        ours = name.startswith(CHECKED_PREFIXES)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6 if ours else 0.92)
        if ours or near:
            problems.append(f"{name} is not a variable of this script" + (f"; did you mean {near[0]}?" if near else ""))
    return problems


def variable_table(markdown: bool = False) -> str:
    """All variables by group, as plain text or as the README's table."""

    def show(value):
        return (str(int(value)) if isinstance(value, bool) else ",".join(map(str, value)) if isinstance(value, tuple)
                else f"{value:g}" if isinstance(value, float) else str(value))

    lines, group = [], None
    for field in dataclasses.fields(Config):
        meta = field.metadata
        if meta["group"] != group:
            group = meta["group"]
            lines += ["", f"**{group}**", "", "| variable | default | meaning |", "| --- | --- | --- |"] if markdown else \
                     ["", f"{group}:"]
        text = meta["help"] + (f" ({' | '.join(meta['choices'])})" if meta["choices"] else "")
        name, default = field.name.upper(), show(field.default)
        lines.append(f"| `{name}` | {f'`{default}`' if default else 'empty'} | {text.replace('|', '/')} |" if markdown
                     else f"  {name}={default}\n      {text}")
    return "\n".join(lines).strip("\n")


# ---------------------------------------------------------------------------------------------------------------------
# Model. With SPECTRAL_BIAS=0 it is baseline.py's, parameter for parameter and operation for operation.

ATTENTION_SCALE = 0.12
LONG_WINDOW_BLOCKS = 13.5  # the long window grows from 1 to 14 blocks
HELD_BLOCKS = 2  # of it under SPECTRAL_WINDOW_HOLD
IDLE_BLOCKS = 0.5  # claims of a query block below which content pointers retrieve nothing yet
LEARNING_FRAC = 0.1  # of the steps, from the pointers' start on, after which they should
WINDOW_SLOTS = (math.ceil(LONG_WINDOW_BLOCKS) // 2, math.ceil(LONG_WINDOW_BLOCKS))  # of the short and of the long one
QUIET = 3.0  # at the start the head says by itself sigmoid(3) = 0.95 of what it would
EVAL_CHUNK = 131_072  # tokens of an evaluation whose MLP activations, and whose logits, exist at once


@torch.library.custom_op("scope::fp8_linear", mutates_args=())
def fp8_linear(x_TC: Tensor, w_VC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x @ w.T with e4m3 operands; returns bf16 logits and the two quantised operands that the backward needs."""
    x8, w8 = quantise_x(x_TC), quantise_w(w_VC)
    out = torch._scaled_mm(x8, w8.T, out_dtype=torch.bfloat16, scale_a=x_TC.new_full((), FP8_X_SCALE, dtype=torch.float32),
                           scale_b=x_TC.new_full((), FP8_W_SCALE, dtype=torch.float32), use_fast_accum=True)
    return out, x8, w8


@fp8_linear.register_fake
def _(x_TC, w_VC):
    return (x_TC.new_empty(x_TC.size(0), w_VC.size(0), dtype=torch.bfloat16),
            torch.empty_like(x_TC, dtype=torch.float8_e4m3fn), torch.empty_like(w_VC, dtype=torch.float8_e4m3fn))


@torch.library.custom_op("scope::fp8_linear_backward", mutates_args=())
def fp8_linear_backward(grad_TV: Tensor, x8: Tensor, w8: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in e5m2. Their fixed scale is made for a mean over one sequence: never divide the loss before it."""
    x_scale, w_scale, grad_scale = (grad_TV.new_full((), s, dtype=torch.float32)
                                    for s in (FP8_X_SCALE, FP8_W_SCALE, FP8_GRAD_SCALE))
    grad8 = grad_TV.div(FP8_GRAD_SCALE).to(torch.float8_e5m2)
    grad_x = torch._scaled_mm(grad8, w8.T.contiguous().T, out_dtype=torch.bfloat16,
                              scale_a=grad_scale, scale_b=w_scale, use_fast_accum=False)
    grad_w = torch._scaled_mm(x8.T.contiguous(), grad8.T.contiguous().T, out_dtype=torch.float32,
                              scale_a=x_scale, scale_b=grad_scale, use_fast_accum=False).T
    return grad_x, grad_w.contiguous()


@fp8_linear_backward.register_fake
def _(grad_TV, x8, w8):
    return torch.empty_like(x8, dtype=torch.bfloat16), torch.empty_like(w8, dtype=torch.float32)


def _fp8_setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1], output[2])


def _fp8_backward(ctx, grad_TV, _x8, _w8):
    return fp8_linear_backward(grad_TV.contiguous(), *ctx.saved_tensors)


fp8_linear.register_autograd(_fp8_backward, setup_context=_fp8_setup_context)


def fp8_available(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def uniform_weight(*shape: int) -> nn.Parameter:
    bound = 3**0.5 * 0.5 * shape[-1] ** -0.5  # half the usual standard deviation of a linear layer
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class Rotary(nn.Module):
    """Rotary embedding of half the frequencies; the other half of the dimensions does not rotate."""

    def __init__(self, head_dim: int, max_seq_len: int):
        super().__init__()
        frequency = (1 / 1024) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)
        frequency = torch.cat([frequency, frequency.new_zeros(head_dim // 4)])
        theta = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequency)
        self.register_buffer("cos", theta.cos().float(), persistent=False)
        self.register_buffer("sin", theta.sin().float(), persistent=False)

    def forward(self, x_BTHD: Tensor) -> Tensor:
        cos, sin = (t[None, : x_BTHD.size(1), None] for t in (self.cos, self.sin))
        x1, x2 = x_BTHD.float().chunk(2, dim=-1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).type_as(x_BTHD)


class Context(NamedTuple):
    """What every layer of one forward needs to know of its sequence."""

    documents: Documents
    windows: tuple  # (short, long) BlockLists of the sliding windows, and of all of the past where some layers read that
    window_blocks: tuple  # (short, long) width of these now, int32 scalars
    pointers: PointerState
    sample: Tensor  # int32 scalar, which rows of the past the landmarks are taught with


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width = config.num_heads * config.head_dim
        self.qkv_w = uniform_weight(3, width, config.model_dim)
        self.out_w = nn.Parameter(torch.zeros(config.model_dim, width))
        self.lambdas = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.spectral: SpectralBias | None = None  # these two are set by GPT after the baseline's parameters have drawn
        self.content: ContentPointers | None = None
        self.dense = False
        self.backend = "reference"

    def forward(self, x: Tensor, ve: Tensor | None, codes_TD: Tensor | None, rotary: Rotary, tables, places, context: Context,
                long_window: bool):
        """Returns the layer's output [B, T, C], what its pointer heads read of the tokens' codes [B, T, P, D] (None where none
        copies) and its LayerTelemetry (None without bias and pointers)."""
        B, T, _ = x.shape
        config, documents = self.config, context.documents
        qkv = F.linear(x, self.qkv_w.flatten(end_dim=1).type_as(x)).view(B, T, 3, config.num_heads, config.head_dim)
        q, k, v = qkv.unbind(2)
        if self.content is not None:
            q, k = self.content.blend(q, k, documents)
        q, k = norm(q), norm(k)
        lists, bias, prediction, pointing = context.windows[2 if self.dense else int(long_window)], None, None, None
        if self.spectral is not None:
            bias, prediction = self.spectral(q, tables)
        offsets = config.offset_pointers and prediction is not None
        if offsets:
            lists = pointer_lists(prediction.delta_BHTM, documents, context.pointers, config.list_shape)
        if self.content is not None:
            q, k, lists, pointing = self.point(x, q, k, lists if offsets else None, rotary, context, long_window)
        else:
            q, k = rotary(q), rotary(k)
        if self.dense and config.spectral_length_scale:
            q = q * length_scale(documents)[:, None, None].type_as(q)
        telemetry = None
        if bias is not None or pointing is not None or self.dense:
            telemetry = LayerTelemetry(lists.num_BHN, prediction and prediction.detached(), pointing)
        narrow_dot = self.backend == "triton" and config.spectral_qk_layout == "append"  # the kernels add the bias themselves
        if bias is not None and config.spectral_impl == "qk_aug" and not narrow_dot:
            q, k = augment(q, k, bias, ATTENTION_SCALE, config.spectral_qk_layout)
            bias = None
        lambdas = self.lambdas.type_as(x)
        v = lambdas[0] * v if ve is None else lambdas[0] * v + lambdas[1] * ve.view_as(v)

        def read(heads: Heads) -> Tensor:
            return heads.read(documents, ATTENTION_SCALE, self.backend)

        heads = Heads(q, k, v, lists, bias)
        if self.content is None or codes_TD is None:
            y, found_BTPD = read(heads), None
        else:
            focus, nats = (0.0, 0.0) if self.training else (config.spectral_pointer_focus, config.spectral_pointer_follow)
            y, found_BTPD = read_codes(self.content, heads, codes_TD, documents, read, places, focus, nats, self.draw)
        return F.linear(y.reshape(B, T, -1), self.out_w.type_as(x)), found_BTPD, telemetry

    def draw(self, heads: Heads, bias: BiasCoefficients) -> Heads:
        if self.backend == "triton":  # its kernels add a bias themselves
            return heads.drawn(bias)
        q, k = augment(heads.q_BTHD, heads.k_BTHD, bias, ATTENTION_SCALE, "append")
        return heads._replace(q_BTHD=q, k_BTHD=k)

    def point(self, x: Tensor, q: Tensor, k: Tensor, offsets: BlockLists | None, rotary: Rotary, context: Context,
              long_window: bool):
        """Search by content: (rotated q and k with the landmarks folded in, lists, ContentTelemetry). `offsets`: the lists of
        the predicted ones, where both point."""
        config, content = self.config, self.content
        marks = content(q, k, x)
        found = content.point(marks, context.documents, context.pointers, config.list_shape, config.num_heads,
                              context.window_blocks[int(long_window)], WINDOW_SLOTS[int(long_window)], offsets)
        plain_q, plain_k, q, k = q, k, rotary(q), rotary(k)

        def content_logits(rows_S):
            P = content.shape.heads
            rows = content.fold(q[:, rows_S], None, config.folded_features)[:, :, :P]
            return ATTENTION_SCALE * torch.einsum("bspd,btpd->pst", rows, k[:, :, :P]).float()

        losses, far_mass = torch.zeros(len(LOSSES), device=q.device), torch.zeros(content.shape.heads, device=q.device)
        if self.training and not config.pooled:
            rows = content.sample(content_logits, context.documents, context.sample)
            losses = content.losses(marks, found, plain_q, plain_k, rows)
            far_mass = content.far_mass(marks, found.claims, rows, context.documents, context.pointers)
        if not config.pooled:
            q = content.fold(q, marks.p_BTPr / ATTENTION_SCALE, config.folded_features)
            k = content.fold(k, marks.l_BTPr, config.folded_features)
        return q, k, found.lists, ContentTelemetry(found.claims, found.refused_BPN, found.log_odds_BPNR, losses, far_mass)


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc_w = uniform_weight(4 * dim, dim)
        self.proj_w = nn.Parameter(torch.zeros(dim, 4 * dim))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and x.size(1) > EVAL_CHUNK:
            return torch.cat([self(part) for part in x.split(EVAL_CHUNK, dim=1)], dim=1)
        return F.linear(F.linear(x, self.fc_w.type_as(x)).relu().square(), self.proj_w.type_as(x))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.attn = Attention(config) if layer in attention_layers(config.num_layers) else None
        self.mlp = MLP(config.model_dim)
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.long_window = layer in long_window_layers(config.num_layers)

    def forward(self, x: Tensor, x0: Tensor, ve: Tensor | None, codes: Tensor | None, rotary: Rotary, tables, places,
                context: Context):
        lambdas = self.lambdas.type_as(x)
        x = lambdas[0] * x + lambdas[1] * x0
        found, telemetry = None, None
        if self.attn is not None:
            y, found, telemetry = self.attn(norm(x), ve, codes, rotary, tables, places, context, self.long_window)
            x = x + y
        return x + self.mlp(norm(x)), found, telemetry


def long_window_layers(num_layers: int) -> set[int]:
    """0, 4, 11, 15 of 16: both ends and the quarter points; the others have half the window."""
    quarter = num_layers // 4
    return {0, quarter, num_layers - 1 - quarter, num_layers - 1}


def attention_layers(num_layers: int) -> set[int]:
    """All but layer 7 of 16, the last of the U-net's first half; models under 8 layers keep all their attention."""
    return set(range(num_layers)) - ({num_layers // 2 - 1} if num_layers >= 8 else set())


class Output(NamedTuple):
    objective: Tensor  # what is minimised: cross-entropy plus weighted regularisers
    loss: Tensor  # mean cross-entropy in nats
    telemetry: list[LayerTelemetry]


class GPT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        L, value_dim = config.num_layers, config.num_heads * config.head_dim
        self.embed = nn.Embedding(config.vocab_size, config.model_dim)
        # Value embeddings, shared by the first three layers and the last three: (0, 13), (1, 14), (2, 15) of 16.
        self.value_embeds = nn.ModuleList(nn.Embedding(config.vocab_size, value_dim) for _ in range(min(3, L // 2)))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(L))
        self.skip_weights = nn.Parameter(torch.ones(L // 2))
        self.head_w = nn.Parameter(torch.zeros(128 * math.ceil(config.vocab_size / 128), config.model_dim))
        self.rotary = Rotary(config.head_dim, config.max_seq_len)
        self.position_tables = self.place_tables = None
        generator = torch.Generator().manual_seed(config.seed)  # after all else: the arms share every other weight
        if config.content_pointers:
            for layer in sorted(config.spectral_layer_ids()):
                self.blocks[layer].attn.content = ContentPointers(config.content_shape(), generator)
        if config.copying:
            codes_VD = token_codes(config.vocab_size, len(self.head_w), config.head_dim)
            self.register_buffer("codes_VD", codes_VD, persistent=False)
            if config.spectral_pointer_follow:
                self.place_tables = PositionTables(place_frequencies(config.head_dim), config.max_seq_len)
        quiet = config.copying and config.spectral_pointer_quiet
        self.w_quiet = nn.Parameter(torch.zeros(1, config.model_dim)) if quiet else None
        for layer in config.spectral_layer_ids() if config.dense else ():
            self.blocks[layer].attn.dense = True
        if config.spectral_bias:
            self.position_tables = PositionTables(config.spectral_shape().frequencies(), config.max_seq_len)
            for layer in sorted(config.spectral_layer_ids()):
                self.blocks[layer].attn.spectral = SpectralBias(config.spectral_shape(), generator)
            weights = (config.spectral_reg_high, config.spectral_reg_mean, config.spectral_reg_entropy,
                       config.spectral_reg_edge)
            self.register_buffer("penalty_weights", torch.tensor(weights), persistent=False)

    def pointer_parameters(self) -> list[nn.Parameter]:
        """Those of the bias and of the content pointers."""
        return [p for module in self.modules() if isinstance(module, SpectralBias | ContentPointers)
                for p in module.parameters()] + ([] if self.w_quiet is None else [self.w_quiet])

    @torch.no_grad()
    def keep_head_in_range(self) -> None:
        """The FP8 head saturates weights that its gradient then pushes on unseen, until the head of an evaluation, which does
        not saturate, is another one: keep them where both agree."""
        self.head_w.clamp_(-FP8_W_LARGEST, FP8_W_LARGEST)

    def head(self) -> Tensor:
        """[V, C], and where pointer heads copy [V, C + D]: the codes say what they read."""
        return torch.cat([self.head_w, CODE * self.codes_VD], 1) if self.config.copying else self.head_w

    def use_backend(self, backend: str) -> None:
        for block in self.blocks:
            if block.attn is not None:
                block.attn.backend = backend

    def hidden(self, tokens_T: Tensor, context: Context) -> tuple[Tensor, list[LayerTelemetry]]:
        L = self.config.num_layers
        x = x0 = norm(self.embed(tokens_T)[None])
        ve = [table(tokens_T)[None] for table in self.value_embeds]
        ve = ve + [None] * (L - 2 * len(ve)) + ve
        tables, places = (module() if module is not None else None for module in (self.position_tables, self.place_tables))
        codes_TD = self.codes_VD[tokens_T].type_as(x) if self.config.copying else None
        skips, copies, telemetry = [], [], []
        for i, block in enumerate(self.blocks):
            if i >= L - L // 2:
                x = x + self.skip_weights[i - (L - L // 2)].type_as(x) * skips.pop()
            x, found, seen = block(x, x0, ve[i], codes_TD, self.rotary, tables, places, context)
            copies += [(block.attn.content, found[0])] if found is not None else []
            if i < L // 2:
                skips.append(x)
            telemetry += [seen] if seen is not None else []
        x_TC = norm(x)[0]
        if copies:
            said_TD = sum(content.say(x_TC, found_TPD, codes_TD, context.documents) for content, found_TPD in copies) / CODE
            if self.w_quiet is not None:
                x_TC = x_TC * torch.sigmoid(QUIET - F.linear(x_TC, self.w_quiet.type_as(x_TC)))
            x_TC = torch.cat([x_TC, said_TD], 1)
        return x_TC, telemetry

    def logits(self, x_TC: Tensor) -> Tensor:
        if self.training and fp8_available(x_TC.device):
            z = fp8_linear(x_TC.contiguous(), self.head())[0]
        elif self.config.copying and self.config.spectral_pointer_shrink and not self.training:
            x_TC, said_TD = x_TC.tensor_split([self.config.model_dim], 1)
            z = F.linear(x_TC, self.head_w.type_as(x_TC)) + self.said_by_more_than_chance(said_TD)
        else:
            z = F.linear(x_TC, self.head().type_as(x_TC))
        return LOGIT_CAP * torch.sigmoid(z.float() / LOGIT_TEMPERATURE)

    def said_by_more_than_chance(self, said_TD: Tensor) -> Tensor:
        """[T, V]: what codes say, nearer to 0 by SPECTRAL_POINTER_SHRINK standard deviations of what they say of a token that
        was not read, a sum of signs times D numbers; what is smaller is not said. Then all of it is multiplied by what gives a
        token that has the whole attention its gate again."""
        deviations = self.config.spectral_pointer_shrink
        z = F.linear(said_TD, CODE * self.codes_VD.type_as(said_TD))
        chance_T1 = deviations * CODE * said_TD.norm(dim=-1, keepdim=True)
        return (z - z.clamp(-chance_T1, chance_T1)) / (1 - deviations * self.config.head_dim**-0.5)

    def cross_entropy(self, x_TC: Tensor, targets_T: Tensor) -> Tensor:
        """Mean over the tokens, in nats."""
        if not torch.is_grad_enabled() and len(x_TC) > EVAL_CHUNK:
            parts = zip(x_TC.split(EVAL_CHUNK), targets_T.split(EVAL_CHUNK), strict=True)
            return sum(self.cross_entropy(x, y) * len(x) for x, y in parts) / len(x_TC)
        if (self.config.head_loss == "fused" and self.training and torch.is_grad_enabled()
                and fp8_available(x_TC.device)):
            return head_loss(x_TC, self.head(), targets_T)
        return F.cross_entropy(self.logits(x_TC), targets_T)

    def forward(self, tokens_T: Tensor, targets_T: Tensor, context: Context) -> Output:
        x_TC, telemetry = self.hidden(tokens_T, context)
        loss = self.cross_entropy(x_TC, targets_T)
        objective = loss
        if telemetry and self.config.spectral_bias:
            penalties = torch.stack([layer.prediction.penalties for layer in telemetry]).mean(0)
            objective = objective + (penalties * self.penalty_weights).sum()
        if telemetry and self.config.content_pointers:
            objective = objective + self.config.spectral_reg_landmark * sum(layer.pointing.losses.sum() for layer in telemetry)
        return Output(objective, loss, telemetry)

    def score_end(self, tokens_T: Tensor, context: Context, last: int) -> tuple[Tensor, Tensor, list[Claims]]:
        """Nats of the last tokens of a sequence and what greedy decoding says in their places, each [last]; the head sees those
        positions only. And what the content pointers of every layer that has them claimed in the last tiles, one more than
        those tokens fill."""
        x_TC, telemetry = self.hidden(tokens_T, context)
        tiles = min(math.ceil(last / BLOCK) + 1, len(tokens_T) // BLOCK)
        claims = [Claims(*(t[:, :, -tiles:] for t in layer.pointing.claims)) for layer in telemetry if layer.pointing]
        log_p = self.logits(x_TC[-last - 1 : -1]).log_softmax(-1)
        targets = tokens_T[-last:].long()
        return -log_p.gather(-1, targets[:, None])[:, 0], log_p.argmax(-1), claims


def build_model(config: Config, device: torch.device) -> GPT:
    torch.manual_seed(config.seed)  # drawn on the CPU: the same weights on every rank and every machine
    model = GPT(config).to(device)
    if device.type == "cuda":  # embeddings carry the activation dtype; matrices stay fp32 and are cast in the forward
        for table in (model.embed, *model.value_embeds):
            table.bfloat16()
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers and schedules

NEWTON_SCHULZ = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                 (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))


def newton_schulz(g: Tensor) -> Tensor:
    """Approximate the polar factor U V^T of every matrix [..., rows, cols] by five odd quintic steps."""
    x = g.bfloat16() if g.is_cuda else g
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz. Every rank keeps all momenta (gradients are already averaged), so any rank
    can save them; the orthogonalisation is dealt out, and its results are gathered."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float):
        shapes = list(dict.fromkeys(p.shape for p in params))
        groups = [dict(params=[p for p in params if p.shape == shape]) for shape in shapes]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.rank, self.world_size = world()[:2]
        self.orthogonalise = torch.compile(newton_schulz, dynamic=False) if params[0].is_cuda else newton_schulz

    @torch.no_grad()
    def step(self):
        pending = []
        for group in self.param_groups:
            params, m = group["params"], group["momentum"]
            grads = [p.grad for p in params]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - m)
            share = math.ceil(len(params) / self.world_size)  # matrices a rank orthogonalises, the last ones padded
            mine = range(self.rank * share, min((self.rank + 1) * share, len(params)))
            nesterov = [grads[i].lerp(momenta[i], m) for i in mine]
            nesterov += [torch.zeros_like(params[0])] * (share - len(mine))
            updates = self.orthogonalise(torch.stack(nesterov))
            work = None
            if self.world_size > 1:
                local, updates = updates.contiguous(), updates.new_empty(self.world_size * share, *updates.shape[1:])
                with collective():
                    work = dist.all_gather(list(updates.chunk(self.world_size)), local, async_op=True)
            pending.append((group, updates, work))
        for group, updates, work in pending:  # each gather overlaps the orthogonalisation of the next group
            if work is not None:
                with collective():
                    work.wait()
            params, lr = group["params"], group["lr"]
            rows, cols = params[0].shape[-2:]
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, [u.to(params[0].dtype) for u in updates[: len(params)].unbind(0)],
                                alpha=-lr * max(1, rows / cols) ** 0.5)


def make_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    spectral = model.pointer_parameters()
    ours = {id(p) for p in spectral}
    matrices = [p for p in model.blocks.parameters() if p.ndim >= 2 and id(p) not in ours]
    embeddings = [table.weight for table in (model.embed, *model.value_embeds)]
    scalars = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=[model.head_w], lr=0.1 * model.config.model_dim**-0.5),
              dict(params=embeddings, lr=0.3), dict(params=scalars, lr=0.015)]
    if spectral:
        groups.append(dict(params=spectral, lr=model.config.spectral_lr))
    adam = torch.optim.Adam(groups, betas=(0.8, 0.95), eps=1e-10, fused=True)
    optimizers = [adam, Muon(matrices, lr=0.025, weight_decay=0.01, momentum=0.95)]
    covered = [id(p) for opt in optimizers for group in opt.param_groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters()), "a parameter is in no group, or in two"
    for opt in optimizers:
        for group in opt.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


class Schedule(NamedTuple):
    """Every scheduled value at `step` of `total` steps."""

    config: Config
    step: int
    total: int

    @property
    def progress(self) -> float:
        return self.step / max(self.total, 1)

    @property
    def lr_factor(self) -> float:
        cooldown = self.config.cooldown_frac
        return 1.0 if self.progress < 1 - cooldown else (1 - self.progress) / cooldown

    @property
    def muon_momentum(self) -> float:
        return 0.85 + 0.10 * min(self.step / 300, 1.0)

    @property
    def long_window(self) -> int:
        hold = self.config.spectral_window_hold
        grown = math.ceil(LONG_WINDOW_BLOCKS * (self.step - hold * self.total) / max((1 - hold) * self.total, 1))
        return max(HELD_BLOCKS if hold else 1, grown)

    def pointer_radius(self, training: bool = True) -> int:
        """Blocks on each side of a pointer; -1: pointers off."""
        c = self.config
        if not training and c.spectral_pointer_val_force:
            forced = c.spectral_pointer_val_half_blocks
            return c.spectral_pointer_half_blocks if forced < 0 else forced
        if c.spectral_pointer_schedule and self.progress < c.spectral_pointer_mid_frac:
            return -1
        if c.spectral_pointer_schedule and self.progress < c.spectral_pointer_full_frac:
            return c.spectral_pointer_half_blocks // 2
        return c.spectral_pointer_half_blocks

    @property
    def global_blocks(self) -> int:
        warming = self.step < self.config.spectral_pointer_global_blocks_warmup_steps
        return (self.config.spectral_pointer_global_blocks_warmup if warming
                else self.config.spectral_pointer_global_blocks)

    def context(self, tokens_T: Tensor, training: bool, backend: str) -> Context:
        """All that varies enters the compiled model as tensors of fixed shape, so that no schedule ever recompiles."""
        c = self.config
        values = torch.tensor([max(1, self.long_window // 2), self.long_window, c.pointer_band,
                               self.pointer_radius(training), self.global_blocks, self.sampled_phase(len(tokens_T))],
                              dtype=torch.int32)
        values = values.to(tokens_T.device, non_blocking=True).unbind()
        documents = Documents.of(tokens_T, c.doc_delimiter)
        windows = [window_lists(documents, *window) for window in zip(values, WINDOW_SLOTS, strict=False)]
        if c.dense:
            windows.append(past_lists(documents))
        windows = [prepare(lists, documents, backend=backend, needs_grad=training) for lists in windows]
        return Context(documents, tuple(windows), tuple(values[:2]), PointerState(*values[2:5]), values[5])

    def sampled_phase(self, length: int) -> int:
        """Where in its stride of tokens each sampled row of this step lies (a multiplicative hash of the step)."""
        return self.step * 2654435761 % 2**32 * (length // ContentShape().rows) >> 32

    def listed_blocks(self, layer: int) -> int:
        """Upper bound of the key blocks that a query block of this layer reads now."""
        c = self.config
        if layer in c.spectral_layer_ids() and c.spectral_use_pointer_mask:
            if c.dense:
                return c.train_seq_len // BLOCK
            offsets = c.spectral_pointers * max(0, 2 * self.pointer_radius() + 1) if c.offset_pointers else 0
            near = c.pointer_band + self.global_blocks + offsets
            others = near if c.offset_pointers else self.window(layer)
            searching = c.spectral_pointer_heads if c.content_pointers else 0
            far = c.spectral_pointer_far_blocks * c.content_shape().matching if c.content_pointers else 0  # of all heads
            again = searching * (near + c.spectral_pointer_far_blocks) if c.copying else 0  # pointer heads' codes
            return (searching * near + (c.num_heads - searching) * others + far + again) // c.num_heads
        return self.window(layer)

    def window(self, layer: int) -> int:
        """Blocks of the layer's sliding window."""
        return self.long_window if layer in long_window_layers(self.config.num_layers) else max(1, self.long_window // 2)


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}  # dense bf16, datasheets


def flops_per_token(model: GPT, schedule: Schedule) -> float:
    """Forward and backward: 6 per matrix parameter, 12 H D per visible key (listed blocks, an upper bound)."""
    c = schedule.config
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim >= 2) + model.head_w.numel()
    matrices += model.codes_VD.numel() if c.copying else 0
    keys = sum(min(BLOCK * schedule.listed_blocks(i), c.train_seq_len) for i in attention_layers(c.num_layers))
    return 6.0 * matrices + 12.0 * c.num_heads * c.head_dim * keys


# ---------------------------------------------------------------------------------------------------------------------
# Data

MIXER_COUNTS = 1 << 27  # tokens, as many of every training shard, by which RETRIEVAL_MIX chooses its vocabulary
MIXED_SAMPLE = 4  # sequences in which a run looks how much of the mix finds room


def batches_in(tokens: int, batch: int) -> int:
    """Whole batches in a shard: a batch needs one token more than it has inputs, and the last part batch is dropped."""
    return max(0, math.ceil((tokens - batch - 1) / batch))


class TokenLoader:
    """Contiguous slices of batch + 1 tokens, shard after shard, the same for every number of processes."""

    def __init__(self, pattern: str, batch: int, vocab_size: int, epochs: int = 0):
        self.batch, self.vocab_size, self.epochs = batch, vocab_size, epochs
        self.paths = shards.find_shards(pattern)
        self.batches = [batches_in(shards.token_count(path), batch) for path in self.paths]
        for path, count in zip(self.paths, self.batches, strict=True):
            if count == 0:
                raise ValueError(f"{path}: holds {shards.token_count(path)} tokens, less than one batch of {batch} + 2: "
                                 f"merge shards (data/tokenize_text.py --shard-tokens) or take smaller batches")
        self.position = dict(epoch=0, shard=0, batch=0)  # of the next batch
        self.file, self.opened = None, None

    def next_batch(self) -> np.ndarray:
        """uint16 [batch + 1]. Read, not mapped: a shard that is cut or lost in mid-run is a line and not a bus error."""
        p = self.position
        if self.epochs and p["epoch"] >= self.epochs:
            raise Stop(f"the training shards are used up: EPOCHS={self.epochs} passes are over; add shards or raise EPOCHS")
        path = self.paths[p["shard"]]
        try:
            if self.opened != p["shard"]:  # a run opens a shard when its turn comes, long after the checks at its start
                shards.check_tokens(path, shards.open_shard(path), self.vocab_size)
                if self.file:
                    self.file.close()
                self.file, self.opened = open(path, "rb"), p["shard"]
            tokens = shards.read_tokens(self.file, p["batch"] * self.batch, self.batch + 1)
        except (ValueError, OSError) as error:
            raise Stop(str(error)) from None
        p["batch"] += 1
        if p["batch"] == self.batches[p["shard"]]:
            p["shard"], p["batch"] = p["shard"] + 1, 0
        if p["shard"] == len(self.paths):
            p["shard"], p["epoch"] = 0, p["epoch"] + 1
        return tokens

    def peek(self) -> np.ndarray:
        """What next_batch will return."""
        position = dict(self.position)
        try:
            return self.next_batch()
        finally:
            self.position = position

    def has(self, position: dict) -> bool:
        return position["shard"] < len(self.paths) and position["batch"] < self.batches[position["shard"]]

    def policy(self, batches: int) -> str:
        """What EPOCHS allows, and what a run of so many batches takes."""
        total = sum(self.batches)
        return (f"training data: {len(self.paths)} shards, {total} batches a pass; {batches} steps take {batches / total:.2f} "
                f"passes, EPOCHS={self.epochs} allows {self.epochs or 'any number'}")

    def fingerprint(self) -> list[tuple[str, int, str]]:
        """(name, tokens, hash of a sample of the content) of every shard."""
        return [(path.name, shards.token_count(path), shards.fingerprint(path)) for path in self.paths]

    def check(self, batches: int, epochs: int, every_token: bool) -> None:
        """ValueError if the shards cannot give this many batches in this many passes (0: any number)."""
        total = sum(self.batches)
        if epochs and batches > epochs * total:
            raise ValueError(f"{len(self.paths)} shards hold {total} batches of {self.batch} tokens, {epochs} x that is "
                             f"less than the {batches} wanted: add shards, raise EPOCHS or lower NUM_ITERATIONS / VAL_TOKENS")
        for path in self.paths if every_token else self.paths[:1]:
            shards.check_tokens(path, shards.open_shard(path), self.vocab_size)


def local_sequences(batch: np.ndarray, seq_len: int, device: torch.device, mix=None):
    """This process's sequences of one global batch: (inputs int32 [T], targets int64 [T]). mix(tokens [T + 1], index of the
    sequence in the batch) -> the tokens to take instead."""
    rank, world_size, _ = world()
    for start in range(rank * seq_len, len(batch) - 1, world_size * seq_len):
        tokens = batch[start : start + seq_len + 1]
        tokens = torch.from_numpy((mix(tokens, start // seq_len) if mix else tokens).astype(np.int32))
        tokens = (tokens.pin_memory() if device.type == "cuda" else tokens).to(device, non_blocking=True)
        yield tokens[:-1], tokens[1:].long()


class MixedAhead:
    """The mixer, a step ahead: a process of its own mixes the next step's sequences while the GPU works on this one's."""

    def __init__(self, mixer: Mixer, loader: TokenLoader, seq_len: int):
        self.mixer, self.loader, self.seq_len = mixer, loader, seq_len
        self.process, self.thread = MixerProcess(mixer), ThreadPoolExecutor(1, "mix")  # the thread waits for the process
        self.step, self.sequences = None, {}

    def of_step(self, step: int):
        """For local_sequences: mix(tokens, index), which raises Stop where the process has ended."""
        made = self.sequences if self.step == step else {}

        def mix(tokens, index):
            try:
                return made[index].result() if index in made else self.mixer.mix(step, tokens, index)
            except RuntimeError as error:
                raise Stop(f"step {step}: {error}; the last checkpoint is intact") from None

        return mix

    def prepare(self, step: int) -> None:
        """Start on a step; the loader stands before its batch. Where there is none, next_batch will say so in its turn."""
        self.step, self.sequences = None, {}
        try:
            batch = self.loader.peek()
        except Stop:
            return
        rank, world_size, _ = world()
        self.step = step
        for i in range(rank, (len(batch) - 1) // self.seq_len, world_size):
            tokens = batch[i * self.seq_len : (i + 1) * self.seq_len + 1]
            self.sequences[i] = self.thread.submit(self.process.mix, step, tokens, i)

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)
        self.process.close()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def differing_settings(old: dict, new: Config, groups: tuple[str, ...], free: bool = False) -> list[str]:
    """Of RESUME_MAY_DIFFER if `free`, of the others else. What an older checkpoint does not know is taken to have been what the
    default is now."""
    pairs = [(f, old.get(f.name, f.default), getattr(new, f.name)) for f in dataclasses.fields(Config)]
    return [f"{f.name.upper()} was {was}, is {now}" for f, was, now in pairs
            if f.metadata["group"] in groups and (f.name in RESUME_MAY_DIFFER) == free and was != now]


def differing_shards(old: list, new: list) -> str | None:
    """How the training shards differ from a checkpoint's, in content and order; where they lie and what they are called
    does not matter."""
    if len(old) != len(new):
        return f"it had {len(old)} training shards, there are {len(new)}"
    for i, (was, now) in enumerate(zip(old, new, strict=True)):
        if tuple(was[1:]) != tuple(now[1:]):
            return f"training shard {i} was {was[0]} with {was[1]} tokens, is {now[0]} with {now[1]}" \
                   + (" of other content" if was[1] == now[1] else "")
    return None


def checkpoint_bytes(model: nn.Module, device_type: str) -> int:
    """Size of a checkpoint: the weights, Muon's momentum of the blocks' matrices, Adam's two moments of all else."""
    embeddings = {id(table.weight) for table in (model.embed, *model.value_embeds)}
    spectral = {id(p) for p in model.pointer_parameters()}
    matrices = {id(p) for p in model.blocks.parameters() if p.ndim >= 2} - spectral
    return sum(p.numel() * (2 if device_type == "cuda" and id(p) in embeddings else 4) * (2 if id(p) in matrices else 3)
               for p in model.parameters())


def load_weights(model: GPT, state: dict, path, assign: bool = False) -> None:
    differences = differing_settings(state["config"], model.config, ("model",))
    if differences:
        raise Stop(f"{path} holds another model: {'; '.join(differences)}")
    try:
        model.load_state_dict(dict(state["model"]), assign=assign)  # a copy: torch leaves `assign` noted in the original
    except RuntimeError as error:
        raise Stop(f"{path} does not fit this model: {' '.join(str(error).split())[:300]}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Training


def choose_backend(config: Config, device: torch.device) -> tuple[str, bool, str]:
    """(attention backend, whether the model is compiled, why)."""
    compiled = config.torch_compile == "1" or (config.torch_compile == "auto" and device.type == "cuda")
    wanted = config.attn_backend
    if wanted == "reference" or (wanted == "auto" and device.type != "cuda"):
        return "reference", compiled, ("ATTN_BACKEND=reference" if wanted != "auto"
                                       else "no CUDA device: plain PyTorch block gather")
    if device.type != "cuda":
        raise Stop(f"ATTN_BACKEND={wanted} needs a CUDA GPU: on the CPU there is ATTN_BACKEND=reference")
    capability = torch.cuda.get_device_capability(device)
    if wanted == "triton" and capability < TRITON_CAPABILITY:
        raise Stop(f"ATTN_BACKEND=triton copies by TMA, from compute capability {TRITON_CAPABILITY[0]}.0 on; this GPU has "
                   f"{capability[0]}.{capability[1]}: take ATTN_BACKEND=flex")
    hindrances = [config.needs_flex, capability < TRITON_CAPABILITY and f"compute capability {capability[0]}.{capability[1]}",
                  config.head_dim not in TRITON_HEAD_DIMS and f"HEAD_DIM={config.head_dim}"]
    hindrance = next(filter(None, hindrances), "")
    if wanted == "triton" or (wanted == "auto" and not hindrance):
        return "triton", compiled, "ATTN_BACKEND=triton" if wanted == "triton" else "auto: our kernels are the fastest here"
    why = "ATTN_BACKEND=flex" if wanted == "flex" else f"auto: our kernels do not serve {hindrance}"
    longest = MAX_TABLE_BLOCKS * BLOCK
    if config.spectral_use_pointer_mask and config.num_iterations and config.train_seq_len > longest:
        raise Stop(f"TRAIN_SEQ_LEN={config.train_seq_len}: FlexAttention's backward over pointer lists takes at most {longest} "
                   f"tokens (ATTN_BACKEND=triton has no such limit)")
    if config.content_pointers and config.max_seq_len > longest:
        raise Stop(f"sequences of {config.max_seq_len} tokens: FlexAttention takes at most {longest} with pointers that search "
                   f"(ATTN_BACKEND=triton has no such limit)")
    if compiled and config.needs_flex in ("", "FLEXATTN_COMPILE=0"):
        return "flex", compiled, f"{why}; inside the compiled model"
    if config.flexattn_compile:
        return "flex_standalone", compiled, f"{why}; compiled by itself, the graph is broken around it"
    return "reference", compiled, (f"{why}; FLEXATTN_COMPILE=0 outside a compiled graph leaves the plain block gather, far "
                                   f"slower (uncompiled FlexAttention would ignore the block lists)")


def compile_options(config: Config, backend: str) -> dict:
    return dict(dynamic=False, fullgraph=backend in ("flex", "triton"),
                mode=None if config.torch_compile_mode == "default" else config.torch_compile_mode)


class Trainer:
    def __init__(self, config: Config, device: torch.device, run: RunDirectory, trained: dict[str, str] | None = None):
        """trained: hash to name of the shards that this training and those before it read."""
        self.config, self.device, self.run, self.trained = config, device, run, trained or {}
        random.seed(config.seed)
        self.model = build_model(config, device)
        self.optimizers = make_optimizers(self.model)
        self.train_loader = self.val_loader = None
        try:
            if config.num_iterations:
                self.train_loader = TokenLoader(config.train_files, config.batch_tokens, config.vocab_size, config.epochs)
            if config.val_tokens:
                self.val_loader = TokenLoader(config.val_files, config.val_tokens, config.vocab_size)
        except ValueError as error:  # shards that were sound when the run was checked
            raise Stop(str(error)) from None
        self.data = self.train_loader.fingerprint() if self.train_loader else None
        self.step, self.total_steps = 0, config.num_iterations
        self.best_val_loss = math.inf
        self.saved_step = None  # of the newest checkpoint
        self.stopping = False  # a signal reached some process, and by now all know of it
        self.telemetry, self.telemetry_documents = [], None
        self.graphs_after_warm_up = 0
        self.compile()

    def compile(self) -> None:
        backend, self.compiled, reason = choose_backend(self.config, self.device)
        self.use_backend(backend, reason)
        self.forward, self.score_end = self.model, self.model.score_end
        if self.compiled:
            torch._dynamo.config.recompile_limit = 64  # one graph per (training or not, length); silent eager beyond
            options = compile_options(self.config, backend)
            self.forward = torch.compile(self.model, **options)
            self.score_end = torch.compile(self.model.score_end, **options)
        self.clear_gradients()

    def use_backend(self, backend: str, reason: str) -> None:
        self.backend = backend
        self.model.use_backend(backend)
        self.run.log(f"attention backend: {backend} ({reason}); compiled: {int(self.compiled)}")
        if self.config.spectral_bias and self.config.spectral_impl == "score_mod":
            self.run.log("SPECTRAL_IMPL=score_mod is slow: at 64k tokens on an H200 six times the attention time of qk_aug")
        if self.config.torchdynamo_suppress_errors:
            self.run.log("TORCHDYNAMO_SUPPRESS_ERRORS=1: what fails to compile runs uncompiled, and slowly")

    def schedule(self) -> Schedule:
        return Schedule(self.config, self.step, self.total_steps)

    def context(self, tokens_T: Tensor) -> Context:
        PROGRESS.sequences += 1
        return self.schedule().context(tokens_T, self.model.training, self.backend)

    @property
    def cuda_graphs(self) -> bool:
        return self.compiled and self.config.torch_compile_mode != "default"

    def new_graph_step(self) -> None:
        """CUDA graphs reuse the memory of their outputs from here on."""
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def clear_gradients(self) -> None:
        """Gradients are allocated by the backward, except under CUDA graphs: there they must outlive the graph's memory, so
        the backward adds to tensors of their own."""
        self.model.zero_grad(set_to_none=not self.cuda_graphs)
        if self.cuda_graphs:
            for p in self.model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    def accumulate(self, sequences) -> Tensor:
        """Forward and backward of this process's sequences; returns the sum of their losses. Losses are not divided before
        the backward: the FP8 head's gradient scale is made for a mean over one sequence."""
        self.model.train()
        loss = torch.zeros((), device=self.device)
        for tokens, targets in sequences:
            context = self.context(tokens)
            self.new_graph_step()
            out = self.forward(tokens, targets, context)
            out.objective.backward()
            loss += out.loss.detach()
            self.telemetry, self.telemetry_documents = out.telemetry, context.documents
        return loss

    def train_step(self, sequences) -> tuple[float, float]:
        """One optimizer step; returns the mean loss over the global batch and the norm of its gradient. A loss or gradient
        that is not finite stops every rank before any weight changes. A signal to any rank travels with the loss."""
        num_sequences = self.config.batch_tokens // self.config.train_seq_len
        loss = self.accumulate(sequences)
        grads = [p.grad for p in self.model.parameters()]
        sums = torch.stack([loss, torch.full_like(loss, SIGNALS.received is not None)])
        all_reduce([*grads, sums])
        torch._foreach_div_(grads, num_sequences)
        grad_norm = torch.stack([n.float() for n in torch._foreach_norm(grads)]).norm()
        loss, grad_norm, signalled = torch.stack([sums[0] / num_sequences, grad_norm, sums[1]]).tolist()
        self.stopping = SIGNALS.agree(signalled)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise Stop(f"step {self.step}: loss {loss}, gradient norm {grad_norm}: not finite; no weight was changed and "
                       f"the last checkpoint is intact")
        schedule = self.schedule()
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["lr"] = group["initial_lr"] * schedule.lr_factor
                if isinstance(opt, Muon):
                    group["momentum"] = schedule.muon_momentum
            opt.step()
        if fp8_available(self.device):
            self.model.keep_head_in_range()
        self.clear_gradients()
        return loss, grad_norm

    @torch.no_grad()
    def compare_ranks(self) -> None:
        """Stop unless all processes hold the same parameters bit for bit: compares a sum over the bits of each."""
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for factor, p in enumerate(self.model.parameters(), 1):
            bits = p.view(torch.int16 if p.element_size() == 2 else torch.int32).flatten()
            for part in bits.split(1 << 24):  # the sum widens what it reads to int64
                total += (2 * factor + 1) * part.sum(dtype=torch.int64)
        sums = all_ranks(total)
        if len(set(sums)) > 1:
            other = [rank for rank, value in enumerate(sums) if value != sums[0]]
            raise Stop(f"step {self.step}: the parameters of rank {', '.join(map(str, other))} differ from rank 0's: memory or "
                       f"transport fault; resume from a checkpoint before it")

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss; cut short, and then of no use, when a signal sets `stopping`."""
        config = self.config
        self.model.eval()
        loss = torch.zeros((), device=self.device)
        self.val_loader.position = dict(epoch=0, shard=0, batch=0)
        for tokens, targets in local_sequences(self.val_loader.next_batch(), config.val_seq_len, self.device):
            if SIGNALS.received:
                break
            context = self.context(tokens)
            self.new_graph_step()
            out = self.forward(tokens, targets, context)
            loss += out.loss
            self.telemetry, self.telemetry_documents = out.telemetry, context.documents
        sums = torch.stack([loss, torch.full_like(loss, SIGNALS.received is not None)])
        all_reduce([sums])
        loss, signalled = torch.stack([sums[0] / (config.val_tokens // config.val_seq_len), sums[1]]).tolist()
        self.stopping = SIGNALS.agree(signalled)
        return loss

    @torch.no_grad()
    def needle_eval(self, haystack: Haystack) -> dict:
        config = self.config
        self.model.eval()

        def score_answer(tokens_T: np.ndarray, answer_start: int):
            tokens = torch.from_numpy(tokens_T.astype(np.int32)).to(self.device)
            context = self.context(tokens)
            self.new_graph_step()
            nats, said, _ = self.score_end(tokens, context, len(tokens_T) - answer_start)
            return nats.float().cpu().numpy(), said.cpu().numpy() == tokens_T[answer_start:]

        def reduce(array: np.ndarray) -> np.ndarray:
            total = torch.from_numpy(array).to(self.device)
            all_reduce([total])
            return total.cpu().numpy()

        rank, world_size, _ = world()
        started = time.perf_counter()
        blob = evaluate_needles(score_answer, haystack, seq_len=config.needle_seq_len, distances=config.needle_distances,
                                samples_per_distance=config.needle_samples_per_distance,
                                anchor_len=config.needle_anchor_len, value_len=config.needle_value_len, seed=config.seed,
                                step=self.step, rank=rank, world_size=world_size, reduce=reduce)
        samples = len(config.needle_distances) * config.needle_samples_per_distance
        self.run.log(f"needle evaluation: {samples} forwards of {config.needle_seq_len:,} tokens over {world_size} processes "
                     f"in {time.perf_counter() - started:.2f} s")
        return blob

    def warm_up(self) -> None:
        """Compile every graph of the run on random tokens, untimed, then put every state back."""
        config = self.config
        if not self.compiled:
            return
        started = time.perf_counter()
        saved = copy.deepcopy([self.model.state_dict()] + [opt.state_dict() for opt in self.optimizers])
        generator = torch.Generator().manual_seed(config.seed)

        def random_tokens(length: int) -> Tensor:
            return torch.randint(config.vocab_size, (length,), generator=generator, dtype=torch.int32).to(self.device)

        try:
            least = int(config.torch_compile_fallback_to_eager)  # a failure must show here, where it can be mended
            for _ in range(max(config.warmup_steps, least) if config.num_iterations else 0):
                tokens = random_tokens(config.train_seq_len + 1)
                self.train_step([(tokens[:-1], tokens[1:].long())])
            with torch.no_grad():
                self.model.eval()
                if config.val_tokens:
                    tokens = random_tokens(config.val_seq_len + 1)
                    self.forward(tokens[:-1], tokens[1:].long(), self.context(tokens[:-1]))
                if config.needle_eval:
                    tokens = random_tokens(config.needle_seq_len)
                    self.score_end(tokens, self.context(tokens), config.needle_value_len)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            if not config.torch_compile_fallback_to_eager:
                raise
            self.run.log(f"compiling failed ({type(error).__name__}); going on uncompiled, slowly, as "
                         f"TORCH_COMPILE_FALLBACK_TO_EAGER=1 asks")
            self.config = dataclasses.replace(config, torch_compile="0")
            self.compile()
        self.model.load_state_dict(saved[0])
        for opt, state in zip(self.optimizers, saved[1:], strict=True):
            opt.load_state_dict(state)
        self.clear_gradients()
        self.graphs_after_warm_up = compiled_graphs()
        self.run.log(f"warm-up: {time.perf_counter() - started:.1f} s, {self.graphs_after_warm_up} graphs compiled")

    def state(self) -> dict:
        """Everything that the remaining steps depend on, in types that torch.load(weights_only=True) accepts."""
        config = dataclasses.asdict(self.config)
        return dict(config=config, step=self.step, total_steps=self.total_steps, model=self.model.state_dict(),
                    optimizers=[opt.state_dict() for opt in self.optimizers],
                    loader=dict(self.train_loader.position) if self.train_loader else None, data=self.data,
                    trained=self.trained, best_val_loss=self.best_val_loss,
                    rng=dict(python=random.getstate(), torch=torch.get_rng_state(),
                             cuda=torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []))

    def save(self, must: bool = False) -> None:
        """A checkpoint of this step, if it is wanted and not there. A full disk is no reason to stop before the last one."""
        if not self.config.save_checkpoint or self.saved_step == self.step:
            return
        try:
            if self.run.rank == 0:
                self.run.save_checkpoint(self.step, self.state())
            self.saved_step = self.step
        except Stop as stop:
            if must:
                raise
            due = min(self.step + self.config.checkpoint_every, self.config.num_iterations)
            self.run.warn(f"{stop}; the run goes on, the next checkpoint is due at step {due}")

    def resume(self, state: dict, path: Path) -> None:
        load_weights(self.model, state, path)
        try:
            for opt, saved in zip(self.optimizers, state["optimizers"], strict=True):
                opt.load_state_dict(saved)
            random.setstate(state["rng"]["python"])
            torch.set_rng_state(state["rng"]["torch"])
            if self.device.type == "cuda" and len(state["rng"]["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise Stop(f"{path}: its optimizer or random states do not fit this run ({' '.join(str(error).split())})") from None
        self.train_loader.position = dict(state["loader"])
        self.step = state["step"]
        self.best_val_loss = state["best_val_loss"]
        if path.parent.resolve() == self.run.path.resolve():
            self.saved_step = self.step
        self.run.set_aside_after(self.step)
        self.run.drop_metrics_after(self.step)
        self.run.log(f"resumed from {path} at step {self.step}")
        if changed := differing_settings(state["config"], self.config, ("spectral",), free=True):
            self.run.warn(f"validated otherwise than before: {'; '.join(changed)}")


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def check_training_data(config: Config, every_token: bool) -> TokenLoader:
    loader = TokenLoader(config.train_files, config.batch_tokens, config.vocab_size, config.epochs)
    loader.check(config.num_iterations, config.epochs, every_token)
    return loader


def make_mixer(config: Config, loader: TokenLoader) -> Mixer | None:
    """ValueError if the training text is too poor to draw keys and values from."""
    if not config.retrieval_mix:
        return None
    share, each = config.retrieval_mix, MIXER_COUNTS // len(loader.paths)
    counts_V = sum(count_tokens(shards.open_shard(path)[:each]) for path in loader.paths)
    try:
        return Mixer(share, config.retrieval_passages, config.seed, counts_V, config.doc_delimiter)
    except ValueError as error:
        raise ValueError(f"RETRIEVAL_MIX={share:g}: {config.train_files}: {error}, or set RETRIEVAL_MIX=0") from None


def check_validation_data(config: Config, every_token: bool) -> TokenLoader:
    loader = TokenLoader(config.val_files, config.val_tokens, config.vocab_size)
    loader.check(1, 1, every_token)
    return loader


def trained_shards(training: TokenLoader | None, state: dict | None) -> dict[str, str]:
    """Hash of the content to name: of the training shards, and of all that a checkpoint and those before it were trained on."""
    state = state or {}
    earlier = state.get("trained") or {digest: name for name, _, digest in state.get("data") or ()}  # older ones have no list
    own = zip(training.paths, training.fingerprint(), strict=True) if training else ()
    return earlier | {digest: str(path) for path, (*_, digest) in own}


def check_separate(trained: dict, paths: list[Path], variable: str) -> None:
    """By content: a copy of a training shard is not held out either."""
    for path in paths:
        if name := trained.get(shards.fingerprint(path)):
            raise Stop(f"{path} is a training shard, {name}: {variable} must not overlap with what the model is trained on")


def check_haystack(config: Config, trained: dict) -> Haystack:
    haystack = Haystack(shards.find_shards(config.needle_files or config.val_files), config.doc_delimiter, config.vocab_size)
    check_separate(trained, haystack.paths, "NEEDLE_FILES" if config.needle_files else "VAL_FILES")
    draw_needles(haystack, samples=config.needle_samples_per_distance, seq_len=config.needle_seq_len,
                 anchor_len=config.needle_anchor_len, value_len=config.needle_value_len, seed=config.seed)
    return haystack


def log_environment(run: RunDirectory, config: Config, device: torch.device) -> None:
    if run.copy_source(Path(__file__).resolve()):
        run.log(Path(__file__).read_text(), echo=False)
        run.log("=" * 100, echo=False)
    if device.type == "cuda":
        run.log(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout, echo=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    run.log(f"arm {config.arm}; {world()[1]} x {name}; python {sys.version.split()[0]}, torch {torch.__version__}; {run.path}")
    run.log(json.dumps(dict(tag="CONFIG", **dataclasses.asdict(config))), echo=False)
    if config.spectral_bias and config.scope_log_every:
        run.log(json.dumps(scope_bins()))


def idle_pointers(config: Config, schedule: Schedule, stats: dict) -> str | None:
    """The warning for the first SCOPE_STATS by which content pointers should have learnt, if they claim next to nothing."""
    start = config.spectral_pointer_mid_frac if config.spectral_pointer_schedule else 0
    learnt = max(config.spectral_window_hold, start + LEARNING_FRAC) * schedule.total
    claimed = max(stats.get("claimed_blocks", [IDLE_BLOCKS]))
    if not learnt < schedule.step <= learnt + config.scope_log_every or claimed >= IDLE_BLOCKS:
        return None
    return (f"content pointers claim {claimed:.2f} blocks a query block after {learnt:.0f} steps, and seldom learn to once "
            f"nearer text answers: hold the windows for longer (SPECTRAL_WINDOW_HOLD={config.spectral_window_hold:g}), raise "
            f"RETRIEVAL_MIX={config.retrieval_mix:g}, train on longer documents, or lower "
            f"SPECTRAL_POINTER_FLOOR={config.spectral_pointer_floor:g}")


def train(trainer: Trainer, ahead: MixedAhead | None) -> None:
    """The loop: validate, train, log, save. It ends early, behind a checkpoint, when a signal asks for it."""
    config, run, device = trainer.config, trainer.run, trainer.device
    world_size = world()[1]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak_flops = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    recent_seconds, mfu = deque(maxlen=20), None
    train_seconds = sum(r.get("step_ms", 0) for r in run.read_metrics()) / 1e3  # of the steps before a resumption
    bar = tqdm(total=config.num_iterations, initial=trainer.step, disable=None if run.rank == 0 else True,
               desc=f"arm {config.arm}", unit="step", dynamic_ncols=True)

    def validate() -> None:
        if config.val_tokens:
            value = trainer.validate()
            if trainer.stopping:
                return
            if not math.isfinite(value):
                raise Stop(f"step {trainer.step}: validation loss {value} is not finite; the last checkpoint is intact")
            trainer.best_val_loss = min(trainer.best_val_loss, value)
            run.metrics(step=trainer.step, val_loss=value)
            run.log(f"step {trainer.step}/{trainer.total_steps} val_loss {value:.4f} train_time {train_seconds:.1f} s")

    trainer.compare_ranks()
    while trainer.step < config.num_iterations:
        if config.val_loss_every and trainer.step % config.val_loss_every == 0:
            validate()
        if trainer.stopping:
            break
        started = time.perf_counter()
        schedule = trainer.schedule()
        epoch = trainer.train_loader.position["epoch"]
        batch = trainer.train_loader.next_batch()
        mix = ahead and ahead.of_step(trainer.step)
        if ahead and trainer.step + 1 < config.num_iterations:
            ahead.prepare(trainer.step + 1)
        loss, grad_norm = trainer.train_step(local_sequences(batch, config.train_seq_len, device, mix))
        trainer.step += 1
        PROGRESS.step = trainer.step
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        recent_seconds.append(seconds)
        train_seconds += seconds

        tokens_per_s = config.batch_tokens / seconds
        if peak_flops:
            mfu = flops_per_token(trainer.model, schedule) * tokens_per_s / (peak_flops * world_size)
        run.metrics(step=trainer.step, train_loss=loss, grad_norm=grad_norm, lr=schedule.lr_factor, step_ms=1e3 * seconds,
                    tokens_per_s=tokens_per_s, mfu=mfu, memory_gib=peak_memory_gib(device),
                    epoch=trainer.train_loader.position["epoch"])
        bar.update()
        bar.set_postfix(loss=f"{loss:.4f}", tok_s=f"{tokens_per_s:,.0f}", mfu="-" if mfu is None else f"{mfu:.1%}")
        if trainer.step % config.log_every == 0 or trainer.step == config.num_iterations:
            left = (config.num_iterations - trainer.step) * statistics.median(recent_seconds)
            run.log(f"step {trainer.step}/{config.num_iterations} loss {loss:.4f} {1e3 * seconds:.1f} ms "
                    f"{tokens_per_s:,.0f} tok/s mfu {'-' if mfu is None else f'{mfu:.1%}'} eta {left:.0f} s", echo=bar.disable)
        if trainer.train_loader.position["epoch"] > epoch:
            run.log(f"step {trainer.step}: pass {epoch + 1} over the training shards is complete (EPOCHS={config.epochs})")
        if trainer.telemetry and config.scope_log_every and trainer.step % config.scope_log_every == 0:
            state = dict(radius=schedule.pointer_radius(), global_blocks=schedule.global_blocks,
                         local_blocks=config.pointer_band, progress=schedule.progress)
            stats = scope_stats(trainer.telemetry, trainer.telemetry_documents, config.pointer_band)
            run.log(json.dumps(dict(tag="SCOPE_STATS", step=trainer.step, schedule=state, **stats)))
            if warning := idle_pointers(config, schedule, stats):
                run.warn(warning)
        if config.rank_check_every and trainer.step % config.rank_check_every == 0:
            trainer.compare_ranks()
        if config.checkpoint_every and trainer.step % config.checkpoint_every == 0 and trainer.step < config.num_iterations:
            trainer.save()
        if trainer.stopping:
            break
    bar.close()
    if not trainer.stopping:
        validate()
    if config.num_iterations:
        trainer.save(must=True)


def summarise(trainer: Trainer, needle: dict | None) -> dict:
    """summary.json: the figures come from metrics.jsonl, so that a resumed run's are those of all its steps."""
    config, run, device = trainer.config, trainer.run, trainer.device
    records = run.read_metrics()
    steps, losses = [r for r in records if "train_loss" in r], [r for r in records if "val_loss" in r]
    step_ms = statistics.median(r["step_ms"] for r in steps) if steps else None
    return dict(status="complete", arm=config.arm, run_name=run.path.name, seed=config.seed, steps=trainer.step,
                train_loss=steps[-1]["train_loss"] if steps else None, val_loss=losses[-1]["val_loss"] if losses else None,
                best_val_loss=trainer.best_val_loss if losses else None,
                tokens_per_s=1e3 * config.batch_tokens / step_ms if steps else None, step_ms=step_ms,
                mfu=statistics.median(r["mfu"] for r in steps) if steps and steps[-1]["mfu"] else None,
                train_seconds=sum(r["step_ms"] for r in steps) / 1e3, kv_blocks_per_query=mean_listed_blocks(trainer),
                peak_memory_gib=max([peak_memory_gib(device)] + [r["memory_gib"] for r in steps]),
                parameters=sum(p.numel() for p in trainer.model.parameters()),
                recompiles_after_warmup=compiled_graphs() - trainer.graphs_after_warm_up, world_size=world()[1],
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                torch=str(torch.__version__), needle=needle)


@torch.no_grad()
def mean_listed_blocks(trainer: Trainer) -> float | None:
    """Key blocks that a query block reads, averaged over the attention layers, on the last sequence seen."""
    if trainer.telemetry_documents is None:
        return None
    config, documents = trainer.config, trainer.telemetry_documents
    long = torch.tensor(trainer.schedule().long_window, dtype=torch.int32, device=trainer.device)
    by_window = [window_lists(documents, *w).num_BHN.float().mean().item()
                 for w in zip((long // 2, long), WINDOW_SLOTS, strict=True)]
    spectral = dict(zip(sorted(config.spectral_layer_ids()), trainer.telemetry, strict=True))
    counts = [spectral[i].num_BHN.float().mean().item() if i in spectral
              else by_window[i in long_window_layers(config.num_layers)] for i in attention_layers(config.num_layers)]
    return statistics.fmean(counts)


def summary_table(summary: dict) -> str:
    """The end of a run, for a person."""

    def show(value):
        return "-" if value is None else f"{value:,.4f}" if isinstance(value, float) else str(value)

    rows = [(key, show(value)) for key, value in summary.items() if key != "needle"]
    for cell in (summary["needle"] or {}).get("distances", []):
        rows.append((f"needle {cell['distance']}", f"EM {cell['exact_match']:.3f} [{cell['exact_match_low']:.3f}, "
                                                   f"{cell['exact_match_high']:.3f}] n={cell['n']}"))
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"  {key:<{width}}  {value}" for key, value in rows)


def check_world(config: Config) -> None:
    sequences, world_size = config.batch_tokens // config.train_seq_len, world()[1]
    if config.num_iterations and world_size > sequences:
        raise Stop(f"{world_size} processes, but BATCH_TOKENS / TRAIN_SEQ_LEN is only {sequences} sequences: raise "
                   f"BATCH_TOKENS or start fewer processes")


class Start(NamedTuple):
    """The checkpoint that a run begins with."""

    path: Path
    state: dict
    resumed: bool  # continue its run, instead of taking its weights alone
    warnings: list[str]  # newer checkpoints that are damaged


def find_start(config: Config, loaded: dict | None) -> Start | None:
    """The weights of LOAD_CHECKPOINT, `loaded`, are for a run that has no checkpoint of its own to resume from."""
    if config.resume == "auto":
        path, state, warnings = newest_readable(Path(config.log_dir) / config.run_name)
        if path:
            return Start(path, state, resumed=True, warnings=warnings)
    elif config.resume != "0":
        return Start(Path(config.resume), read_checkpoint(config.resume), resumed=True, warnings=[])
    return None if loaded is None else Start(Path(config.load_checkpoint), loaded, resumed=False, warnings=[])


def check_start(config: Config, start: Start | None, loader: TokenLoader | None) -> int:
    """Stop unless the checkpoint fits model, configuration and training shards, and two more have space on the disk; returns
    the number of parameters. Allocates nothing."""
    problems = misfits(config, start, loader) if start and start.resumed else []
    with torch.device("meta"):
        model = GPT(config)
    if config.num_iterations and config.save_checkpoint:
        size = checkpoint_bytes(model, "cuda" if torch.cuda.is_available() else "cpu")
        free = free_space(Path(config.log_dir) / config.run_name)
        if free < 2 * size:
            problems.append(f"LOG_DIR={config.log_dir}: {free / 2**30:,.2f} GiB are free, two checkpoints take "
                            f"{2 * size / 2**30:,.2f} GiB: make space, or set SAVE_CHECKPOINT=0")
    if problems:
        raise Stop("; ".join(problems))
    if start:
        load_weights(model, start.state, start.path, assign=True)
    return sum(p.numel() for p in model.parameters())


def misfits(config: Config, start: Start, loader: TokenLoader | None) -> list[str]:
    """What forbids this run to go on from the checkpoint."""
    path, state = start.path, start.state
    problems = differing_settings(state["config"], config, RESUME_MUST_MATCH)
    if problems:
        problems = [f"{path} belongs to another configuration: {'; '.join(problems)}"]
    if len(state["optimizers"]) != 2:
        problems.append(f"{path} holds the states of {len(state['optimizers'])} optimizers, this script has 2")
    if state["data"] is None or state["loader"] is None:
        problems.append(f"{path} is of an evaluation: set LOAD_CHECKPOINT to take its weights")
    elif loader:
        difference = differing_shards(state["data"], loader.fingerprint())
        if difference and not config.resume_other_data:
            problems.append(f"{path} was trained on other data: {difference}; correct TRAIN_FILES, or set RESUME_OTHER_DATA=1")
        elif not loader.has(state["loader"]):
            problems.append(f"{path}: its place in the data, {state['loader']}, is not in these shards")
    return problems


def finished_run(config: Config) -> dict | None:
    """The summary of a run that RESUME=auto finds complete; Stop if it was another configuration's."""
    directory = Path(config.log_dir) / config.run_name
    try:
        summary, old = (json.loads((directory / name).read_text()) for name in ("summary.json", "config.json"))
    except (OSError, ValueError):
        return None
    if config.resume != "auto" or summary.get("status") != "complete":
        return None
    differences = differing_settings(old, config, RESUME_MUST_MATCH)
    if differences:
        raise Stop(f"{directory} holds a complete run of another configuration: {'; '.join(differences)}")
    return summary


def run_experiment(check_only: bool) -> None:
    """Find everything that is wrong before anything is created, then run."""
    problems, unread = [], set()

    def check(function, *arguments, reads: str = ""):
        """Its result; None if it refuses, or reads a variable that has no value."""
        try:
            return function(*arguments) if unread.isdisjoint(reads.split()) else None
        except (Stop, ValueError, OSError) as error:
            problems.append(str(error))

    loaded_path = os.environ.get("LOAD_CHECKPOINT", "")
    loaded = check(read_checkpoint, loaded_path, WEIGHT_KEYS) if loaded_path else None
    config, found, unread = Config.read(os.environ, loaded and loaded["config"])
    if loaded_path and not loaded:  # what it would have said of the model is not known
        unread |= {f.name.upper() for f in dataclasses.fields(Config) if f.metadata["group"] in ("model", "spectral")}
    problems += found + config.impossible_combinations(unread)
    training = validation = haystack = mixer = None
    check(check_world, config, reads="BATCH_TOKENS TRAIN_SEQ_LEN NUM_ITERATIONS")
    check(choose_backend, config, torch.device("cuda" if torch.cuda.is_available() else "cpu"), reads="ATTN_BACKEND")
    if config.num_iterations:
        training = check(check_training_data, config, check_only, reads="BATCH_TOKENS VOCAB_SIZE NUM_ITERATIONS EPOCHS")
    if config.val_tokens:
        validation = check(check_validation_data, config, check_only, reads="VAL_TOKENS VOCAB_SIZE")
    finished = None if unread else check(finished_run, config)
    start = None if finished else check(find_start, config, loaded)
    trained = check(trained_shards, training, start.state if start else loaded) or {}
    if validation:
        check(check_separate, trained, validation.paths, "VAL_FILES")
    if training:
        mixer = check(make_mixer, config, training, reads="RETRIEVAL_MIX RETRIEVAL_PASSAGES DOC_DELIMITER SEED")
    if config.needle_eval:
        haystack = check(check_haystack, config, trained, reads="NEEDLE_SEQ_LEN NEEDLE_DISTANCES NEEDLE_SAMPLES_PER_DISTANCE "
                                                                "NEEDLE_ANCHOR_LEN NEEDLE_VALUE_LEN DOC_DELIMITER SEED "
                                                                "VOCAB_SIZE")
    if not finished:
        check(check_run_directory, config)
    possible = not (unread or config.impossible_combinations())
    parameters = check(check_start, config, start, training) if possible else None
    if problems:
        raise Stop("; ".join(dict.fromkeys(problems)))
    if check_only:
        for warning in start.warnings if start else []:
            print(f"warning: {warning}", file=sys.stderr)
        print(f"configuration, data and shapes are valid: arm {config.arm}, {parameters:,} parameters, "
              f"{config.num_iterations} steps of {config.batch_tokens:,} tokens")
    elif finished:
        if world()[0] == 0:
            print(f"{Path(config.log_dir) / config.run_name} is complete, nothing is left to do\n{summary_table(finished)}")
    else:
        device = set_up_device(config.rank_timeout)  # nothing was created so far, all that can be refused has been
        with RunDirectory(config) as run:
            execute(config, device, run, start, haystack, mixer, trained)


def execute(config: Config, device: torch.device, run: RunDirectory, start: Start | None, haystack: Haystack | None,
            mixer: Mixer | None, trained: dict[str, str]) -> None:
    """Build, load or resume, train, evaluate, summarise."""
    log_environment(run, config, device)
    trainer = Trainer(config, device, run, trained)
    if trainer.train_loader:
        run.log(trainer.train_loader.policy(config.num_iterations))
    if mixer:
        run.log(mixer.policy())
        first = trainer.train_loader.peek()[: MIXED_SAMPLE * config.train_seq_len + 1]
        written = mixer.achieved(first, config.train_seq_len)
        if written < 0.9 * config.retrieval_mix:
            run.warn(f"of the first {len(first) - 1} tokens the retrieval mix finds room for {written:.1%}, not RETRIEVAL_MIX="
                     f"{config.retrieval_mix:g}: their documents are too short for it")
    if start and not start.resumed:
        load_weights(trainer.model, start.state, start.path)
        if not config.num_iterations:  # evaluate with the schedules where the checkpoint left them
            trainer.step, trainer.total_steps = start.state["step"], start.state["total_steps"]
    trainer.warm_up()
    if start and start.resumed:
        for warning in start.warnings:
            run.warn(warning)
        trainer.resume(start.state, start.path)
        start.state.clear()  # it maps the file, whose space a later removal is to free
    elif config.resume == "auto":
        run.log("RESUME=auto: no checkpoint in the run directory, starting at step 0")
        run.drop_metrics_after(-1)
    PROGRESS.step = trainer.step
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    ahead = mixer and MixedAhead(mixer, trainer.train_loader, config.train_seq_len)
    with SIGNALS.deferred(), contextlib.closing(ahead) if ahead else contextlib.nullcontext():
        train(trainer, ahead)
    needle = None
    if config.needle_eval:
        needle = trainer.needle_eval(haystack)
        run.log(json.dumps(needle))
    if run.rank == 0:
        summary = summarise(trainer, needle)
        run.write_json("summary.json", summary)
        run.log(f"summary ({run.path / 'summary.json'})\n{summary_table(summary)}")
    all_ranks(torch.zeros((), device=device))  # none leaves before all have done their part


def main(arguments: list[str]) -> None:
    if arguments in (["--help"], ["-h"], ["--help=markdown"]):
        print(variable_table(markdown=True) if "markdown" in arguments[0] else f"{__doc__}\n{variable_table()}")
        return
    if arguments not in ([], ["--check"]):
        print(f"error: unknown arguments {' '.join(arguments)}: only --help and --check exist, all else is set by environment "
              f"variables", file=sys.stderr)
        sys.exit(1)
    status, line, teller = 0, None, 0
    try:
        with SIGNALS:
            run_experiment(check_only=arguments == ["--check"])
    except Stop as stop:
        status, line, teller = 1, f"error: {stop}", stop.teller
    except Preempted as stop:
        status, line = stop.exit_status, (f"preempted by {stop} at step {PROGRESS.step}: the same command with RESUME=auto "
                                            f"and its RUN_NAME goes on from the newest checkpoint")
    if line and world()[0] == teller:
        print(line, file=sys.stderr)
    if status and dist.is_initialized():  # without a clean-up of the process group, which could wait for a lost process
        exit_at_once(status)
    if status:
        sys.exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
    if "RANK" in os.environ:
        exit_at_once(0)
