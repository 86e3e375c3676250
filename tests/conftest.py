"""Eight CPU devices for every test, and jaxtyping's annotations checked by beartype.

Both have to be settled before jax and r1s_jax are imported, hence here and at import.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook looks the name up and does not import it)

install_import_hook("r1s_jax", "tests.typecheck.check")
