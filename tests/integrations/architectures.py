"""Small random models of Hugging Face, and batches for them as people make them."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from torch import Tensor

VOCAB = 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TWO_KINDS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        dict(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
    ),
    "llama": ("LlamaConfig", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SIZES, **GROUPED}),
    "mistral": ("MistralConfig", {**SIZES, **GROUPED, "sliding_window": 4}),
    "gemma2": ("Gemma2Config", {**SIZES, **GROUPED, **TWO_KINDS}),
    "gemma3": ("Gemma3TextConfig", {**SIZES, **GROUPED, **TWO_KINDS}),
    "gpt_oss": ("GptOssConfig", {**SIZES, **GROUPED, **EXPERTS, **TWO_KINDS}),
    "mixtral": ("MixtralConfig", {**SIZES, **GROUPED, **EXPERTS}),
    "qwen3_moe": ("Qwen3MoeConfig", {**SIZES, **GROUPED, **EXPERTS}),
    "llama4": (
        "Llama4TextConfig",
        {**SIZES, **GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 4}
        | {"intermediate_size_mlp": 64, "no_rope_layers": [1, 0]},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **SIZES,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        }
        | {"moe_intermediate_size": 32, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4}
        | {"qk_nope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 4},
    ),
}
"""By name: the class of the configuration, and its arguments."""


class FineTuned(pl.LightningModule):
    """What people write: the loss is the model's own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def predict_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        logits: Tensor = self.model(**{name: x for name, x in batch.items() if name != "labels"}).logits
        return logits

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([x for x in self.parameters() if x.requires_grad], lr=0.1)


class Encoded(FineTuned):
    """A model without a loss of its own."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return (self.model(batch["input_features"]).last_hidden_state * batch["weights"]).pow(2).mean()


def decoder(name: str) -> FineTuned:
    kind, arguments = DECODERS[name]
    return FineTuned(transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments)))


def _bert() -> FineTuned:
    return FineTuned(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **NO_DROPOUT)))


def _bert_classifier() -> FineTuned:
    config = transformers.BertConfig(**SIZES, **NO_DROPOUT, num_labels=3)
    return FineTuned(transformers.BertForSequenceClassification(config))


def _modernbert() -> FineTuned:
    ids = {f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    return FineTuned(
        transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**SIZES, local_attention=4, **ids))
    )


def _t5() -> FineTuned:
    sizes = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    return FineTuned(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)))


def _vit() -> FineTuned:
    sizes = {**SIZES, **NO_DROPOUT, "image_size": 16, "patch_size": 4, "num_labels": 3}
    for name in ("vocab_size", "max_position_embeddings"):
        del sizes[name]
    return FineTuned(transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)))


def _whisper() -> Encoded:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = dict(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=8, dropout=0.0
    )
    return Encoded(WhisperEncoder(transformers.WhisperConfig(**sizes, max_source_positions=16)))


OTHERS: dict[str, Callable[[], FineTuned]] = {
    "bert": _bert,
    "bert_classifier": _bert_classifier,
    "modernbert": _modernbert,
    "t5": _t5,
    "vit": _vit,
    "whisper": _whisper,
}


def make_model(name: str) -> FineTuned:
    torch.manual_seed(0)
    module = decoder(name) if name in DECODERS else OTHERS[name]()
    module.model.config.use_cache = (
        False  # else transformers does not see that documents are packed, on one device either
    )
    return module.to(dtype_of(name))


def dtype_of(name: str) -> torch.dtype:
    """The dtype that the architecture runs in: grouped products of experts take no float64, and Gemma 2 masks with the least
    number of float32."""
    single = {"gpt_oss", "mixtral", "qwen3_moe", "llama4", "deepseek_v3", "gemma2"}
    return torch.float32 if name in single else torch.float64


def make_batches(name: str, how: str, length: int = 16, rows: int = 4, steps: int = 3) -> list[dict[str, Any]]:
    """Batches as a data loader gives them: ``plain``, ``padded`` (left and right), ``padded on the right``, ``packed`` (two
    documents a row), or ``flattened`` (one row of documents, by the library's own collator)."""
    generator = torch.Generator().manual_seed(7)
    return [_make_batch(name, how, length, rows, generator) for _ in range(steps)]


def _flatten(documents: list[Tensor]) -> dict[str, Any]:
    """Documents in one row, with all that the collator can say of them, and the number of targets of an accumulated batch."""
    collate = transformers.DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_tensors="pt"
    )
    batch = collate([{"input_ids": x.tolist()} for x in documents])
    return {**batch, "num_items_in_batch": 2 * sum(map(len, documents))}


def _make_batch(name: str, how: str, length: int, rows: int, generator: torch.Generator) -> dict[str, Any]:
    dtype = dtype_of(name)
    if name == "vit":
        images = torch.randn(rows, 3, 16, 16, generator=generator, dtype=dtype)
        return {"pixel_values": images, "labels": torch.arange(rows) % 3}
    if name == "whisper":
        sound = torch.randn(rows, 8, 32, generator=generator, dtype=dtype)
        return {"input_features": sound, "weights": torch.randn(rows, 16, 32, generator=generator, dtype=dtype)}
    if how == "flattened":
        return _flatten([torch.randint(1, VOCAB, (n,), generator=generator) for n in (5, length - 8, 3)])
    tokens = torch.randint(1, VOCAB, (rows, length), generator=generator)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    if name in ("bert", "modernbert"):
        batch["labels"] = torch.where(torch.arange(length) % 3 == 1, tokens, -100)
    if name == "bert_classifier":
        batch["labels"] = torch.arange(rows) % 3
    if name == "t5":
        batch["labels"] = tokens[:, :12].clone()
    if how in ("padded", "padded on the right"):
        mask = torch.ones_like(tokens)
        mask[0, length - 5 :] = 0
        mask[1, : 5 if how == "padded" else 0] = 0
        batch["attention_mask"] = mask
        if batch["labels"].shape == mask.shape:
            batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    if how == "packed":
        first = length // 3
        batch["position_ids"] = (
            torch.cat([torch.arange(first), torch.arange(length - first)]).expand(rows, -1).contiguous()
        )
    return batch
