"""The models and the cache of a deploy file, opened: what `precompile`, its check and `serve` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accel_hidiff.config import CFGPlusPlusConfig, HiDiffusionConfig
from accel_hidiff.deploy import CacheTable, ModelTable
from accel_hidiff.errors import BadInput
from accel_hidiff.models import load_pipeline, load_skeleton
from accel_hidiff.pipeline import Handle, accelerate
from compile_cache import CompileCache, Remote, SigningKey
from compile_cache.commands import open_cache


def open_deployed_cache(table: CacheTable, *, signing: bool = False) -> CompileCache:
    """The cache of a deploy file.

    Args:
        table: `[cache]`.
        signing: open it to store, with the key that `sign_with` names; what that key did not sign is then not loaded,
            if the table trusts nobody else: a signature under what somebody else put there would be worth nothing.

    Raises:
        CompileCacheError: the location, the remote or a key cannot be used.
    """
    signer = SigningKey.load(table.sign_with) if signing and table.sign_with is not None else None
    trust = list(table.trust)
    if signer is not None and not trust:
        trust = [str(signer.public)]
    remote = None if table.remote is None else Remote(table.remote, push=table.push and signing)
    options: dict[str, Any] = {"trust": trust, "remote": remote, "sign_with": signer, "max_bytes": table.max_bytes}
    return open_cache(Path(table.location), new=True, **options)


def open_deployed_model(
    model: ModelTable, cache: CompileCache | None, *, on_miss: str, weights: bool = True, **options: Any
) -> Handle:
    """A model of a deploy file, accelerated.

    Args:
        model: its table.
        cache: where its artifacts are.
        on_miss, options: as in `accelerate`.
        weights: False: from configs alone (see `load_skeleton`), to plan and to look for graphs.

    Raises:
        NotAPipeline, UnknownLayout, BadInput: the model or a setting is not what it should be.
    """
    arguments = model.model, model.dtype, model.device, model.controlnets
    elsewhere = model.target is not None
    pipe, target = (load_pipeline(*arguments), None) if weights else load_skeleton(*arguments, elsewhere=elsewhere)
    if model.scheduler is not None:
        pipe.scheduler = _scheduler(model.scheduler, pipe.scheduler.config)
    handle = accelerate(
        pipe,
        hidiffusion=HiDiffusionConfig(),
        guidance=None if model.cfgpp is None else CFGPlusPlusConfig(model.cfgpp),
        cache=cache,
        backend=model.backend_spec,
        on_miss=on_miss,
        regions=model.regions,
        shapes=model.shapes,
        family=model.family,
        task=model.task,
        target=model.target,
        memory_format=model.memory_format,
        decode=model.decode,
        cuda_graphs=model.cuda_graphs if weights else "off",
        **options,
    )
    handle.meant_for = target
    return handle


def _scheduler(name: str, config: Any) -> Any:
    import diffusers

    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise BadInput(f"models.scheduler: expected the name of a diffusers scheduler class, got {name!r}")
    chosen: Any = kind
    return chosen.from_config(config)
