import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run on the CPU, slowly and exactly


@pytest.fixture
def one_thread_on_cpu(monkeypatch):
    """Float sums, and so bitwise comparisons with other processes, depend on the number of threads."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
