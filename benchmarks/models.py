"""Loads and exports a checkpoint of Qwen2.5-7B's shape, and says what that takes.

    python benchmarks/models.py --folder SCRATCH

Random bf16 weights are written below SCRATCH shard by shard (15 GB), loaded in bf16 onto a mesh of
8 host devices, exported again (15 GB more), and compared bit for bit. Each step is a process of its
own, so that its peak memory is its own. Prints a Markdown table. Needs 31 GB of disk and 20 GB of
memory, and says so where they are not there. `--layers` makes a smaller one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARD_BYTES = 2 * 10**9
DEVICES, MESH = 8, {"data": 1, "fsdp": 2, "tensor": 4}
SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131_072,
    "torch_dtype": "bfloat16",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--step", choices=["make", "load_and_export", "compare"])
    args = parser.parse_args()
    source, out = args.folder / "source", args.folder / "out"
    if args.step:
        steps = {"make": make, "load_and_export": load_and_export, "compare": compare}
        print(json.dumps(steps[args.step](source, out, args.layers)))
        return 0
    size = 2 * parameters(args.layers)
    args.folder.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(args.folder).free
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if disk < 2.05 * size or memory < size + 4e9:
        print(f"skipped: {disk / 1e9:.0f} GB of disk and {memory / 1e9:.0f} GB of memory are free")
        return 0
    figures: dict[str, float] = {}
    for step in ("make", "load_and_export", "compare"):
        figures |= _run(step, args.folder, args.layers)
    print(f"| {parameters(args.layers) / 1e9:.2f} B parameters in bf16, mesh {MESH} | |\n|---|---|")
    print("\n".join(f"| {name} | {value:,.2f} |" for name, value in figures.items()))
    shutil.rmtree(source)
    shutil.rmtree(out)
    return 0


def _run(step: str, folder: Path, layers: int) -> dict[str, float]:
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": "32"}
    options = ["--folder", str(folder), "--layers", str(layers), "--step", step]
    command = [sys.executable, str(Path(__file__).resolve()), *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def tensors(layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint, written out by hand: no table of the library is used."""
    d, f, v = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    kv = SHAPE["num_key_value_heads"] * d // SHAPE["num_attention_heads"]
    every: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (v, d))]
    for i in range(layers):
        here = f"model.layers.{i}."
        for name, width in (("q", d), ("k", kv), ("v", kv)):
            every.append((f"{here}self_attn.{name}_proj.weight", (width, d)))
            every.append((f"{here}self_attn.{name}_proj.bias", (width,)))
        every.append((f"{here}self_attn.o_proj.weight", (d, d)))
        every += [(f"{here}mlp.{name}_proj.weight", (f, d)) for name in ("gate", "up")]
        every.append((f"{here}mlp.down_proj.weight", (d, f)))
        every += [(f"{here}{n}_layernorm.weight", (d,)) for n in ("input", "post_attention")]
    return [*every, ("model.norm.weight", (d,)), ("lm_head.weight", (v, d))]


def parameters(layers: int) -> int:
    import math

    return sum(math.prod(shape) for _, shape in tensors(layers))


def make(source: Path, _: Path, layers: int) -> dict[str, float]:
    """Random bits, all finite, in shards, by safetensors' own writer."""
    import math

    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    (source / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": layers}))
    # Any tokenizer: an export wants one to take over.
    shutil.copy(ROOT / "configs" / "models" / "tiny_base" / "tokenizer.json", source)
    rng, shards, size = np.random.default_rng(0), [[]], 0
    for name, shape in tensors(layers):
        if 2 * size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += math.prod(shape)
    placed = {}
    for n, shard in enumerate(shards):
        file = f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors"
        values = {}
        for name, shape in shard:
            bits = np.frombuffer(rng.bytes(2 * math.prod(shape)), np.uint16) & np.uint16(0xFF7F)
            values[name] = bits.view(ml_dtypes.bfloat16).reshape(shape)
            placed[name] = file
        save_file(values, source / file, metadata={"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return {}


def load_and_export(source: Path, out: Path, layers: int) -> dict[str, float]:
    """Seconds and memory (GB) of both ways; what is not the parameters themselves is `extra`."""
    import jax
    import jax.numpy as jnp

    from r1s_jax.models import hf
    from r1s_jax.models.families import read_config
    from r1s_jax.sharding import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(**MESH))
    jax.block_until_ready(jnp.zeros(()) + 1)
    config = read_config(source)
    before, begin = _memory("VmRSS"), time.perf_counter()
    _reset_peak()
    params = jax.block_until_ready(hf.load_params(source, config, mesh, jnp.bfloat16))
    loaded, peak = time.perf_counter() - begin, _memory("VmHWM")
    held = 2 * parameters(layers) / 1e9
    largest = 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"] / 1e9
    after, begin = _memory("VmRSS"), time.perf_counter()
    _reset_peak()
    options = {"source": source, "eos_ids": (0,), "pad_id": 0, "shard_bytes": SHARD_BYTES}
    hf.export(out, config, params, **options)
    return {
        "parameters, GB": held,
        "largest tensor, GB": largest,
        "load, s": loaded,
        "load, peak GB beside the parameters": peak - before - held,
        "the same in largest tensors (at most 2)": (peak - before - held) / largest,
        "export, s": time.perf_counter() - begin,
        "export, peak GB beside the parameters": _memory("VmHWM") - after,
    }


def compare(source: Path, out: Path, layers: int) -> dict[str, float]:
    """How many tensors came back with other bits, out of how many."""
    import ml_dtypes  # noqa: F401  (teaches numpy the name of bfloat16)
    import numpy as np
    from safetensors import safe_open

    def index(folder: Path) -> dict[str, str]:
        return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def read(folder: Path, file: str, name: str) -> np.ndarray:
        with safe_open(folder / file, framework="np") as opened:
            return opened.get_tensor(name).view(np.uint16)

    first, second = index(source), index(out)
    assert first.keys() == second.keys() == {name for name, _ in tensors(layers)}
    different = [
        name
        for name in first
        if not np.array_equal(read(source, first[name], name), read(out, second[name], name))
    ]
    return {"tensors": len(first), "tensors that came back with other bits": len(different)}


def _memory(field: str) -> float:
    """GB of this process, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    sys.exit(main())
