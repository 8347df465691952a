"""Every rule computes on parts what torch computes on whole tensors, with its gradients."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lss.sequence.segment import SequenceShard
from lightning_lss.tensor import Placement, split, whole

B, E, H, V = 2, 4, 2, 7
BY_RULE = """
x + y ; x + 1 ; 2 - x ; x * pos ; pos * x ; x / (y.abs() + 1) ; x - y[:, :1] ; x ** 2 ; 2 ** x ; -x ; x > y ; x + b
x.add(y, alpha=2) ; (ids == 3).float() ; ids % 3 ; ids // 2 ; ~(ids > 3) ; (ids > 3) & (ids < 6)
torch.where(ids[..., None] > 3, x, y) ; x.masked_fill(ids[..., None] > 3, 0.5) ; F.gelu(input=x)
torch.sum(input=x, dim=1) ; F.cross_entropy(input=x.mT, target=ids % E) ; F.gelu(x) ; F.relu(x) ; F.silu(x)
F.softplus(x) ; torch.tanh(x) ; x.sigmoid() ; x.exp() ; x.clamp(-1, 1) ; x.clamp(min=pos) ; F.hardswish(x)
torch.lerp(x, y, 0.3) ; x.addcmul(y, y) ; torch.maximum(x, y) ; torch.max(x, y) ; x.isnan()
torch.complex(x, y).abs() ; torch.view_as_complex(x.unflatten(-1, (2, 2))).real ; x.softmax(-1) ; F.log_softmax(x, -1)
x.softmax(0) ; F.layer_norm(x, (E,), w[0]) ; F.rms_norm(x, (E,)) ; F.normalize(x, dim=-1) ; x.cumsum(-1)
x.sort(-1)[0] ; x.topk(2, -1)[0] ; F.glu(x, -1) ; x.flip(-1) ; x.flip(2) ; x.roll(1, -1) ; x.argsort(dim=-1) ; x.sum()
x.mean() ; x.sum(-1) ; x.sum(1) ; x.mean(1) ; x.mean((0, 1)) ; x.sum(1, keepdim=True) ; x.mean(dim=-1, keepdim=True)
x.var(-1) ; x.std(-1, keepdim=True) ; x.norm(dim=-1) ; x.norm(2, -1, True) ; x.amax(-1) ; x.max(-1)[0]
x.max(dim=2).indices ; x.argmax(-1) ; (x > 2).any() ; (x > -9).all() ; (x > 0).any(1) ; (ids > 5).any(-1)
x.logsumexp(-1) ; torch.sum(x, 0) ; torch.mean(x, dim=0) ; x.transpose(1, 2) ; x.mT ; x.permute(2, 0, 1)
x.movedim(1, 0) ; x.swapaxes(0, 1) ; x.transpose(0, 1).transpose(0, 2) ; ids.t() ; ids.T ; x.view(B, L, 2, 2)
x.reshape(B * L, E) ; x.reshape(-1, E).view(B, L, E) ; x.flatten(0, 1) ; x.flatten()
x.flatten(1).unflatten(1, (L, E)) ; x.view(-1, L, E, 1) ; x.unflatten(-1, (2, 2)).transpose(1, 2) ; x.unsqueeze(1)
x.unsqueeze(-1) ; x.unsqueeze(1).squeeze(1) ; x[:, :, None].squeeze() ; x.view_as(y)
x.unsqueeze(2).expand(B, L, 3, E) ; x.unsqueeze(2).expand(-1, -1, 3, -1) ; x.repeat(2, 1, 1)
x.repeat_interleave(2, -1) ; pos.expand_as(x) ; x.chunk(2, -1)[1] ; x.split(2, dim=-1)[0] ; x.split([1, 3], -1)[1]
x.unbind(-1)[2] ; x.narrow(-1, 1, 2) ; x.select(-1, 1) ; x.select(0, 1) ; x.index_select(-1, torch.tensor([2, 0]))
torch.stack([a for a in x]) ; torch.cat([x, y], -1) ; torch.cat([x, pos.expand(B, L, E)], 0) ; torch.stack([x, y])
torch.stack([x, y], -1) ; torch.stack([x, y], 1) ; x[0] ; x[..., 1] ; x[:, :, 1:3] ; x[None] ; x[:, None]
x[..., None, :] ; x[:] ; x[:, :L] ; x[1, :, 0] ; x[-1:, ..., -1] ; x[:, 0] ; x[:, -1] ; x[:, 3, 1] ; x[:, :2]
x[:, -3:] ; x[:, 1:5:2] ; x[..., -1, :] ; x[:, 1:] ; x[:, :-1] ; x[:, 1:-1] ; x[:, ::2] ; x[:, 3:] ; x[:, 5:5]
x[:, -7:].mean(1) ; x.gather(-1, ids[..., None] % E) ; F.embedding(ids, table) ; table[ids]
F.one_hot(ids, V).double() ; nn.functional.embedding(ids.flatten(), table) ; F.linear(x, w) ; x @ w ; w @ x.mT
x @ x.mT ; x.mT @ x ; torch.bmm(x, y.mT) ; q @ k.mT ; (q @ k.mT).softmax(-1) @ v ; pos.T @ pos2 @ x.mT
torch.baddbmm(y, x, w.expand(B, E, E)) ; torch.einsum("bld,bmd->blm", x, y) ; torch.einsum("bhid,bhjd->bhij", q, k)
torch.einsum("b l e, e f -> b l f", x, w) ; torch.einsum("...ld,...md->...lm", q, k)
torch.einsum("b...d,d->b...", x, b) ; torch.einsum("ble,ble->be", x, y) ; torch.einsum("bld,ld->b", x, pos)
torch.einsum("lm,bme->ble", pos @ pos2.T, x) ; attend(q, k, v) ; attend(q, k, v, is_causal=True)
attend(q, k, v, attn_mask=ids[:, None, None] > 2) ; attend(q, k, v, attn_mask=tril)
attend(q, k, v, attn_mask=tril.double() * 0.3) ; attend(q[0], k[0], v[0], scale=0.2)
attend(q, k[:, :1], v[:, :1], is_causal=True, enable_gqa=True) ; attend(q, k, v, attn_mask=bias)
attend(q, memory, memory) ; attend(q, k, torch.cat([v, v], -1))
attend(x.transpose(0, 1), y.transpose(0, 1), x.transpose(0, 1)) ; mha(x, x, x)[0]
mha(x, x, x, need_weights=False)[0] ; mha(x, x, x, key_padding_mask=ids < 2, need_weights=False)[0]
mha(x, x, x, attn_mask=~tril, is_causal=True)[0]
mha(x, x, x, attn_mask=~tril, key_padding_mask=(ids < 2) & (torch.arange(L) > 0))[0]
mha(x, memory[:, 0], memory[:, 0])[0] ; mha(x, x, x, attn_mask=bias[0])[0]
mha(x, x, x, attn_mask=zeros * bias[0])[0] ; mha(x, x, x, attn_mask=~tril, is_causal=True, need_weights=False)[0]
encoder(x) ; encoder(x, src_key_padding_mask=ids < 2)
decoder(x, y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(L, dtype=x.dtype), tgt_is_causal=True)
F.cross_entropy(x.flatten(0, 1), ids.flatten() % E) ; F.cross_entropy(x.mT, ids % E)
F.cross_entropy(x.mT, ids % E, ignore_index=2) ; F.cross_entropy(x.mT, ids % E, reduction="sum")
F.cross_entropy(x.mT, ids % E, reduction="none")
F.cross_entropy(x.mT, ids % E, weight=w[0].abs().detach(), label_smoothing=0.1)
F.nll_loss(x.log_softmax(-1).mT, ids % E) ; F.cross_entropy(x.reshape(-1, E), (plain_ids % E).reshape(-1))
F.mse_loss(x, y) ; F.l1_loss(x, y, reduction="sum") ; F.smooth_l1_loss(x, y) ; F.mse_loss(x, y, reduction="none")
F.binary_cross_entropy_with_logits(x, y.sigmoid()) ; F.mse_loss(x, plain) ; F.conv1d(x.mT, kernel, padding=1)
F.conv1d(x.mT, kernel, padding="same", dilation=1) ; F.conv1d(x.mT, kernel, padding=4, dilation=4)
F.conv1d(x.mT, kernel[..., :2], padding="same") ; nn.functional.conv2d(x[:, None], kernel[:1, None, :3, :], padding=1)
x.float().detach() ; x.to(torch.float64) ; x.contiguous() ; x.detach() ; x.clone() ; torch.zeros_like(x)
torch.ones_like(x) * x ; x.new_zeros(3) ; x.type_as(y)
x.size(1) + x.shape[1] + len(x) + x.numel() + x.dim() + x.stride(0) ; in_place(x) ; assign(x) ; assign_where(x, ids)
windows(x) ; 1 / (x.abs() + 1) ; halve(x) ; hooked(x) ; retained(x) ; with_gradient(x) ; with_gradient_of_whole(x, plain)
"""
ON_WHOLE = """
x[:, 1:] ; x[:, :-1] ; x[:, 1:-1] ; x[:, 2:].softmax(1) ; x[:, 1:].mean(1)
F.cross_entropy(x[:, :-1].reshape(-1, E), ids[:, 1:].reshape(-1) % E) ; x[:, 1:] - x[:, :-1] ; x[:, ::2] ; x.cumsum(1)
x.flip(1) ; x.roll(1, 1) ; x.softmax(1) ; F.pad(x, (0, 0, 1, 0)) ; F.pad(ids, (0, 1), value=-100)[..., 1:] ; x.amax(1)
x.max() ; x.std() ; x.argmax(1) ; torch.cat([x[:, :1], x], 1) ; x.sort(1)[0] ; x[ids > 3].sum()
x[torch.arange(B), torch.tensor([1, 2])] ; x.unbind(1)[3] ; x.diff(dim=1) ; torch.cdist(x, y)
F.linear(x.mT, torch.ones(3, L, dtype=x.dtype)) ; x.reshape(2, -1) ; F.max_pool1d(x.mT, 3, 1, 1)
F.conv1d(x.mT, kernel, stride=2, padding=1) ; F.batch_norm(x.mT, None, None, training=True) ; lstm(x)[0]
torch.rand_like(x) * 0 ; x.tolist()[0][0][0] ; round(float(x.sum()) + x.flatten()[3].item(), 9)
F.scaled_dot_product_attention(memory, k, v) ; torch.where(x > 0)[0]
nn.functional.embedding(ids, table, scale_grad_by_freq=True) ; x.prod(1) ; x.var(1) ; torch.fft.rfft(x, dim=1).abs()
torch.outer(x[0, :, 0], x[0, :, 1]) ; x.index_add(1, torch.tensor([1]), x[:, :1])
torch.norm(x, dim=1) ; in_slices(x) ; noise(x) ; noise(x.mT) ; noise(q)
"""


def in_slices(x: Tensor) -> Tensor:
    """Slices share memory with what they are of, and slices of slices too."""
    z = x.clone()
    later = z[:, 1:]
    later.mul_(2)
    inner = later[:, 1:, 1:3]
    inner += x[:, 2:, 1:3]
    inner[..., 0] = 3.0
    return torch.cat([z, later], 1)


def in_place(x: Tensor) -> Tensor:
    z = x * 1
    z += 1
    z.mul_(2).add_(x)
    z[..., 0] = 3.0
    z[:, :, 1] = x[..., 0]
    return z


def assign(x: Tensor) -> Tensor:
    z = torch.empty_like(x)
    z[..., ::2], z[..., 1::2] = x[..., ::2] * 2, x[..., 1::2]
    return z


def assign_where(x: Tensor, ids: Tensor) -> Tensor:
    z = x * 1
    z[ids > 3] = 0.5
    return z


def noise(x: Tensor) -> Tensor:
    """Random numbers for the same places as on one device, whatever the order in memory."""
    torch.manual_seed(4)
    return x + torch.randn_like(x) + torch.empty_like(x).normal_() + torch.bernoulli(x.detach().sigmoid())


def windows(x: Tensor) -> Tensor:
    if x.shape[1] % 12:
        return x
    y = x.view(B, x.shape[1] // 3, 3, E)
    return F.scaled_dot_product_attention(y, y, y).reshape(B, -1, E)


def halve(x: Tensor) -> Tensor:
    z = x * 1
    z /= 2
    return z


def hooked(x: Tensor) -> Tensor:
    z = x * 1
    z.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1) / gradient.abs().sum())
    z.register_hook(lambda gradient: None)
    return z


def retained(x: Tensor) -> Tensor:
    """The gradient of a tensor in between."""
    z = x * 1
    z.retain_grad()
    (z * z).sum().backward()
    return z.grad  # type: ignore[return-value]


def with_gradient(x: Tensor) -> Tensor:
    """A backward pass of many losses at once."""
    losses = (x * x).sum(-1)
    losses.backward(torch.ones_like(losses))
    return losses.detach()


def with_gradient_of_whole(x: Tensor, plain: Tensor) -> Tensor:
    torch.autograd.backward([x * x], [plain])
    return x.detach()


def tensors(length: int) -> dict[str, Any]:
    """What expressions are made of; leaves that have a gradient first."""
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"dtype": torch.float64}
    leaves = {
        **{name: torch.randn(B, length, E, **kwargs) for name in ("x", "y")},
        **{name: torch.randn(B, H, length, E, **kwargs) for name in ("q", "k", "v")},
        **{name: torch.randn(length, E, **kwargs) for name in ("pos", "pos2")},
        "w": torch.randn(E, E, **kwargs),
        "b": torch.randn(E, **kwargs),
        "table": torch.randn(V, E, **kwargs),
        "bias": torch.randn(H, length, length, **kwargs),
        "memory": torch.randn(B, H, 5, E, **kwargs),
        "kernel": torch.randn(E, E, 3, **kwargs),
    }
    modules = {
        "mha": nn.MultiheadAttention(E, H, batch_first=True),
        "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 8, dropout=0.0, batch_first=True), 1),
        "decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 8, dropout=0.0, batch_first=True), 1),
        "lstm": nn.LSTM(E, E, batch_first=True),
    }
    parameters = {f"{n}.{p}": x for n, m in modules.items() for p, x in m.double().named_parameters()}
    ids = torch.randint(0, V, (B, length))
    others = {"ids": ids, "plain_ids": ids, "plain": torch.randn(B, length, E, **kwargs), "L": length}
    others["zeros"] = torch.zeros(length, length, **kwargs)
    others["tril"] = torch.ones(length, length, dtype=torch.bool).tril()
    return {"leaves": leaves, "parameters": parameters, "modules": modules, "others": others}


SPLIT = {"x": 1, "y": 1, "q": 2, "k": 2, "v": 2, "ids": 1}  # the dimension of the sequence


def evaluate(expression: str, length: int, shard: SequenceShard | None) -> tuple[Any, dict[str, Tensor]]:
    """The value of an expression, and the gradients of a weighted sum of it."""
    given = tensors(length)
    leaves = {name: x.requires_grad_() for name, x in given["leaves"].items()}
    names = {**leaves, **given["others"], **given["modules"]}
    if shard is not None:
        names |= {n: split(names[n], Placement(d, names[n].size(d), shard)) for n, d in SPLIT.items()}
    scope = {**globals(), **names, "attend": F.scaled_dot_product_attention}
    value = eval(expression, scope)
    if not isinstance(value, Tensor):
        return value, {}
    shape = value.shape
    result = whole(value)
    assert shape == result.shape, f"shown as {shape}, is {result.shape}"
    if value.is_floating_point() and value.requires_grad:
        weights = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (value * weights).sum().backward()
    grads = {n: x.grad for n, x in {**leaves, **given["parameters"]}.items() if x.grad is not None}
    return result.detach(), grads


def failures(rank: int, layout: str, length: int, expressions: list[str], by_rule: bool) -> dict[str, str]:
    """Which expressions differ on ranks, and how."""
    size, found = dist.get_world_size(), {}
    shard = SequenceShard(rank, size, layout, dist.group.WORLD)
    for expression in expressions:
        expected, gradients = evaluate(expression, length, None)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if by_rule else "ignore")
            try:
                result, parts = evaluate(expression, length, shard)
            except Exception as error:
                found[expression] = f"{type(error).__name__}: {error}"
                continue
        if isinstance(expected, Tensor):
            same = expected.dtype == result.dtype and torch.allclose(result, expected, rtol=1e-10, atol=1e-12)
        else:
            same = result == expected
        if not same:
            found[expression] = f"{result} for {expected}"
        for name, gradient in gradients.items():
            total = torch.zeros_like(gradient) + parts.get(name, 0)
            dist.all_reduce(total)
            error = (total / size - gradient).abs().max().item()
            if not error < 1e-10:
                found[f"{expression}: gradient of {name}"] = str(error)
    return found


def expressions(text: str) -> list[str]:
    return [x.strip() for line in text.strip().splitlines() for x in line.split(" ; ")]


@pytest.mark.parametrize(("size", "layout", "length"), [(2, "zigzag", 12), (2, "contiguous", 9), (3, "zigzag", 11)])
def test_rules(world: Any, size: int, layout: str, length: int) -> None:
    assert world.run(size, failures, layout, length, expressions(BY_RULE), True)[0] == {}


@pytest.mark.parametrize(("size", "layout", "length"), [(2, "zigzag", 12), (3, "contiguous", 11)])
def test_functions_without_rules(world: Any, size: int, layout: str, length: int) -> None:
    assert world.run(size, failures, layout, length, expressions(ON_WHOLE), False)[0] == {}
