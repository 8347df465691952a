"""Refuse configurations that cannot work, before a process, a folder of data or a model exists."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lightning_lss.sequence import layout as layouts

MODES = ("fit", "validate", "test", "predict", "plan", "verify")
HUGGING_FACE = "HuggingFaceLM"  # the model whose sizes are in its own files, by the end of its `_target_`
SPLITTING = ("LSSStrategy", "MegatronStrategy")  # the strategies that split sequences, by the end of their `_target_`


def check(cfg: DictConfig) -> None:
    """Refuse values that are incompatible; the ``ValueError`` names them and the remedy."""
    if cfg.mode not in MODES:
        raise ValueError(f"mode={cfg.mode} is unknown: choose one of {', '.join(MODES)}.")
    if cfg.mode == "plan":
        _check_plan(cfg)
        return
    strategy = cfg.strategy.get("_target_", "")
    if cfg.ckpt_path is not None:
        _check_checkpoint(cfg.ckpt_path, strategy)
    elif cfg.mode not in ("fit", "verify"):
        raise ValueError(
            f"mode={cfg.mode} needs a trained model: add ckpt_path=<folder of the run>/checkpoints/last.ckpt."
        )
    if cfg.mode == "verify" and not strategy.endswith("LSSStrategy"):
        raise ValueError("mode=verify proves the strategies lss and lss_fsdp: add strategy=lss.")
    if strategy.endswith("MegatronStrategy") and "num_heads" not in cfg.model.keys():  # noqa: SIM118  # also those that are not set
        raise ValueError(
            "strategy=megatron splits this package's own transformer: use strategy=lss or strategy=lss_fsdp."
        )
    missing = [str(key) for key in cfg if OmegaConf.is_missing(cfg, key)] or sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} is not set: add {missing[0]}=...")
    if isinstance(cfg.devices, int) and cfg.devices > 0:
        _check_split(cfg, strategy, cfg.devices * cfg.trainer.num_nodes)


def _check_plan(cfg: DictConfig) -> None:
    if cfg.model.get("_target_", "").endswith(HUGGING_FACE):
        raise ValueError(
            "mode=plan traces models that are written for segments, which model=huggingface is not: plan a model of its sizes,"
            " such as model=8b."
        )
    if cfg.get("hardware") is None:
        raise ValueError(
            "mode=plan needs hardware to plan for: add hardware=cpu, hardware=h100 or another choice of that group."
        )
    if not isinstance(cfg.devices, int):
        raise ValueError(f"mode=plan needs a number of devices, not devices={cfg.devices}: add devices=8, for example.")
    if cfg.trainer.accelerator not in ("cpu", "auto") and cfg.hardware.kernel == "cpu_flash":
        raise ValueError(
            f"hardware={cfg.hardware.name} does not match trainer.accelerator={cfg.trainer.accelerator}: add"
            " hardware=v100, a100, h100 or h200."
        )
    for name in ("csv", "png"):
        path = cfg.plan[name]
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"plan.{name}={path} cannot be written: the folder {Path(path).parent} does not exist.")


def _check_checkpoint(path: str, strategy: str) -> None:
    if not (Path(path).exists() or "://" in path):
        raise ValueError(f"ckpt_path={path} does not exist.")
    if Path(path).is_dir() and not strategy.endswith(SPLITTING):
        raise ValueError(
            f"ckpt_path={path} is a folder, and this strategy reads files: convert it with"
            " lightning_lss.checkpoint.consolidate(folder, file), or use strategy=lss."
        )


def _check_split(cfg: DictConfig, strategy: str, world_size: int) -> None:
    """Refuse sizes that do not divide each other."""
    if strategy == "builtins.str" and world_size > 1:
        raise ValueError(
            f"strategy=single has one process, not devices={world_size}: use strategy=lss or strategy=ddp."
        )
    if not strategy.endswith(SPLITTING):
        if cfg.sequence_parallel_size not in ("auto", 1):
            raise ValueError(
                f"sequence_parallel_size={cfg.sequence_parallel_size} has no effect with this strategy: use strategy=lss."
            )
        return
    size = layouts.resolve_sequence_parallel_size(world_size, cfg.strategy.sequence_parallel_size)
    layout = cfg.strategy.get("layout", "auto")
    layout = "zigzag" if layout == "auto" else layout
    if strategy.endswith("MegatronStrategy"):
        layouts.check_heads(cfg.model.num_heads, size)
        layout = "contiguous"
    layouts.check_layout(layout)
    layouts.check_length(cfg.seq_len, size, layout)
