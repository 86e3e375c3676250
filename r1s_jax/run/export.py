"""From a run to a Hugging Face folder: at its end, or from its latest checkpoint."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import jax
from etils import epath

from r1s_jax.models import hf, lora, weights
from r1s_jax.models.decoder import DecoderConfig, Params, abstract_params
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.run.card import model_card
from r1s_jax.run.checkpoint import Checkpointer
from r1s_jax.run.config import RunConfig
from r1s_jax.run.rundir import RunDir
from r1s_jax.run.setup import find_policy
from r1s_jax.sharding import MeshConfig, make_mesh, named_sharding
from r1s_jax.types import UserError

_FILES = {
    *(hf.CONFIG, hf.GENERATION, hf.CARD, weights.SINGLE, weights.INDEX),
    *hf.TOKENIZER_FILES,
    *hf.LICENCE_FILES,
}
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_ADAPTER_FILES = {lora.CONFIG, lora.WEIGHTS, hf.CARD}


def export_policy(
    config: RunConfig,
    run: RunDir,
    step: int,
    model: DecoderConfig,
    params: Params,
    *,
    source: Path,
    tokenizer: Tokenizer,
    out: Path,
) -> Path:
    """Writes `params`, the policy after `step`, with the run's provenance; see `hf.export`."""
    first = jax.process_index() == 0  # of several hosts, the one that writes
    return hf.export(
        out,
        model,
        params,
        source=source,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        dtype=config.export_dtype,
        card=model_card(config, run, step) if first else "",
    )


def export_run(
    config: RunConfig, run_dir: epath.PathLike, out: Path, *, adapters: bool = False
) -> tuple[int, Path]:
    """Writes the policy of the latest checkpoint; returns (step, folder).

    What was trained is read alone, on the host's CPU. Low-rank adapters are merged into the policy
    that the run started from, or with `adapters` written by themselves, for PEFT. The folder
    appears whole or not at all.

    Raises:
        UserError: no checkpoint, one of another architecture than the run's starting policy
            (whose shape and tokenizer the export takes), `out` is not to be written over, or
            adapters are asked for and the run trained none.
    """
    trained = config.learner.lora
    if adapters and trained is None:
        raise UserError(f"{run_dir}: trained the whole policy (learner.lora = None), no adapters")
    start = find_policy(config.policy)
    require_replaceable(out, keep=start, adapters=adapters)
    model = hf.read_config(start)
    tokenizer = Tokenizer.load(start, vocab_size=model.vocab_size)
    mesh = make_mesh(MeshConfig(), jax.devices("cpu"))
    abstract, axes = (
        abstract_params(model) if trained is None else lora.abstract_adapters(model, trained)
    )
    wanted = jax.tree.map(
        lambda p, names: jax.ShapeDtypeStruct(
            p.shape, p.dtype, sharding=named_sharding(mesh, names)
        ),
        abstract,
        axes,
    )
    with Checkpointer(epath.Path(run_dir) / "checkpoints", read_only=True) as checkpointer:
        step, arrays, _ = checkpointer.restore({"state": {"params": wanted}}, partial=True)
    params, run = arrays["state"]["params"], RunDir(path=epath.Path(run_dir), resumed=True)
    if adapters and trained is not None:
        card = model_card(config, run, step, library="peft")
        base = config.policy.checkpoint
        made = lora.export_adapters(
            out, model, trained, params, base=base, dtype=config.export_dtype, card=card
        )
        return step, made
    if trained is not None:
        start = find_policy(config.policy, weights_of=start.name)
        base = hf.load_params(start, model, mesh)
        params = jax.jit(partial(lora.merged, config=trained))(base, params)
    folder = export_policy(
        config, run, step, model, params, source=start, tokenizer=tokenizer, out=out
    )
    return step, folder


def require_replaceable(folder: Path, *, keep: Path | None = None, adapters: bool = False) -> None:
    """Refuses a folder that holds anything but an earlier export of the kind, or that is `keep`.

    Raises:
        UserError: naming the folder and what stands in the way.
    """
    if keep is not None and folder.resolve() == keep.resolve():
        raise UserError(f"{folder}: is the policy the run starts from, choose another folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file, choose another folder")
    found = {child.name for child in folder.iterdir()}
    known, config = (_ADAPTER_FILES, lora.CONFIG) if adapters else (_FILES, hf.CONFIG)
    if strangers := sorted(n for n in found - known if adapters or not _SHARD.fullmatch(n)):
        raise UserError(
            f"{folder}: holds {strangers[0]}, which no export does; choose another folder"
        )
    if found and config not in found:
        raise UserError(f"{folder}: not empty and no export, it lacks {config}")
    if found and not adapters and not {weights.SINGLE, weights.INDEX} & found:
        raise UserError(f"{folder}: not empty and no export, it lacks {weights.SINGLE}")
