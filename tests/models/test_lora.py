"""Adapters against torch: PEFT's formula by hand on transformers' models, and its files."""

import contextlib
import dataclasses
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from r1s_jax.models import hf
from r1s_jax.models.decoder import abstract_params, bind, hidden_states
from r1s_jax.models.families import read_config
from r1s_jax.models.logprobs import token_logprobs
from r1s_jax.models.lora import (
    TARGETS,
    LoraConfig,
    abstract_adapters,
    export_adapters,
    init_adapters,
    load_adapters,
    merged,
    read_lora_config,
    with_adapters,
)
from r1s_jax.sharding import MeshConfig, make_mesh, named_sharding, partition_spec
from r1s_jax.types import UserError
from tests import hf_models, tiny

RNG = np.random.default_rng(1)
TOKENS = RNG.integers(0, hf_models.SIZES["vocab_size"], (2, 11))
WEIGHTS = RNG.normal(0, 1, (*TOKENS.shape, hf_models.SIZES["vocab_size"])).astype(np.float32)
LORA = LoraConfig(rank=3, alpha=5.0)
SOME = LoraConfig(rank=2, alpha=2.0, targets=("v", "down"))


def random_adapters(model, config=LORA):
    """Adapters of which both halves count."""
    rng = np.random.default_rng(2)
    shapes, _ = abstract_adapters(model, config)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.2, p.shape), p.dtype), shapes)


def mesh_of_8():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def of_transformers(kind, folder):
    """(config, params) of a checkpoint that transformers wrote."""
    model = read_config(hf_models.save(kind, folder))
    return model, hf.load_params(folder, model, make_mesh(MeshConfig()))


@contextlib.contextmanager
def adapted(kind, folder):
    """transformers' model with the folder's adapters hung onto its modules; (model, tensors).

    What PEFT computes, in its own words: y + lora_B(lora_A(x)) * lora_alpha / r.
    """
    said = json.loads((folder / "adapter_config.json").read_text())
    tensors = {
        name: torch.from_numpy(value).requires_grad_()
        for name, value in load_file(folder / "adapter_model.safetensors").items()
    }
    model, used, hooks = hf_models.model(kind), set(), []
    for name, module in model.named_modules():
        if name.split(".")[-1] not in said["target_modules"]:
            continue
        names = [f"base_model.model.{name}.lora_{part}.weight" for part in "AB"]
        used.update(names)

        def hook(_, inputs, y, names=names):
            a, b = (tensors[n] for n in names)
            linear = torch.nn.functional.linear
            return y + linear(linear(inputs[0], a), b) * said["lora_alpha"] / said["r"]

        hooks.append(module.register_forward_hook(hook))
    assert used == tensors.keys()
    try:
        yield model, tensors
    finally:
        for handle in hooks:
            handle.remove()


@pytest.mark.parametrize("kind, config", [("qwen2", SOME), ("llama_tied", LORA)])
def test_logits_are_those_of_torch(kind, config, tmp_path):
    """Through the files; beside the kernels, unrolled and scanned, and merged into them."""
    model, params = of_transformers(kind, tmp_path / "hf")
    adapters = random_adapters(model, config)
    folder = export_adapters(tmp_path / "adapter", model, config, adapters, base="x/y")
    with adapted(kind, folder) as (theirs, _), torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS)).logits.numpy()
    logits = jax.jit(partial(tiny.full_logits, model), static_argnames="scan")
    both = with_adapters(params, adapters, config)
    as_one = jax.jit(partial(merged, config=config))(params, adapters)
    for each, scan in ((both, False), (both, True), (as_one, True)):
        got = logits(each, jnp.asarray(TOKENS), scan=scan)
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    assert np.abs(logits(params, jnp.asarray(TOKENS), scan=True) - expected).max() > 0.1


def test_gradients_are_those_of_torch(tmp_path):
    """Of a weighted sum of logits, by every kernel of every adapter."""
    model, params = of_transformers("qwen3", tmp_path / "hf")
    adapters = random_adapters(model)
    folder = export_adapters(tmp_path / "adapter", model, LORA, adapters, base="x/y")
    with adapted("qwen3", folder) as (theirs, tensors):
        logits = theirs(torch.from_numpy(TOKENS)).logits
        (logits * torch.from_numpy(WEIGHTS)).sum().backward()

    def loss(adapters, params):
        both = with_adapters(params, adapters, LORA)
        got = tiny.full_logits(model, both, jnp.asarray(TOKENS), scan=True)
        return (got * WEIGHTS).sum(), got

    grads, got = jax.jit(jax.grad(loss, has_aux=True))(adapters, params)
    np.testing.assert_allclose(got, logits.detach().numpy(), atol=1e-5, rtol=0)
    assert grads["layers"].keys() == {f"{name}_lora_{part}" for name in TARGETS for part in "ab"}
    for name, p in grads["layers"].items():
        target, _, part = name.split("_")
        block = "self_attn" if target in "qkvo" else "mlp"
        for i in range(model.num_hidden_layers):
            key = f"model.layers.{i}.{block}.{target}_proj.lora_{part.upper()}.weight"
            expected = tensors[f"base_model.model.{key}"].grad.numpy().T
            np.testing.assert_allclose(p[i], expected, atol=1e-3, rtol=1e-4)
            assert np.abs(expected).max() > 1


def shapes_of_dots(jaxpr):
    """The shape of every matmul's result, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(sorted(eqn.outvars[0].aval.shape))
        inner = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")  # noqa: E731
        for value in jax.tree.leaves(eqn.params, is_leaf=inner):
            if inner(value):
                yield from shapes_of_dots(getattr(value, "jaxpr", value))


def of_kernels():
    """The shapes that gradients of the frozen kernels would have, sorted."""
    return {tuple(sorted(tiny.params()["layers"][f"{t}_kernel"].shape[1:])) for t in TARGETS}


def score(params, **options):
    return token_logprobs(tiny.MODEL, params, jnp.asarray(TOKENS), **options)[0].sum()


@pytest.mark.parametrize("scan, remat", [(False, "none"), (True, "none"), (True, "full")])
def test_frozen_kernels_have_no_gradient(scan, remat):
    """No matmul of the adapters' gradient gives a result of a kernel's shape."""
    run = partial(score, scan=scan, remat=remat)
    whole = jax.make_jaxpr(jax.grad(run))(tiny.params())
    assert of_kernels() <= set(shapes_of_dots(whole.jaxpr))
    ours = jax.grad(lambda adapters: run(with_adapters(tiny.params(), adapters, LORA)))
    found = set(shapes_of_dots(jax.make_jaxpr(ours)(random_adapters(tiny.MODEL)).jaxpr))
    assert {(3, 32), (3, 48)} <= found and not of_kernels() & found


def test_no_gradient_of_the_output_matrix_is_compiled():
    """Its backward pass is written by hand and always gives one: the compiler must drop it."""
    run = partial(score, scan=True, remat="full", positions_per_chunk=1)

    def compiled(fn, *args):
        text = jax.jit(fn).lower(*args).compile().as_text()
        found = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
        return {tuple(sorted(int(n) for n in sizes.split(","))) for sizes in found}

    frozen = of_kernels() | {(32, 128)}  # of 128 tokens at a time
    assert frozen <= compiled(jax.grad(run), tiny.params())
    ours = jax.grad(lambda adapters, params: run(with_adapters(params, adapters, LORA)))
    found = compiled(ours, random_adapters(tiny.MODEL), tiny.params())
    assert {(3, 32), (3, 48), (22, 128)} <= found and not frozen & found


def test_the_start_changes_nothing():
    """b is zero and a uniform up to fan_in**-0.5, each layer and kernel with numbers of its own."""
    adapters = init_adapters(tiny.MODEL, dataclasses.replace(LORA, rank=40), 3)["layers"]
    assert adapters.keys() == {f"{name}_lora_{part}" for name in TARGETS for part in "ab"}
    for name in TARGETS:
        a, b = adapters[f"{name}_lora_a"], adapters[f"{name}_lora_b"]
        bound = a.shape[1] ** -0.5
        assert 0.98 * bound < np.abs(a).max() <= bound and not b.any()
        np.testing.assert_allclose(np.std(a), bound / 3**0.5, rtol=0.05)
        assert np.abs(a[0] - a[1]).min() > 0
    assert (adapters["q_lora_a"] != adapters["k_lora_a"]).all()
    start = init_adapters(tiny.MODEL, LORA, 3)
    logits = jax.jit(partial(tiny.full_logits, tiny.MODEL, tokens_BT=jnp.asarray(TOKENS)))
    got = logits(with_adapters(tiny.params(), start, LORA))
    np.testing.assert_array_equal(got, logits(tiny.params()))
    kept = merged(tiny.params(), start, LORA)
    jax.tree.map(np.testing.assert_array_equal, kept, tiny.params())


@pytest.mark.slow
def test_the_compute_type_is_that_of_the_adapters_too():
    """Were they left in f32, hidden states of a bf16 learner would be too."""
    both = with_adapters(tiny.params(), random_adapters(tiny.MODEL), LORA)
    decoder = bind(tiny.MODEL, both, jnp.bfloat16)
    assert decoder.layers.q_lora_a.dtype == decoder.layers.q_lora_b.dtype == jnp.bfloat16
    attend = lambda _, cache, q, k, v: (q, cache)  # noqa: E731
    positions = jnp.broadcast_to(jnp.arange(11), TOKENS.shape)
    hidden, _ = decoder(jnp.asarray(TOKENS), positions, attend)
    assert hidden.dtype == jnp.bfloat16
    exact, _ = hidden_states(tiny.MODEL, both, jnp.asarray(TOKENS), positions, attend)
    np.testing.assert_allclose(hidden.astype(np.float32), exact, atol=0.2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merged_over_a_mesh(dtype):
    """Every kernel is the rounded f64 sum, in its own type and layout; the rest is untouched."""
    mesh = mesh_of_8()
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    place = lambda tree, axes: jax.device_put(  # noqa: E731
        tree, jax.tree.map(lambda names: named_sharding(mesh, names), axes, is_leaf=is_axes)
    )
    (_, axes), (_, thin) = abstract_params(tiny.MODEL), abstract_adapters(tiny.MODEL, SOME)
    assert partition_spec(thin["layers"]["v_lora_a"]) == partition_spec((None, "embed", None))
    assert partition_spec(thin["layers"]["v_lora_b"]) == partition_spec((None, None, "kv_heads"))
    assert partition_spec(thin["layers"]["down_lora_a"]) == partition_spec((None, "ffn", None))
    assert partition_spec(thin["layers"]["down_lora_b"]) == partition_spec((None, None, "embed"))
    params = jax.tree.map(lambda p: p.astype(dtype), tiny.params())
    adapters = random_adapters(tiny.MODEL, SOME)
    whole = place(params, axes)
    layout = jax.tree.map(lambda p: p.sharding, whole)
    got = jax.jit(partial(merged, config=SOME), out_shardings=layout)(whole, place(adapters, thin))
    expected = jax.tree.map(lambda p: np.asarray(p), params)
    for name in SOME.targets:
        a, b = (np.asarray(adapters["layers"][f"{name}_lora_{x}"], np.float64) for x in "ab")
        kernel = expected["layers"][f"{name}_kernel"]
        wide = kernel.astype(np.float64) + 2.0 / 2 * np.einsum("lir,lro->lio", a, b)
        expected["layers"][f"{name}_kernel"] = wide
    bits = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-23

    def same(got, old, expected):
        assert got.dtype == old.dtype and got.sharding == old.sharding
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=bits, atol=1e-7)

    jax.tree.map(same, got, whole, expected)


# ---------------------------------------------------------------------------------- PEFT's files


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_files_out_and_in(dtype, tmp_path):
    """From one device to a mesh of 8 and out again: the same bits and the same config."""
    adapters = random_adapters(tiny.MODEL)
    first = export_adapters(
        tmp_path / "a", tiny.MODEL, LORA, adapters, base="x/y", dtype=dtype, card="# A card\n"
    )
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {p.name for p in first.iterdir()} == names
    config, back = load_adapters(first, tiny.MODEL, mesh_of_8())
    assert config == LORA
    assert len(back["layers"]["q_lora_b"].sharding.device_set) == 8
    as_stored = jax.tree.map(lambda p: p.astype(dtype).astype(jnp.float32), adapters)
    jax.tree.map(np.testing.assert_array_equal, back, as_stored)
    again = export_adapters(tmp_path / "b", tiny.MODEL, config, back, base="x/y", dtype=dtype)
    for name in names - {"README.md"}:
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_the_config_says_what_peft_needs(tmp_path):
    """Its own names and types; a fraction stays one."""
    for alpha, expected in ((16.0, "16"), (0.5, "0.5")):
        config = dataclasses.replace(SOME, alpha=alpha)
        adapters = random_adapters(tiny.MODEL, config)
        folder = export_adapters(tmp_path / "a", tiny.MODEL, config, adapters, base="x/y")
        said = json.loads((folder / "adapter_config.json").read_text())
        assert said["peft_type"] == "LORA" and said["task_type"] == "CAUSAL_LM"
        assert said["r"] == 2 and repr(said["lora_alpha"]) == expected
        assert said["target_modules"] == ["v_proj", "down_proj"]
        assert said["base_model_name_or_path"] == "x/y"


def test_no_more_than_some_fields_are_wanted(tmp_path):
    """Old files lack many, new ones have many that are off; the order of the modules is PEFT's."""
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj", "v_proj"]}
    off = {"use_dora": False, "rank_pattern": {}, "some_new_config": None, "lora_dropout": 0.1}
    for extra in ({}, off):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**said, **extra}))
        assert read_lora_config(tmp_path, tiny.MODEL) == SOME


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"use_rslora": True}, "use_rslora = True is not supported"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern = .* is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .* is not supported"),
        ({"a_method_to_come": {"x": 1}}, "a_method_to_come = .* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is unsupported"),
        ({"r": 0}, "r = 0, must be a whole number above 0"),
        ({"r": None}, "field 'r' is missing"),
        ({"lora_alpha": "8"}, "lora_alpha = '8', must be a number above 0"),
        ({"lora_alpha": -1}, "lora.alpha = -1, must be a number above 0"),
        ({"target_modules": "all-linear"}, "target_modules = 'all-linear', must be a list"),
        ({"target_modules": []}, "lora.targets = .*needs at least one"),
        ({"target_modules": ["v_proj", "lm_head"]}, "'lm_head', which is none of q_proj, k_proj"),
    ],
)
def test_configs_that_are_refused(changes, match, tmp_path):
    adapters = random_adapters(tiny.MODEL, SOME)
    folder = export_adapters(tmp_path / "a", tiny.MODEL, SOME, adapters, base="x/y")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=f"adapter_config.json: .*{match}") as e:
        load_adapters(folder, tiny.MODEL, make_mesh(MeshConfig()))
    assert "\n" not in str(e.value)


def test_files_that_are_refused(tmp_path):
    """Nothing there, tensors of another rank, tensors too many."""

    def load(match):
        with pytest.raises(UserError, match=match):
            load_adapters(tmp_path / "a", tiny.MODEL, make_mesh(MeshConfig()))

    load("adapter_config.json: not found; adapters in PEFT's layout are adapter_config.json and")
    export_adapters(tmp_path / "a", tiny.MODEL, SOME, random_adapters(tiny.MODEL, SOME), base="x/y")
    config, tensors = (
        tmp_path / "a" / f"adapter_{n}" for n in ("config.json", "model.safetensors")
    )
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "r": 4}))
    load(r"down_proj.lora_A.weight is \[2, 48\], adapter_config.json says \[4, 48\]")
    config.write_text(json.dumps({**said, "target_modules": ["v_proj"]}))
    load(r"surplus base_model.model.model.layers.0.mlp.down_proj.lora_A.weight")
    config.write_text(json.dumps(said))
    found = load_file(tensors)
    save_file({n: v for n, v in found.items() if "layers.1.self_attn" not in n}, tensors)
    load(r"missing base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight")


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"rank": 0}, "lora.rank = 0, must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha = 0.0, must be a number above 0"),
        ({"alpha": float("nan")}, "lora.alpha = nan, must be a number above 0"),
        ({"targets": ()}, "lora.targets = .*needs at least one"),
        ({"targets": ("q", "q")}, "lora.targets = .*none twice"),
        ({"targets": ("q", "lm_head")}, "lora.targets: 'lm_head' is none of q, k, v, o, gate"),
    ],
)
def test_settings_that_are_refused(changes, match):
    with pytest.raises(UserError, match=match):
        dataclasses.replace(LORA, **changes)
