"""The packaging holds together: requirements, image, Makefile and workflows agree with the code and each other."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from data.shards import write_shard

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
WORKFLOWS = {path.name: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def requirements(name: str) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {requirement.name: requirement for requirement in map(Requirement, filter(None, lines))}


def image_files() -> list[Path]:
    """Files of the build context, relative to ROOT: .dockerignore is an allow-list, so these are its exceptions."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*" and all(line.startswith("!") for line in lines[1:]), "not an allow-list"
    found = {line: [path.relative_to(ROOT) for path in ROOT.glob(line[1:])] for line in lines[1:]}
    assert all(found.values()), f"nothing there for {[line for line, paths in found.items() if not paths]}"
    return sorted(path for paths in found.values() for path in paths)


def run(*command, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    # MAKE...: `make test` hands them down, and a make started here must not read them.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "TORCH_INDEX", "VENV"))}
    return subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=120)


def make(*arguments) -> str:
    done = run("make", *map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\\\n", " ")


# ---------------------------------------------------------------------------------------------------------------------
# requirements


def module_level_imports(path: Path) -> set[str]:
    """Top-level packages that importing the file needs: everything outside functions."""
    names, nodes = set(), list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return names


def test_requirements_are_what_the_code_imports():
    files = [path for path in image_files() if path.suffix == ".py"]
    own = {path.parts[0].removesuffix(".py") for path in files} | {path.stem for path in files}
    kernels = [path for path in files if path.stem.endswith("_triton")]
    imported = set().union(*(module_level_imports(ROOT / path) for path in files if path not in kernels))
    assert imported - set(sys.stdlib_module_names) - own == set(requirements("requirements.txt"))
    # Imported where a GPU is used, and Triton is part of torch's CUDA builds.
    assert len(kernels) == 3
    assert all(module_level_imports(ROOT / path) <= {"typing", "torch", "triton", "model"} for path in kernels)


def test_development_versions_are_exact_and_within_the_ranges():
    exact = requirements("requirements-dev.txt")
    for requirement in exact.values():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
    for name, requirement in requirements("requirements.txt").items():
        assert requirement.specifier.contains(str(exact[name].specifier).removeprefix("==")), name


def test_image_has_the_tested_versions_on_a_pinned_base():
    (base,) = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    torch, *_ = re.fullmatch(r"pytorch/pytorch:([\d.]+)-cuda[\d.]+-cudnn9-runtime@sha256:[0-9a-f]{64}", base).groups()
    ranges = requirements("requirements.txt")
    assert Version(torch) in ranges["torch"].specifier
    exact = requirements("requirements-dev.txt")
    installed = dict(re.findall(r"\b([a-z]\w+)==([\w.]+)", DOCKERFILE))
    assert installed == {name: str(exact[name].specifier).removeprefix("==") for name in ranges if name != "torch"}


# ---------------------------------------------------------------------------------------------------------------------
# image


def test_image_files_run_on_their_own(tmp_path):
    for path in image_files():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 2**20
    for path in [Path("scoped_medium.py"), *(path for path in image_files() if path.parts[0] in ("data", "eval"))]:
        if '__name__ == "__main__"' in (tmp_path / path).read_text():
            done = run(sys.executable, path, "--help", cwd=tmp_path)
            assert done.returncode == 0 and done.stdout, (path, done.stderr)
    done = run("./run_ablations.sh", cwd=tmp_path, ARMS="D", PYTHON=sys.executable)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def test_login_shell_takes_the_containers_environment(tmp_path):
    (script,) = re.findall(r"^COPY <<'EOF' /etc/profile.d/\S+\n(.*?)^EOF$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    new = {"NUM_ITERATIONS": "7", "NOTE": "two\nlines = 'quoted' $HOME", "PATH": "/opt/bin"}
    container = new | {"SEED": "1", "a.b": "no name of a shell variable"}
    (tmp_path / "environ").write_bytes(b"".join(f"{k}={v}\0".encode() for k, v in container.items()))
    (tmp_path / "profile").write_text(script.replace("/proc/1/environ", str(tmp_path / "environ")))
    show = f". {tmp_path}/profile && {sys.executable} -c 'import os, json; print(json.dumps(dict(os.environ)))'"
    bash = ["bash", "--noprofile", "--norc", "-c", show]
    done = subprocess.run(bash, env={"PATH": "/usr/bin:/bin", "SEED": "2"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    seen = json.loads(done.stdout)
    assert seen["SEED"] == "2", "a variable of the session itself was overwritten"
    assert new.items() <= seen.items()
    assert not {"a.b", "name", "entry"} & set(seen)
    assert subprocess.run(["sh", "-eu", f"{tmp_path}/profile"], capture_output=True).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Makefile and .ci/run


@needs_make
def test_help_lists_every_target():
    (targets,) = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"^make (\w+)", make("help"), re.MULTILINE) == targets.split()


@needs_make
def test_installs_happen_once(tmp_path):
    newest = max((ROOT / name).stat().st_mtime for name in ("requirements.txt", "requirements-dev.txt"))
    for name, age in ((".runtime", 1), (".tools", 2)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, times=(newest + age, newest + age))
    assert "pip" not in make("-n", "test", f"VENV={tmp_path}")
    os.utime(tmp_path / ".tools", times=(newest - 1, newest - 1))
    assert "-r requirements-dev.txt" in make("-n", "test", f"VENV={tmp_path}")
    assert "-r requirements-dev.txt" not in make("-n", "demo", f"VENV={tmp_path}"), "the demo needs no tools"


@needs_make
def test_torch_index_serves_torch_alone(tmp_path):
    installs = [line for line in make("-n", "test", f"VENV={tmp_path}", "TORCH_INDEX=https://index").splitlines()
                if "install" in line]
    assert ["https://index" in line for line in installs] == [True, False, False]
    assert "--no-deps" in installs[0] and "^torch==" in installs[0]
    assert "index-url" not in make("-n", "test", f"VENV={tmp_path}", "TORCH_INDEX=")


@needs_make
def test_demo_configuration_is_accepted(tmp_path):
    words = shlex.split(make("-n", "demo", f"VENV={tmp_path}"))
    settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    train, val = tmp_path / "train.bin", tmp_path / "val.bin"
    for path, tokens in ((train, 400_000), (val, 100_000)):
        write_shard(path, np.r_[256, np.random.default_rng(0).integers(0, 256, tokens)].astype(np.uint16))
    settings |= dict(TRAIN_FILES=str(train), VAL_FILES=str(val), LOG_DIR=str(tmp_path), NEEDLE_EVAL="1")
    arm_c = dict(SPECTRAL_BIAS="1", SPECTRAL_USE_POINTER_MASK="1", SPECTRAL_POINTER_SCHEDULE="1")
    done = run(sys.executable, "scoped_medium.py", "--check", **settings, **arm_c)
    assert done.returncode == 0, done.stderr


def test_ci_runs_make_test_and_fails_with_it(tmp_path):
    (tmp_path / "make").write_text('#!/bin/sh\necho "$@" "[$TORCH_INDEX]" "[$CUDA_VISIBLE_DEVICES]"; pwd; exit 3\n')
    (tmp_path / "make").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for index in ({}, {"TORCH_INDEX": "https://index"}):
        done = run("bash", ROOT / ".ci/run", cwd=tmp_path, PATH=path, **index)
        assert done.returncode == 3, done.stderr
        assert done.stdout == f"test [{index.get('TORCH_INDEX', '')}] []\n{ROOT}\n"
    assert os.access(ROOT / ".ci/run", os.X_OK)


# ---------------------------------------------------------------------------------------------------------------------
# workflows and repository


def test_actions_are_pinned_by_commit_and_workflows_read_no_foreign_secret():
    used = [line for text in WORKFLOWS.values() for line in re.findall(r"uses: (.*)", text)]
    assert len(used) >= 7
    for line in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    assert {name for text in WORKFLOWS.values() for name in re.findall(r"secrets\.(\w+)", text)} == {"GITHUB_TOKEN"}
    assert "run: .ci/run" in WORKFLOWS["ci.yml"]


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout")
def test_git_ignores_what_runs_leave_behind_and_nothing_else():
    left_behind = [".venv/bin/python", "model/__pycache__/x", "logs/run/metrics.jsonl", "state_step000001.pt",
                   "data/demo/x.bin", "data/fineweb10B/.incoming/x", "data/finewebedu10B/x.bin", "data/texts/x.bin"]
    kept = [*map(str, image_files()), "Makefile", ".ci/run", "tests/test_packaging.py"]
    done = run("git", "check-ignore", "--no-index", *left_behind, *kept)
    assert done.stdout.split() == left_behind


def test_readme_names_only_make_targets_that_exist():
    (targets,) = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= set(targets.split())
