"""``HuggingFaceLM``: a checkpoint folder of Hugging Face as a LightningModule that fine-tunes it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lss.models.language import Batch, LanguageModule, OptimizerConfig, with_options
from lightning_lss.nn.loss import IGNORED


class HuggingFaceLM(LanguageModule):
    """Fine-tunes a causal language model of transformers from the folder that ``save_pretrained`` has written.

    A batch is a dict of ``inputs`` and ``targets``, int64 [B, L], as for :class:`~lightning_lss.LSSTransformer`. Packed
    documents are told from ``position_ids``, int64 [B, L], that begin anew in each. The loss is the mean cross entropy of
    the tokens whose target is not -100.

    Args:
        path: the folder.
        optimizer: options of the optimizer and its schedule.
        seq_len: tokens in a sequence, to refuse more than the model has positions for; None: not checked.
        vocab_size: token values of the data, to refuse data of another vocabulary; None: not checked.
        bytes_per_token: mean number of bytes of text per token, for bits per byte.
        dtype: of the weights, such as ``"float32"``; ``"auto"``: the checkpoint's. (AdamW loses small updates of bfloat16
            weights; use ``Trainer(precision="bf16-mixed")`` to compute in it.)
        config: values of the model's configuration to change by name, such as ``{"attention_dropout": 0.1}``.
        **options: fields of ``optimizer`` by name, such as ``lr=1e-5``.

    Raises:
        MisconfigurationException: if transformers is not installed.
        ValueError: if there is no checkpoint in the folder, or the model is not for these sequences or this vocabulary.
        TypeError: if an option is not a field of ``optimizer``.
    """

    flops_per_batch: float | None = None  # for throughput monitors: not counted

    def __init__(
        self,
        path: str | Path,
        optimizer: OptimizerConfig | None = None,
        *,
        seq_len: int | None = None,
        vocab_size: int | None = None,
        bytes_per_token: float = 1.0,
        dtype: str = "float32",
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        optimizer = with_options(optimizer or OptimizerConfig(), options)
        if options:
            raise TypeError(f"HuggingFaceLM does not take {', '.join(options)}.")
        path = Path(path).expanduser()
        super().__init__(_load(path, seq_len, vocab_size, dtype, dict(config or {})), optimizer, bytes_per_token)
        given = {"path": str(path), "seq_len": seq_len, "vocab_size": vocab_size, "bytes_per_token": bytes_per_token}
        self.save_hyperparameters({**given, "dtype": dtype, "config": dict(config or {}), **asdict(optimizer)})

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Compute logits [B, L, V] of tokens, int64 [B, L]."""
        more = {} if position_ids is None else {"position_ids": position_ids}  # some models count them themselves
        logits: Tensor = self.model(input_ids=tokens, use_cache=False, **more).logits
        return logits

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Predict the most probable token at every position, int64 [B, L]."""
        return self._logits(batch).argmax(-1)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Group parameters for an optimizer, with weight decay only for matrices that are not embeddings."""
        embeddings = {x.weight for x in self.model.modules() if isinstance(x, nn.Embedding)}  # also of a tied head
        decays = {x: x.dim() > 1 and x not in embeddings for x in self.model.parameters()}
        return [
            {"name": "decayed", "params": [x for x in decays if decays[x]], "weight_decay": weight_decay},
            {"name": "others", "params": [x for x in decays if not decays[x]], "weight_decay": 0.0},
        ]

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, targets = self._logits(batch).flatten(0, 1), batch["targets"].flatten()
        return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum"), (
            targets != IGNORED
        ).sum()

    def _logits(self, batch: Batch) -> Tensor:
        if "mask" in batch and "position_ids" not in batch:
            raise ValueError(
                "The batch has a mask, which a Hugging Face model does not take: give position_ids that begin anew in each"
                " document (data.packed=true does)."
            )
        logits: Tensor = self(batch["inputs"], batch.get("position_ids"))
        return logits


def _load(path: Path, seq_len: int | None, vocab_size: int | None, dtype: str, changes: dict[str, Any]) -> nn.Module:
    """Load the model, after a look at its configuration."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise MisconfigurationException(
            'Models of Hugging Face need the package transformers: pip install "lightning-lss[hf]".'
        ) from error
    if not (path / "config.json").is_file():
        raise ValueError(
            f"path={str(path)!r} is not a checkpoint of Hugging Face: give a folder that save_pretrained has written."
        )
    config, unknown = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **changes)
    if unknown:
        raise ValueError(
            f"The configuration of {path} has no {', '.join(unknown)}: its keys are those of its config.json."
        )
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if seq_len is not None and positions is not None and seq_len > positions:
        raise ValueError(
            f"seq_len={seq_len} is more than the {positions} positions of {path}: use seq_len={positions}, or, if the model's positions"
            f" are rotary, +model.config.max_position_embeddings={seq_len}."
        )
    if getattr(text, "output_router_logits", False):
        raise ValueError(
            f"{path} asks for a loss that balances its experts, which is not part of the loss here: add"
            " +model.config.output_router_logits=false, or write a LightningModule that returns the model's own loss."
        )
    if vocab_size is not None:
        _check_vocabulary(path, vocab_size, text.vocab_size)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)
    return model.train()  # from_pretrained returns it in evaluation


def _check_vocabulary(path: Path, of_data: int, of_model: int) -> None:
    """Refuse data whose tokens mean something else to the model, such as bytes.

    The numbers of a tokenizer may be fewer than the model's, which are often rounded up.
    """
    sizes = {of_model}
    if (path / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        vocabulary = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab(with_added_tokens=True)
        sizes |= {len(vocabulary), max(vocabulary.values()) + 1}
    if of_data not in sizes:
        what = "bytes" if of_data == 256 else f"tokens of a vocabulary of {of_data}"
        raise ValueError(
            f"The data are {what}, but {path} has a vocabulary of {of_model}: add data=tokens data.tokenizer={path}"
            " data.path=<your text>."
        )
