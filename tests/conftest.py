"""Eight CPU devices for every test, and jaxtyping's annotations checked by beartype.

Both have to be settled before jax and r1s_jax are imported, hence here and at import.
"""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

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
