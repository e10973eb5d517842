"""Autograd of the ops; what they cannot do is refused, never silently wrong.

Each op has one derivative, made known twice. ``torch.library.register_autograd`` is for tracers,
whose graphs hold the op itself. A ``torch.autograd.Function`` is for eager calls and for the
transforms of torch.func, which the former does not serve; it also refuses forward-mode AD. The
functions here choose; they take what the op takes, and are what the public functions call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from rnnt_op.torch_private import backward_keeps_graph, is_batched_gradient, transforms_are_active

from .schemas import LIBRARY

_JOINT_TENSORS = 9  # encoder, predictor, weight, bias, targets, lengths, ranges and seed come first
_LOGITS_TENSORS = 5  # logits, targets, lengths and ranges come first

_ELEMENTS_AT_ONCE = 2**22  # of a gradient, widened to the loss's dtype

_Gradients = tuple[Tensor | None, ...]

APPLY: list[Callable[..., Any]] = []
"""What ``in_graph`` lets Dynamo put into graphs."""


def _differentiable(
    name: str,
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
    *,
    alone: Callable[..., Any] | None = None,
    prepare: Callable[..., Sequence[Any]] | None = None,
) -> Callable[..., Any]:
    """An op with its derivative.

    Args:
        name: of the op.
        save: ``setup_context`` of the Function.
        backward: of the Function.
        alone: the same, where nobody but autograd holds the op's outputs but the first.
        prepare: arguments as they are where the op is differentiated, of arguments.
    """
    op = getattr(torch.ops.rnnt_op, name).default

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """One call after another; each sees which of its tensors require gradients."""
        if info.batch_size == 0:
            raise ValueError("rnnt_op: torch.func.vmap over no elements")
        results = [
            apply(
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

    function: Any = type(
        "".join(word.capitalize() for word in name.split("_")),
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *arguments: op(*arguments)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(alone or backward),
            "jvp": staticmethod(_refuse_forward_mode),
            "vmap": staticmethod(vmap),
        },
    )
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=LIBRARY)

    def apply(*arguments: Any) -> Any:
        return function.apply(*(arguments if prepare is None else prepare(*arguments)))

    APPLY.append(apply)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            if not transforms_are_active():
                return op(*arguments)
            # It imports Dynamo, which runs now.
            from . import in_graph  # noqa: F401
        return apply(*arguments)

    return call


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


joint_loss_backward = _differentiable("joint_loss_backward", _save_nothing, _refuse_second)
logits_loss_backward = _differentiable("logits_loss_backward", _save_nothing, _refuse_second)


# Per-sample losses: gradients are computed in backward, when the losses' weights are known.


def _save_joint(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:_JOINT_TENSORS])
    ctx.options = inputs[_JOINT_TENSORS:]


def _joint_backward(ctx: Any, d_losses: Tensor | None) -> _Gradients:
    if d_losses is None:
        return _padded((), ctx)
    wanted = list(ctx.needs_input_grad[:4])
    gradients = joint_loss_backward(d_losses, *ctx.saved_tensors, *ctx.options, wanted)
    return _padded([g if w else None for g, w in zip(gradients, wanted, strict=True)], ctx)


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:_LOGITS_TENSORS])
    ctx.options = inputs[_LOGITS_TENSORS:]


def _logits_backward(ctx: Any, d_losses: Tensor | None) -> _Gradients:
    if d_losses is None:
        return _padded((), ctx)
    d_logits = logits_loss_backward(d_losses, *ctx.saved_tensors, *ctx.options)
    return _padded((d_logits,), ctx)


joint_loss = _differentiable("joint_loss", _save_joint, _joint_backward)
logits_loss = _differentiable("logits_loss", _save_logits, _logits_backward)


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
    *rest, ctx.wanted = inputs
    # Where levels of transforms are nested, this one may need what no caller could ask for.
    needed = ctx.needs_input_grad[1:5]
    ctx.missing = [n and not w for n, w in zip(needed, ctx.wanted, strict=True)]
    again = rest[: 1 + _JOINT_TENSORS] if any(ctx.missing) else ()
    ctx.options = rest[1 + _JOINT_TENSORS :]
    ctx.save_for_backward(*output[1:], *again)


def _backward_scales(
    ctx: Any, d_loss: Tensor | None, *seconds: Tensor | None, may_overwrite: bool
) -> _Gradients:
    if any(second is not None for second in seconds):
        _refuse_second(ctx)
    if d_loss is None:
        return _padded((), ctx)
    saved = ctx.saved_tensors
    gradients, again = saved[:4], saved[4:]
    scale = _scaled
    if may_overwrite and _are_free(d_loss, gradients):
        scale = _scaled_in_place
    scaled = [scale(d_loss, g) if w else None for g, w in zip(gradients, ctx.wanted, strict=True)]
    if again:
        loss_weights, *tensors = again
        missing = joint_loss_backward(d_loss * loss_weights, *tensors, *ctx.options, ctx.missing)
        scaled = [m if w else s for m, s, w in zip(missing, scaled, ctx.missing, strict=True)]
    return _padded([None, *scaled], ctx)


def _are_free(d_loss: Tensor, gradients: Sequence[Tensor]) -> bool:
    """Whether the graph of saved gradients is freed after this, and they are neither a tracer's
    nor a transform's."""
    return (
        not backward_keeps_graph()
        and not transforms_are_active()
        and not is_batched_gradient(d_loss)
        and all(type(tensor) is Tensor for tensor in (d_loss, *gradients))
    )


def _scaled(d_loss: Tensor, gradient: Tensor) -> Tensor:
    # In the loss's dtype: rounded to half, an upstream factor such as 1/3 would scale everything.
    return (d_loss * gradient.to(d_loss.dtype)).to(gradient.dtype)


def _scaled_in_place(d_loss: Tensor, gradient: Tensor) -> Tensor:
    """Of what is saved, without a second copy of it."""
    gradient = gradient.detach()
    for part in gradient.view(-1).split(_ELEMENTS_AT_ONCE):
        part.copy_(_scaled(d_loss, part))
    return gradient


joint_loss_with_grads = _differentiable(
    "joint_loss_with_grads",
    _save_scaled,
    partial(_backward_scales, may_overwrite=False),
    alone=partial(_backward_scales, may_overwrite=True),
    prepare=_also_wanted,
)


# Posteriors and best paths.


def _refuse_first(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        "rnnt_op: posteriors and alignments have no derivative. Compute them under "
        "torch.no_grad(), or detach them."
    )


posteriors = _differentiable("posteriors", _save_nothing, _refuse_first)
align = _differentiable("align", _save_nothing, _refuse_first)
