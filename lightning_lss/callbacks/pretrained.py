"""What a run has made of a Hugging Face model, as a folder of Hugging Face."""

import shutil
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn
from typing_extensions import override

_COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja")
"""Files of tokenizers, as patterns."""


class PretrainedWriter(Callback):
    """Writes the Hugging Face model of a module at the end of training: ``from_pretrained`` loads what is in ``folder``.

    The weights are those after the last step, whole also where ranks hold parts of them; of a model with adapters (peft),
    those of the adapters. The files of a tokenizer are copied from the folder that the model was loaded from. Of several
    models the first is written. A module without one is left alone.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = next(((name, x) for name, x in pl_module.named_modules() if _is_pretrained(x)), None)
        if found is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        name, model = found
        weights = trainer.strategy.lightning_module_state_dict()  # by all ranks: parts are gathered on the first
        if trainer.is_global_zero:
            prefix = f"{name}."
            weights = {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)}
            model.save_pretrained(self.folder, state_dict=weights)
            _copy_tokenizer(Path(model.config._name_or_path), self.folder)


def _is_pretrained(module: nn.Module) -> bool:
    """Whether the module is a ``PreTrainedModel`` or a ``PeftModel``, whose packages need not be installed to tell."""
    kinds = {(x.__module__.split(".")[0], x.__name__) for x in type(module).mro()}
    return not kinds.isdisjoint([("transformers", "PreTrainedModel"), ("peft", "PeftModel")])


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in {file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, target / file.name)
