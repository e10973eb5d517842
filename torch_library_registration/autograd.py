"""Autograd of the ops; what they cannot do is refused, never silently wrong.

Each op has a ``torch.autograd.Function``, which serves every transform of torch.func, and refuses
second derivatives and forward-mode AD. The dispatcher hands the op to it wherever autograd or a
transform sees the op first, so traced graphs hold the op itself, and are differentiated alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from rnnt_op.arguments import Arguments, JointArguments, LogitsArguments
from rnnt_op.torch_private import (
    TRANSFORMS,
    backward_keeps_graph,
    below_autograd,
    is_batched_gradient,
    transforms_are_active,
)

from .schemas import LIBRARY

_OPS = torch.ops.rnnt_op

_ELEMENTS_AT_ONCE = 2**22  # of a gradient, widened to the loss's dtype

_Gradients = tuple[Tensor | None, ...]


def _function(
    name: str,
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Any:
    """The Function of an op.

    Args:
        name: of the op.
        save: its ``setup_context``.
        backward: its ``backward``, which gets None where no gradient comes.
    """
    op = getattr(_OPS, name).default

    def forward(*arguments: Any) -> Any:
        with below_autograd():
            return op(*arguments)

    # Else every call would look it up.
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """One call after another; each sees which of its tensors require gradients."""
        if info.batch_size == 0:
            raise ValueError("rnnt_op: torch.func.vmap over no elements")
        results = [
            op(
                *(
                    argument.select(dim, i) if isinstance(dim, int) else argument
                    for argument, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return type(
        "".join(word.capitalize() for word in name.split("_")),
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "jvp": staticmethod(_refuse_forward_mode),
            "vmap": staticmethod(vmap),
        },
    )


def _register(name: str, apply: Callable[..., Any]) -> None:
    for key in ("Autograd", TRANSFORMS):
        LIBRARY.impl(name, apply, key)


def needs_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and torch.is_grad_enabled() and tensor.requires_grad


def _padded(gradients: Sequence[Tensor | None], ctx: Any) -> _Gradients:
    """Gradients of the first arguments, and None for every other one."""
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse_forward_mode(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        "rnnt_op: the transducer loss has no forward-mode derivative (torch.func.jvp, "
        "torch.autograd.forward_ad). Use reverse mode (backward, torch.func.grad, torch.func.vjp) "
        "or rnnt_op.reference."
    )


def _refuse_second(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        "rnnt_op: the transducer loss has no second derivative. For gradients of its gradients "
        "(create_graph=True, gradient penalties, torch.func.hessian) use rnnt_op.reference."
    )


for _name in ("joint_loss_backward", "logits_loss_backward"):
    _register(_name, _function(_name, _save_nothing, _refuse_second).apply)


# Per-sample losses: gradients are computed in backward, when the losses' weights are known.


def _save(ctx: Any, arguments: Arguments, *others: Tensor) -> None:
    tensors = arguments.named_tensors()
    ctx.save_for_backward(*others, *tensors.values())
    ctx.arguments = replace(arguments, **dict.fromkeys(tensors))


def _saved(ctx: Any, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The values of the arguments whose tensors were saved."""
    names = ctx.arguments.named_tensors()
    arguments = replace(ctx.arguments, **dict(zip(names, tensors, strict=True)))
    values: tuple[Any, ...] = arguments.values()
    return values


def _save_joint(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, JointArguments.of(inputs))


def _joint_backward(ctx: Any, d_losses: Tensor | None) -> _Gradients:
    if d_losses is None:
        return _padded((), ctx)
    wanted = list(ctx.needs_input_grad[:4])
    gradients = _OPS.joint_loss_backward(d_losses, *_saved(ctx, ctx.saved_tensors), wanted)
    return _padded([g if w else None for g, w in zip(gradients, wanted, strict=True)], ctx)


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *fields, _ = inputs
    _, scores = output
    ctx.mark_non_differentiable(scores)
    _save(ctx, LogitsArguments.of(fields), scores)


def _logits_backward(ctx: Any, d_losses: Tensor | None, *_: None) -> _Gradients:
    if d_losses is None:
        return _padded((), ctx)
    scores, *tensors = ctx.saved_tensors
    d_logits = _OPS.logits_loss_backward(d_losses, scores, *_saved(ctx, tensors))
    return _padded((d_logits,), ctx)


_register("joint_loss", _function("joint_loss", _save_joint, _joint_backward).apply)
_register("logits_loss", _function("logits_loss", _save_logits, _logits_backward).apply)


# A weighted sum of losses: gradients came out of the same sweep, and backward scales them. They are
# outputs like the loss; their own derivative, the second, is refused.


def _also_wanted(*arguments: Any) -> Sequence[Any]:
    """Asks for what is needed here, too.

    A transform hides from its caller what the tensors within need, as vmap does.
    """
    *rest, wanted = arguments
    needed = [w or needs_gradient(t) for w, t in zip(wanted, rest[1:5], strict=True)]
    return *rest, needed


def _save_scaled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss_weights, *values, ctx.wanted = inputs
    # Where levels of transforms are nested, this one may need what no caller could ask for.
    needed = ctx.needs_input_grad[1:5]
    ctx.missing = [n and not w for n, w in zip(needed, ctx.wanted, strict=True)]
    if any(ctx.missing):
        _save(ctx, JointArguments.of(values), *output[1:], loss_weights)
    else:
        ctx.save_for_backward(*output[1:])
    ctx.addresses = None


def _save_scaled_alone(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_scaled(ctx, inputs, output)
    if not transforms_are_active() and all(type(g) is Tensor for g in output):
        ctx.addresses = [g.data_ptr() for g in output[1:]]


def _scaled_backward(ctx: Any, d_loss: Tensor | None, *seconds: Tensor | None) -> _Gradients:
    if any(second is not None for second in seconds):
        _refuse_second(ctx)
    if d_loss is None:
        return _padded((), ctx)
    saved = ctx.saved_tensors  # read once: checkpointing recomputes for one reading
    gradients = saved[:4]
    scale = _scaled_in_place if _may_overwrite(ctx, gradients, d_loss) else _scaled
    scaled = [scale(d_loss, g) if w else None for g, w in zip(gradients, ctx.wanted, strict=True)]
    if any(ctx.missing):
        loss_weights, *tensors = saved[4:]
        d_losses = d_loss * loss_weights
        missing = _OPS.joint_loss_backward(d_losses, *_saved(ctx, tensors), ctx.missing)
        scaled = [m if w else s for m, s, w in zip(missing, scaled, ctx.missing, strict=True)]
    return _padded([None, *scaled], ctx)


def _may_overwrite(ctx: Any, gradients: Sequence[Tensor], d_loss: Tensor) -> bool:
    """Whether nobody needs the saved gradients any more: their graph is freed after this, no
    derivative of theirs is recorded, and they are those that were saved, in their place."""
    return (
        not torch.compiler.is_compiling()
        and ctx.addresses is not None
        and not torch.is_grad_enabled()
        and not backward_keeps_graph()
        and not transforms_are_active()
        and not is_batched_gradient(d_loss)
        and all(type(t) is Tensor for t in (d_loss, *gradients))
        and all(g.is_contiguous() for g in gradients)
        and ctx.addresses == [g.data_ptr() for g in gradients]
    )


def _scaled(d_loss: Tensor, gradient: Tensor) -> Tensor:
    # In the loss's dtype: rounded to half, an upstream factor such as 1/3 would scale everything.
    return (d_loss * gradient.to(d_loss.dtype)).to(gradient.dtype)


def _scaled_in_place(d_loss: Tensor, gradient: Tensor) -> Tensor:
    """Of what is saved, without a second copy of it."""
    gradient = gradient.detach()
    if gradient.dtype == d_loss.dtype:
        return gradient.mul_(d_loss)
    for part in gradient.view(-1).split(_ELEMENTS_AT_ONCE):
        part.copy_(_scaled(d_loss, part))
    return gradient


_JointLossWithGrads = _function("joint_loss_with_grads", _save_scaled, _scaled_backward)
_JointLossAlone = _function("joint_loss_with_grads", _save_scaled_alone, _scaled_backward)

_register(
    "joint_loss_with_grads",
    lambda *arguments: _JointLossWithGrads.apply(*_also_wanted(*arguments)),
)


def joint_loss_alone(*arguments: Any) -> Tensor:
    """The loss of ``joint_loss_with_grads``. Since nobody gets its gradients, backward may scale
    them in their place."""
    loss: Tensor
    if torch.compiler.is_compiling():
        loss, *_ = _OPS.joint_loss_with_grads(*arguments)
    else:
        loss, *_ = _JointLossAlone.apply(*_also_wanted(*arguments))
    return loss


# Posteriors and best paths.


def _refuse_first(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        "rnnt_op: posteriors and alignments have no derivative. Compute them under "
        "torch.no_grad(), or detach them."
    )


for _name in ("posteriors", "align"):
    _register(_name, _function(_name, _save_nothing, _refuse_first).apply)
