"""For tests that describe TPU slices in the process they run in."""

import importlib
import importlib.util

import pytest


@pytest.fixture
def libtpu(monkeypatch):
    """libtpu that looks for no TPU; skips where it is absent."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu (requirements-tpu.txt)")
    for name, value in importlib.import_module("compile_check").ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
