"""The transformer as a model: shapes, what a token may see, initialization, optimizer groups and FLOP count."""

import math
from dataclasses import replace

import pytest
import torch
from lightning.fabric.utilities.throughput import measure_flops
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_lss.models.lightning_module import LSSTransformer
from lightning_lss.models.transformer import ExecutionConfig, MLPBlock, SelfAttention, Transformer, TransformerConfig
from lightning_lss.nn.rotary import RotaryEmbedding
from lightning_lss.parallel.segment_local import count_parameters

SMALL = TransformerConfig(vocab_size=11, seq_len=16, width=32, num_layers=2, num_heads=4)
VARIANTS = {
    "default": {},
    "rotary": {"positions": "rotary"},
    "grouped": {"num_kv_heads": 2, "positions": "rotary"},
    "one key/value head": {"num_kv_heads": 1},
    "swiglu": {"mlp": "swiglu"},
    "untied": {"tie_embeddings": False},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def make_model(config: TransformerConfig = SMALL, **options: object) -> Transformer:
    torch.manual_seed(0)
    return LSSTransformer(config, **options).model


def tokens(length: int = 16, batch: int = 2) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


# -- what comes out ----------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("length", [1, 7, 16])
def test_tokens_become_logits(variant, length) -> None:
    assert make_model(**VARIANTS[variant])(tokens(length)).shape == (2, length, 11)


@every_variant
def test_every_parameter_gets_a_gradient(variant) -> None:
    model = make_model(**VARIANTS[variant])
    model(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def changed_logits(model: Transformer, position: int) -> Tensor:
    """Which positions' logits change with the token at ``position``, [L]."""
    before = tokens()
    after = before.clone()
    after[:, position] = (after[:, position] + 1) % 11
    return (model.double()(before) != model(after)).any(-1).all(0)


@every_variant
@pytest.mark.parametrize("position", [0, 6, 15])
def test_a_later_token_never_changes_an_earlier_logit(variant, position) -> None:
    changed = changed_logits(make_model(**VARIANTS[variant]), position)
    assert changed.tolist() == [False] * position + [True] * (16 - position)


@every_variant
@pytest.mark.parametrize("position", [0, 15])
def test_an_encoder_sees_every_token_from_everywhere(variant, position) -> None:
    assert changed_logits(make_model(causal=False, **VARIANTS[variant]), position).all()


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_order_of_tokens_counts(positions) -> None:
    # without positions an encoder would give permuted logits for permuted tokens
    model, x = make_model(causal=False, positions=positions).double(), tokens()
    assert not torch.allclose(model(x.flip(1)), model(x).flip(1), atol=1e-6)


def test_rotary_takes_any_length_and_a_learned_table_only_its_own() -> None:
    assert make_model(positions="rotary")(tokens(40)).shape == (2, 40, 11)
    with pytest.raises(ValueError, match=r"length 40 does not fit.*positions='rotary'"):
        make_model()(tokens(40))


# -- options -----------------------------------------------------------------------------------------------------------


def test_grouped_query_heads_share_keys_and_values() -> None:
    config = replace(SMALL, num_kv_heads=2)
    grouped, full = (SelfAttention(sizes, ExecutionConfig(), None).double() for sizes in (config, SMALL))
    full.load_state_dict({name: p for name, p in grouped.state_dict().items() if name != "key_value.weight"}, False)
    by_head = grouped.key_value.weight.unflatten(0, (2, 2, config.head_dim))  # [G, K or V, D, E]
    full.key_value.weight.data = by_head.repeat_interleave(2, 0).flatten(0, 2)
    x = torch.randn(2, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(grouped(x), full(x), rtol=1e-12, atol=1e-12)


def test_swiglu_gates_one_layer_with_another() -> None:
    block = MLPBlock(replace(SMALL, mlp="swiglu", width=96))
    assert block.gate.weight.shape == block.up.weight.shape == (256, 96)  # 8/3 x 96
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    gate = block.gate(x)
    torch.testing.assert_close(block(x), block.out(gate * gate.sigmoid() * block.up(x)))


@pytest.mark.parametrize(("width", "hidden"), [(32, 128), (96, 256), (120, 320), (768, 2048)])
def test_swiglu_is_eight_thirds_wide_rounded_up_to_64(width, hidden) -> None:
    assert MLPBlock(replace(SMALL, mlp="swiglu", width=width)).up.weight.shape == (hidden, width)


def test_gelu_is_four_times_as_wide() -> None:
    block = MLPBlock(SMALL)
    assert block.gate is None
    assert block.up.weight.shape == (128, 32)


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = make_model(), make_model(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    assert count_parameters(untied) - count_parameters(tied) == 11 * 32


def test_one_rotary_embedding_serves_all_layers() -> None:
    model = make_model(positions="rotary")
    assert len({id(m) for m in model.modules() if isinstance(m, RotaryEmbedding)}) == 1
    assert model.positions is None


def test_dropout_acts_in_training_only() -> None:
    model, x = make_model(dropout=0.5), tokens()
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), make_model().eval()(x))


def test_parameters_are_counted_once_and_tables_on_all_ranks() -> None:
    model = make_model()
    weights = 11 * 32 + 2 * (12 * 32**2) + 5 * 2 * 32  # embedding, layers, norms with bias
    assert count_parameters(model) == weights + 16 * 32
    assert count_parameters(model, size=4) == weights + 4 * 16 * 32


# -- initialization ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_what_adds_to_the_residual_stream_starts_smaller(mlp, tie_embeddings) -> None:
    model = make_model(width=64, num_layers=8, mlp=mlp, tie_embeddings=tie_embeddings, vocab_size=256, seq_len=256)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
            continue
        expected = 0.02 / math.sqrt(16) if name.endswith(".out.weight") else 0.02
        # a deviation of 4,096 or more numbers scatters by 1 / sqrt(8,192) = 1.1 %
        assert parameter.std().item() == pytest.approx(expected, rel=5 * 0.011), name


# -- optimizer groups --------------------------------------------------------------------------------------------------


@every_variant
def test_parameter_groups_hold_every_parameter_exactly_once(variant) -> None:
    model = make_model(**VARIANTS[variant])
    grouped = [p for group in model.parameter_groups(0.1) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    torch.optim.AdamW(model.parameter_groups(0.1))


@every_variant
def test_only_the_matrices_of_linear_layers_decay(variant) -> None:
    model = make_model(**VARIANTS[variant])
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    kept = {names[id(p)] for p in others["params"]}
    assert all("norm" in name or name in ("embedding.weight", "positions.weight") for name in kept)
    assert "embedding.weight" in kept  # also where it is the head
    assert all(isinstance(model.get_submodule(names[id(p)][: -len(".weight")]), nn.Linear) for p in decayed["params"])


# -- counting operations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu"}, {"num_kv_heads": 1}, {"tie_embeddings": False}])
def test_training_flops_are_those_that_torch_counts(options) -> None:
    config = TransformerConfig(seq_len=128, width=64, num_layers=2, num_heads=4, causal=False, **options)
    model, x = Transformer(config), torch.zeros(2, 128, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH):  # torch counts its matrix products, but not those of the CPU's flash kernel
        counted = measure_flops(model, lambda: model(x), torch.sum)
    assert config.training_flops(batch_size=2, length=128) == pytest.approx(counted, rel=0.02)


def test_a_causal_mask_hides_half_of_the_pairs() -> None:
    encoder, decoder = replace(SMALL, causal=False), SMALL
    pairs = encoder.training_flops(1, 16) - decoder.training_flops(1, 16)
    assert pairs == 12 * 2 * 32 * 16**2 / 2


def test_operations_can_be_counted_on_meta_tensors() -> None:
    # as Lightning's documentation does it, without memory or work
    with torch.device("meta"):
        model, x = Transformer(SMALL), torch.zeros(2, 16, dtype=torch.int64)
    assert measure_flops(model, lambda: model(x), torch.sum) > 0


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 30}, "width=30 must be a multiple of num_heads=4"),
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"num_kv_heads": 0}, "kv_heads=0 must be a positive integer"),
        ({"num_layers": 0}, "num_layers=0 must be a positive integer"),
        ({"vocab_size": -1}, "vocab_size=-1 must be a positive integer"),
        ({"positions": "sinusoidal"}, "positions='sinusoidal' is unknown: choose 'learned' or 'rotary'"),
        ({"head_chunks": 3}, "head_chunks=3 must be 'auto' or a divisor of the 4 key/value heads"),
        ({"head_chunks": 2, "keep_gathered": True}, "keep_gathered=True gathers all heads at once"),
        ({"mlp_tiles": 0}, "mlp_tiles=0 must be a positive integer"),
        ({"activation_checkpointing": "half"}, "activation_checkpointing='half' is unknown: choose 'none' or 'full'"),
        ({"mlp": "relu"}, "mlp='relu' is unknown: choose 'gelu' or 'swiglu'"),
        ({"betas": [0.9]}, r"betas=\[0\.9\] must be two numbers"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        LSSTransformer(SMALL, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout": 1.5}, r"p=1\.5 must be in \[0, 1\)"),
        ({"width": 12, "positions": "rotary"}, "head_dim=3 must be even"),
    ],
)
def test_what_its_parts_refuse_is_refused_when_the_model_is_made(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        make_model(**options)
