"""Autograd of the ops; what they cannot do is refused, never silently wrong.

Forward ops whose gradients are known scale them in backward; the others call their backward op.
Second derivatives, forward-mode AD and sharded inputs raise an error that says what to do instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnt_op.shards import is_dtensor

from .schemas import LIBRARY

_OPS = torch.ops.rnnt_op

_JOINT_TENSORS = 9  # encoder, predictor, weight, bias, targets, lengths, ranges and seed come first
_LOGITS_TENSORS = 5  # logits, targets, lengths and ranges come first

_ELEMENTS_AT_ONCE = 2**22  # of a gradient, widened to the loss's dtype


def _below_autograd(name: str, *arguments: Any) -> Any:
    # Function.forward turns gradients off; the levels below in a nest of torch.func transforms
    # still need them.
    with (
        torch._C._AutoDispatchBelowAutograd(),
        torch.enable_grad(),
        forward_ad._set_fwd_grad_enabled(True),
    ):
        return getattr(_OPS, name)(*arguments)


class _Function(torch.autograd.Function):
    @classmethod
    def record(cls, *arguments: Any) -> Any:
        """``apply`` for use below the functorch layer, where the dispatcher calls autograd kernels.

        ``Function.apply`` itself would hand the call to the active transform again.
        """
        apply = super(torch.autograd.Function, cls).apply  # type: ignore[misc]
        if not torch._C._are_functorch_transforms_active():
            return apply(*arguments)
        from torch._functorch import autograd_function

        with autograd_function.enable_single_level_autograd_function():  # type: ignore[attr-defined]
            return apply(*arguments)


class _JointLoss(_Function):
    """Per-sample losses; the gradients are computed in backward, when the losses' weights are
    known."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _below_autograd("joint_loss", *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:_JOINT_TENSORS])
        ctx.options = inputs[_JOINT_TENSORS:]

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:4])
        gradients = _OPS.joint_loss_backward(d_losses, *ctx.saved_tensors, *ctx.options, wanted)
        return _padded(gradients, wanted, len(ctx.needs_input_grad))


class _JointLossWithGrads(_Function):
    """A weighted sum of losses, whose unit-scale gradients came out of the same sweep."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        # This level takes the gradients, whatever its caller does.
        loss, *gradients = _below_autograd("joint_loss_with_grads", *arguments[:-1], False)
        # The last output holds nothing: it leads second derivatives back to this node, or to the
        # node of a transform further out.
        with torch.enable_grad():
            tie = loss.expand(1)[:0].clone()
        return loss, *gradients, tie

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *gradients, _ = output
        ctx.mark_non_differentiable(*gradients)
        ctx.save_for_backward(*output[1:])
        *_, ctx.wanted, ctx.loss_only = inputs
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        arguments = len(ctx.needs_input_grad)
        if d_loss is None:
            return (None,) * arguments
        *gradients, tie = ctx.saved_tensors
        scaled = _Undifferentiable.apply(  # type: ignore[no-untyped-call]
            _scale_in_place if _may_overwrite(ctx, gradients) else _scale, d_loss, tie, *gradients
        )
        return None, *_padded(scaled, ctx.wanted, arguments - 1)


class _LogitsLoss(_Function):
    """Per-sample losses of given logits; the gradient is computed in backward."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _below_autograd("logits_loss", *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:_LOGITS_TENSORS])
        ctx.options = inputs[_LOGITS_TENSORS:]

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        d_logits = _OPS.logits_loss_backward(d_losses, *ctx.saved_tensors, *ctx.options)
        return _padded((d_logits,), (True,), len(ctx.needs_input_grad))


class _OnLattice(_Function):
    """Posteriors and best paths."""

    @staticmethod
    def forward(name: str, *arguments: Any) -> Any:
        return _below_autograd(name, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "rnnt_op: posteriors and alignments have no derivative. Compute them under "
            "torch.no_grad(), or detach them."
        )


class _Undifferentiable(_Function):
    """Calls a function whose results may be used in backward, but not differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "rnnt_op: the transducer loss has no second derivative. For gradients of its gradients "
            "(create_graph=True, gradient penalties, torch.func.hessian) use rnnt_op.reference."
        )


def _may_overwrite(ctx: Any, gradients: list[Tensor]) -> bool:
    """Whether saved gradients are nobody else's: the caller took none, their graph is freed after
    this, and they are neither a tracer's nor a transform's."""
    return (
        ctx.loss_only
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and not torch._C._are_functorch_transforms_active()
        and all(type(g) is Tensor for g in gradients)
    )


def _scale(d_loss: Tensor, tie: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    # In the loss's dtype: rounded to half, an upstream factor such as 1/3 would scale everything.
    return tuple((d_loss * g.to(d_loss.dtype)).to(g.dtype) for g in gradients)


def _scale_in_place(d_loss: Tensor, tie: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    for gradient in gradients:
        for part in gradient.view(-1).split(_ELEMENTS_AT_ONCE):
            part.copy_(*_scale(d_loss, tie, part))
    return gradients


def _padded(gradients: Any, wanted: Any, arguments: int) -> tuple[Tensor | None, ...]:
    """The wanted gradients, in front of None for every other argument."""
    kept = [g if w else None for g, w in zip(gradients, wanted, strict=True)]
    return *kept, *[None] * (arguments - len(kept))


def _refuse_forward_mode() -> None:
    raise RuntimeError(
        "rnnt_op: the transducer loss has no forward-mode derivative (torch.func.jvp, "
        "torch.autograd.forward_ad). Use reverse mode (backward, torch.func.grad, torch.func.vjp) "
        "or rnnt_op.reference."
    )


def _refuse_sharded(arguments: tuple[Any, ...]) -> None:
    if any(map(is_dtensor, arguments)):
        raise TypeError(
            "rnnt_op: got a DTensor; but for weight and bias, which may be sharded by rows, the op "
            "takes whole local tensors. If FSDP2 shards the output "
            "layer, let the module that owns it call the loss in its forward, as "
            "rnnt_op.JointRNNTLoss does, or name the method that reads the weight to "
            "torch.distributed.fsdp.register_fsdp_forward_method. Otherwise gather the tensor "
            "with .full_tensor(), or take this rank's part with .to_local()."
        )


def _register(name: str, apply: Callable[..., Any]) -> None:
    def autograd_kernel(*arguments: Any) -> Any:
        _refuse_sharded(arguments)
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if forward_ad._current_level >= 0 and any(
            forward_ad.unpack_dual(t).tangent is not None for t in tensors
        ):
            _refuse_forward_mode()
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return apply(*arguments)
        return _below_autograd(name, *arguments)

    LIBRARY.impl(name, autograd_kernel, "Autograd")


def _record_joint_loss_with_grads(*arguments: Any) -> tuple[Tensor, ...]:
    loss, *gradients, _ = _JointLossWithGrads.record(*arguments)
    *_, loss_only = arguments
    return loss, *(g.new_empty(0) if loss_only else g for g in gradients)


_register("joint_loss", _JointLoss.record)
_register("joint_loss_with_grads", _record_joint_loss_with_grads)
_register("logits_loss", _LogitsLoss.record)
for _name in ("posteriors", "align"):
    _register(_name, functools.partial(_OnLattice.record, _name))
for _name in ("joint_loss_backward", "logits_loss_backward"):
    _register(
        _name,
        lambda *a, _name=_name: _Undifferentiable.record(lambda *b: _below_autograd(_name, *b), *a),
    )
