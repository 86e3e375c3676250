"""Eight CPU devices for every test, no hub, and jaxtyping's annotations checked by beartype.

All is to be settled before jax, huggingface_hub and r1s_jax are imported, hence at import.
"""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# No test and no process of one asks the real hub, or finds what its cache happens to hold.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "no_hub")
# XLA aborts the process where a device waits 40 s for the others; on a busy machine they come late.
_FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    "--xla_cpu_collective_call_terminate_timeout_seconds": 600,
    # The tests compile for longer than they compute: a fifth of their time is LLVM's optimising.
    # CI runs the slow ones with it.
    "--xla_backend_optimization_level": 0,
    "--xla_llvm_disable_expensive_passes": "true",
}
_given = os.environ.get("XLA_FLAGS", "")
_added = [f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()

# XLA sizes its thread pool by this; with fewer threads than devices, two devices of a collective
# can wait for a third that has no thread left to run on.
os.environ.setdefault("NPROC", "32")

import jax
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook looks the name up and does not import it)

install_import_hook("r1s_jax", "tests.typecheck.check")

# Eight devices share two threads or so: two programs in flight can wait for each other's threads
# in a collective until XLA aborts.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Many tests compile the same small programs in objects of their own; the second one loads them.
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
