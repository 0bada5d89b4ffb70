"""The direction in which an inner optimizer will step next, without taking the step.

Each function takes ``param``, ``grad`` (the coming gradient) and the tensors of ``state`` with a
batch of layers in front, and ``group``, the optimizer's hyperparameters.  It returns ``U`` such
that the optimizer is about to subtract ``lr * U``, weight decay aside: decay is no answer to the
gradient, so the re-basing does not model it.  A state that does not exist yet is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Group = Mapping[str, Any]
Direction = Callable[[Tensor, Tensor, State, Group], Tensor]


def sgd(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """Return SGD's direction, with momentum and Nesterov."""
    momentum = group["momentum"]
    if momentum == 0:
        return grad
    buffer = state.get("momentum_buffer")
    buffer = grad if buffer is None else momentum * buffer + (1 - group["dampening"]) * grad
    return grad + momentum * buffer if group["nesterov"] else buffer


def adam(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """Return the direction of Adam and AdamW, with amsgrad."""
    beta1, beta2 = group["betas"]
    step = _next_step(state, grad)
    first = _average(state, "exp_avg", grad, beta1)
    second = _average(state, "exp_avg_sq", grad.square(), beta2)
    if group.get("amsgrad"):
        second = torch.maximum(second, state.get("max_exp_avg_sq", torch.zeros_like(second)))
    denominator = (second / (1 - beta2**step)).sqrt() + group["eps"]
    return first / (1 - beta1**step) / denominator


def nadam(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """Return NAdam's direction."""
    beta1, beta2 = group["betas"]
    step = _next_step(state, grad)
    decay = group["momentum_decay"]
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * decay))
    mu_product = _like(state.get("mu_product", torch.ones((), device=grad.device)), grad) * mu
    first = _average(state, "exp_avg", grad, beta1)
    second = _average(state, "exp_avg_sq", grad.square(), beta2)
    denominator = (second / (1 - beta2**step)).sqrt() + group["eps"]
    ahead = mu_next / (1 - mu_product * mu_next) * first
    return ((1 - mu) / (1 - mu_product) * grad + ahead) / denominator


def radam(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """Return RAdam's direction: plain momentum in its first steps, before rectification."""
    beta1, beta2 = group["betas"]
    step = _next_step(state, grad)
    first = _average(state, "exp_avg", grad, beta1) / (1 - beta1**step)
    second = _average(state, "exp_avg_sq", grad.square(), beta2)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
    rectified = rho > 5
    safe = torch.where(rectified, rho, torch.full_like(rho, 6.0))
    rectification = (
        (safe - 4) * (safe - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * safe)
    ).sqrt()
    adaptive = rectification * (1 - beta2**step).sqrt() / (second.sqrt() + group["eps"])
    return first * torch.where(rectified, adaptive, torch.ones_like(adaptive))


def adamax(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """Return Adamax's direction."""
    beta1, beta2 = group["betas"]
    step = _next_step(state, grad)
    first = _average(state, "exp_avg", grad, beta1) / (1 - beta1**step)
    largest = beta2 * state.get("exp_inf", torch.zeros_like(grad))
    return first / torch.maximum(largest, grad.abs() + group["eps"])


def rmsprop(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """Return RMSprop's direction, centered and with momentum."""
    alpha = group["alpha"]
    second = _average(state, "square_avg", grad.square(), alpha)
    if group["centered"]:
        second = second - _average(state, "grad_avg", grad, alpha).square()
    direction = grad / (second.sqrt() + group["eps"])
    if group["momentum"] == 0:
        return direction
    return group["momentum"] * state.get("momentum_buffer", torch.zeros_like(grad)) + direction


def adagrad(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """Return Adagrad's direction."""
    step = _next_step(state, grad)
    total = state.get("sum", torch.zeros_like(grad)) + grad.square()
    return grad / (total.sqrt() + group["eps"]) / (1 + (step - 1) * group["lr_decay"])


def adafactor(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """Return the direction of ``torch.optim.Adafactor``, which depends on the parameter's size."""
    lr, (eps1, eps2) = group["lr"], group["eps"]
    eps1 = torch.finfo(param.dtype).eps if eps1 is None else eps1
    step = _next_step(state, grad)
    weight = step ** group["beta2_decay"]
    square = grad.square()
    zero = torch.zeros_like(square)
    row = state.get("row_var", zero.mean(-1, keepdim=True)).lerp(
        square.mean(-1, keepdim=True), weight
    )
    col = state.get("col_var", zero.mean(-2, keepdim=True)).lerp(
        square.mean(-2, keepdim=True), weight
    )
    variance = row @ col / row.mean(-2, keepdim=True).clamp_min(eps1)
    update = variance.clamp_min(eps1 * eps1).rsqrt() * grad
    inner = tuple(range(1, grad.ndim))
    denominator = (update.square().mean(inner, keepdim=True).sqrt() / group["d"]).clamp_min(1)
    size = param.square().mean(inner, keepdim=True).sqrt().clamp_min(eps2)
    return update * size * step.rsqrt().clamp_max(lr) / (denominator * lr)


def lion(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """Return Lion's direction (arXiv 2302.06675)."""
    return _average(state, "exp_avg", grad, group["betas"][0]).sign()


def ademamix(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """Return AdEMAMix's direction (arXiv 2409.03137), with its schedules of alpha and beta3."""
    beta1, beta2, beta3 = group["betas"]
    alpha, t_alpha, t_beta3 = group["alpha"], group["t_alpha"], group["t_beta3"]
    step = _next_step(state, grad)
    if t_alpha:
        alpha = (step * alpha / t_alpha).clamp_max(alpha)
    if t_beta3:
        done, log1, log3 = step / t_beta3, log(beta1), log(beta3)
        beta3 = (log1 * log3 / ((1 - done) * log3 + done * log1)).exp().clamp_max(beta3)
    fast = _average(state, "exp_avg", grad, beta1) / (1 - beta1**step)
    slow = _average(state, "exp_avg_slow", grad, beta3)
    second = _average(state, "exp_avg_sq", grad.square(), beta2)
    denominator = (second / (1 - beta2**step)).sqrt() + group["eps"]
    return (fast + alpha * slow) / denominator


def _average(state: State, name: str, new: Tensor, decay: float | Tensor) -> Tensor:
    old = state.get(name)
    return new * (1 - decay) if old is None else old.lerp(new, 1 - decay)


def _next_step(state: State, grad: Tensor) -> Tensor:
    """Return the number of the coming step, a tensor that broadcasts over the batch of layers."""
    step = state.get("step")
    return _like(torch.zeros((), device=grad.device) if step is None else step, grad) + 1


def _like(scalar: Tensor, grad: Tensor) -> Tensor:
    """Return one scalar for all layers or one each, shaped to broadcast with (layers, ...)."""
    scalar = scalar.to(grad.dtype)
    return scalar.reshape(-1, *(1,) * (grad.ndim - 1)) if scalar.ndim else scalar
