"""Refuse configurations that cannot work, before a process, a folder of data or a model exists."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lightning_lss.cli.plan import check_plan
from lightning_lss.sequence import layout as layouts

MODES = ("fit", "validate", "test", "predict", "plan")
SPLITTING = ("LSSStrategy", "MegatronStrategy")  # the strategies that split sequences, by the end of their `_target_`


def check(cfg: DictConfig) -> None:
    """Refuse values that are incompatible; the ``ValueError`` names them and the remedy."""
    if cfg.mode not in MODES:
        raise ValueError(f"mode={cfg.mode} is unknown: choose one of {', '.join(MODES)}.")
    if cfg.mode == "plan":
        if cfg.get("hardware") is None:
            raise ValueError(
                "mode=plan needs hardware to plan for: add hardware=cpu, hardware=h100 or another choice of that group."
            )
        check_plan(cfg)
        return
    if cfg.ckpt_path is not None:
        check_checkpoint(cfg)
    elif cfg.mode != "fit":
        raise ValueError(
            f"mode={cfg.mode} needs a trained model: add ckpt_path=<folder of the run>/checkpoints/last.ckpt."
        )
    missing = [str(key) for key in cfg if OmegaConf.is_missing(cfg, key)] or sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} is not set: add {missing[0]}=...")
    if isinstance(cfg.devices, int) and cfg.devices > 0:
        check_split(cfg, cfg.devices * cfg.trainer.num_nodes)


def check_checkpoint(cfg: DictConfig) -> None:
    """Refuse a missing checkpoint, and a folder where the strategy reads files only; raises ``ValueError``."""
    path = Path(cfg.ckpt_path)
    if not (path.exists() or "://" in cfg.ckpt_path):
        raise ValueError(f"ckpt_path={path} does not exist.")
    if path.is_dir() and not cfg.strategy.get("_target_", "").endswith(SPLITTING):
        raise ValueError(
            f"ckpt_path={path} is a folder, and this strategy reads files: convert it with"
            " lightning_lss.checkpoint.consolidate(folder, file), or use strategy=lss."
        )


def check_split(cfg: DictConfig, world_size: int) -> None:
    """Refuse sizes that do not divide each other; raises ``ValueError``."""
    target = cfg.strategy.get("_target_", "")
    if target == "builtins.str" and world_size > 1:
        raise ValueError(
            f"strategy=single has one process, not devices={world_size}: use strategy=lss or strategy=ddp."
        )
    if not target.endswith(SPLITTING):
        if cfg.sequence_parallel_size not in ("auto", 1):
            raise ValueError(
                f"sequence_parallel_size={cfg.sequence_parallel_size} has no effect with this strategy: use strategy=lss."
            )
        return
    size = layouts.resolve_sequence_parallel_size(world_size, cfg.strategy.sequence_parallel_size)
    if target.endswith("MegatronStrategy"):
        layouts.check_heads(cfg.model.num_heads, size)
        layout = "contiguous"
    else:
        layout = "zigzag" if cfg.strategy.layout == "auto" else cfg.strategy.layout
    layouts.check_layout(layout)
    layouts.check_length(cfg.seq_len, size, layout)
