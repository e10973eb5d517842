"""Bad input: each error names the argument, what was expected and what came."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from problems import random_joint

import rnnt_op


def long(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def raised(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        function(*args, **kwargs)
    return f"{type(error.value).__name__}: {error.value}"


def joint_error(options: dict[str, Any] | None = None, **changes: Any) -> str:
    torch.manual_seed(0)
    problem = random_joint(2, 4, 3, lengths=[(4, 3), (3, 2)])
    return raised(
        rnnt_op.joint_rnnt_loss, *replace(problem, **changes).arguments, **(options or {})
    )


def logits_error(options: dict[str, Any] | None = None, **changes: Any) -> str:
    arguments = {
        "logits": torch.zeros(2, 4, 4, 11),
        "targets": torch.ones(2, 3).long(),
        "logit_lengths": long(4, 3),
        "target_lengths": long(3, 2),
    }
    return raised(rnnt_op.rnnt_loss, **{**arguments, **changes}, **(options or {}))


def test_dtypes() -> None:
    messages = [
        joint_error(encoder=torch.zeros(2, 4, 8).int()),
        joint_error(predictor=torch.zeros(2, 4, 8)),
        joint_error(weight=torch.zeros(11, 8, dtype=torch.complex64)),
        joint_error(bias=torch.zeros(11).half()),
        joint_error(targets=torch.ones(2, 3)),
        joint_error(encoder_lengths=torch.tensor([4.0, 3.0])),
        joint_error(target_lengths=long(3, 2).short()),
        joint_error(encoder=[[1.0]]),
        logits_error(logits=torch.zeros(2, 4, 4, 11).long()),
        logits_error(targets=torch.ones(2, 3)),
        logits_error(logit_lengths=torch.tensor([4.0, 3.0])),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
TypeError: encoder: expected dtype float64, float32, bfloat16, float16, got torch.int32
TypeError: predictor: expected torch.float64, the dtype of encoder, got torch.float32; cast it, or call under torch.autocast
TypeError: weight: expected dtype float64, float32, bfloat16, float16, got torch.complex64
TypeError: bias: expected torch.float64, the dtype of encoder, got torch.float16; cast it, or call under torch.autocast
TypeError: targets: expected dtype int32, int64, got torch.float32
TypeError: encoder_lengths: expected dtype int32, int64, got torch.float32
TypeError: target_lengths: expected dtype int32, int64, got torch.int16
TypeError: encoder: expected a tensor, got list
TypeError: logits: expected dtype float64, float32, bfloat16, float16, got torch.int64
TypeError: targets: expected dtype int32, int64, got torch.float32
TypeError: logit_lengths: expected dtype int32, int64, got torch.float32""",
    )


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # of torch, about such tensors
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_not_dense(kind: str) -> None:
    """In the place of every argument, which the error names."""
    problem = random_joint(2, 4, 3)
    tensors = {
        "encoder": problem.encoder,
        "predictor": problem.predictor,
        "weight": problem.weight,
        "bias": problem.bias,
        "targets": torch.ones(2, 3).long(),
        "encoder_lengths": long(4, 3),
        "target_lengths": long(3, 2),
        "label_ranges": torch.tensor([0, 4]).expand(2, 4, 2).contiguous(),
    }
    for name, tensor in tensors.items():
        if tensor.dim() < 2 and kind in ("sparse_csr", "jagged"):
            continue  # there are none
        changed = {**tensors, name: KINDS[kind](tensor.detach())}
        for function in (rnnt_op.joint_rnnt_loss, rnnt_op.posteriors, rnnt_op.align):
            assert raised(function, **changed).startswith(f"TypeError: {name}: expected ")
    assert logits_error(logits=KINDS[kind](torch.zeros(2, 4, 4, 11))).startswith(
        "TypeError: logits: expected "
    )
    assert logits_error(targets=KINDS[kind](torch.ones(2, 3))).startswith("TypeError: targets: ")


@pytest.mark.filterwarnings("ignore")
def test_words_for_tensors_that_are_not_dense() -> None:
    encoder = torch.zeros(2, 4, 8)
    assert_expected_inline(
        "\n".join(joint_error(encoder=KINDS[kind](encoder)) for kind in KINDS),
        """\
TypeError: encoder: expected a dense tensor, got one of layout sparse_coo; convert it with .to_dense()
TypeError: encoder: expected a dense tensor, got one of layout sparse_csr; convert it with .to_dense()
TypeError: encoder: expected a dense tensor, got a nested one; pad it with torch.nested.to_padded_tensor, since lengths say what is padding
TypeError: encoder: expected a dense tensor, got a nested one; pad it with torch.nested.to_padded_tensor, since lengths say what is padding
TypeError: encoder: expected a dense tensor, got one of layout _mkldnn; convert it with .to_dense()
TypeError: encoder: expected dtype float64, float32, bfloat16, float16, got torch.qint8""",
    )


def test_shapes() -> None:
    messages = [
        joint_error(encoder=torch.zeros(4, 8)),
        joint_error(predictor=torch.zeros(2, 4)),
        joint_error(weight=torch.zeros(11)),
        joint_error(bias=torch.zeros(11, 1)),
        joint_error(targets=torch.ones(6).long()),
        joint_error(encoder_lengths=long(4, 3).unsqueeze(1)),
        joint_error(predictor=torch.zeros(2, 4, 9)),
        joint_error(weight=torch.zeros(11, 9)),
        joint_error(bias=torch.zeros(12)),
        joint_error(targets=torch.ones(2, 4).long()),
        logits_error(logits=torch.zeros(2, 4, 11)),
        logits_error(logits=torch.zeros(2, 4, 5, 11)),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
ValueError: encoder: expected shape (B, T, H), got (4, 8)
ValueError: predictor: expected shape (B, U+1, H), got (2, 4)
ValueError: weight: expected shape (V, H), got (11,)
ValueError: bias: expected shape (V,), got (11, 1)
ValueError: targets: expected shape (B, U), got (6,)
ValueError: encoder_lengths: expected shape (B,), got (2, 1)
ValueError: predictor: expected size 8 in dimension 2, the joint dimension of encoder, got (2, 4, 9)
ValueError: weight: expected size 8 in dimension 1, the joint dimension of encoder, got (11, 9)
ValueError: bias: expected size 11 in dimension 0, the rows of weight, got (12,)
ValueError: targets: expected size 3 in dimension 1, one less than the U+1 of predictor, got (2, 4)
ValueError: logits: expected shape (B, T, U+1, V), got (2, 4, 11)
ValueError: targets: expected size 4 in dimension 1, one less than the U+1 of logits, got (2, 3)""",
    )


def test_batch_sizes() -> None:
    messages = [
        joint_error(predictor=torch.zeros(3, 4, 8)),
        joint_error(targets=torch.ones(3, 3).long()),
        joint_error(encoder_lengths=long(4)),
        joint_error(target_lengths=long(3, 2, 1)),
        joint_error(encoder=torch.zeros(0, 4, 8)),
        logits_error(targets=torch.ones(3, 3).long()),
        logits_error(logits=torch.zeros(0, 4, 4, 11)),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
ValueError: predictor: expected size 2 in dimension 0, the batch size of encoder, got (3, 4, 8)
ValueError: targets: expected size 2 in dimension 0, the batch size of encoder, got (3, 3)
ValueError: encoder_lengths: expected size 2 in dimension 0, the batch size, got (1,)
ValueError: target_lengths: expected size 2 in dimension 0, the batch size, got (3,)
ValueError: encoder: expected at least one sample, got an empty batch
ValueError: targets: expected size 2 in dimension 0, the batch size of logits, got (3, 3)
ValueError: logits: expected at least one sample, got an empty batch""",
    )


def test_devices() -> None:
    meta = {"device": "meta"}
    messages = [
        joint_error(predictor=torch.zeros(2, 4, 8, **meta)),
        joint_error(weight=torch.zeros(11, 8, **meta)),
        joint_error(bias=torch.zeros(11, **meta)),
        joint_error(targets=torch.ones(2, 3, **meta).long()),
        joint_error(encoder_lengths=torch.ones(2, **meta).long()),
        joint_error(target_lengths=torch.ones(2, **meta).long()),
        logits_error(targets=torch.ones(2, 3, **meta).long()),
        logits_error(logit_lengths=torch.ones(2, **meta).long()),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
ValueError: predictor: expected device cpu, the device of encoder, got meta
ValueError: weight: expected device cpu, the device of encoder, got meta
ValueError: bias: expected device cpu, the device of encoder, got meta
ValueError: targets: expected device cpu, the device of encoder, got meta
ValueError: encoder_lengths: expected device cpu, the device of the inputs (or the CPU), got meta
ValueError: target_lengths: expected device cpu, the device of the inputs (or the CPU), got meta
ValueError: targets: expected device cpu, the device of logits, got meta
ValueError: logit_lengths: expected device cpu, the device of the inputs (or the CPU), got meta""",
    )


def test_lengths_out_of_range() -> None:
    messages = [
        joint_error(encoder_lengths=long(4, 0)),
        joint_error(encoder_lengths=long(5, 3)),
        joint_error(encoder_lengths=long(-1, 3)),
        joint_error(target_lengths=long(3, -1)),
        joint_error(target_lengths=long(4, 2)),
        logits_error(logit_lengths=long(4, 5)),
        logits_error(target_lengths=long(3, 4)),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
ValueError: encoder_lengths: expected 1 to 4 frames, got 0 at sample 1
ValueError: encoder_lengths: expected 1 to 4 frames, got 5 at sample 0
ValueError: encoder_lengths: expected 1 to 4 frames, got -1 at sample 0
ValueError: target_lengths: expected 0 to 3 labels, got -1 at sample 1
ValueError: target_lengths: expected 0 to 3 labels, got 4 at sample 0
ValueError: logit_lengths: expected 1 to 4 frames, got 5 at sample 1
ValueError: target_lengths: expected 0 to 3 labels, got 4 at sample 1""",
    )


def test_labels() -> None:
    messages = [
        joint_error(targets=torch.tensor([[1, 2, 11], [1, 2, 3]])),
        joint_error(targets=torch.tensor([[1, 2, 3], [1, -1, 3]])),
        joint_error(targets=torch.tensor([[1, 2, 3], [0, 1, 3]])),
        joint_error({"blank": -1}, targets=torch.tensor([[1, 2, 3], [1, 10, 3]])),
        logits_error(targets=torch.tensor([[1, 2, 10], [1, 2, 3]])),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
ValueError: targets: expected labels in [0, 11), got 11 at sample 0, position 2
ValueError: targets: expected labels in [0, 11), got -1 at sample 1, position 1
ValueError: targets: label 0 at sample 1, position 0 equals blank (0)
ValueError: targets: label 10 at sample 1, position 1 equals blank (10)
ValueError: targets: label 10 at sample 0, position 2 equals blank (10)""",
    )


def test_options() -> None:
    messages = [
        joint_error({"blank": 11}),
        joint_error({"blank": -12}),
        joint_error({"activation": "mish"}),
        joint_error({"activation": "leaky_relu(0.1, 0.2)"}),
        joint_error({"activation": "leaky_relu(1e39)"}),
        joint_error({"activation": "hardtanh(1, -1)"}),
        joint_error({"activation": "gelu(tanh)"}),
        joint_error({"reduction": "average"}),
        joint_error({"clamp": float("nan")}),
        logits_error({"clamp": float("nan")}),
        joint_error({"gradient_tolerance": 1.0}),
        joint_error({"gradient_tolerance": -1e-3}),
        joint_error({"gradient_tolerance": float("nan")}),
        joint_error({"workspace_bytes": 0}),
        logits_error({"blank": 11}),
        logits_error({"reduction": "average"}),
        logits_error({"workspace_bytes": -1}),
        raised(rnnt_op.JointRNNTLoss, 8, 11, blank=11),
        raised(rnnt_op.JointRNNTLoss, 8, 11, activation="leaky_relu(0.1"),
        raised(rnnt_op.JointRNNTLoss, 8, 11, reduction="average"),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
ValueError: blank: expected an index in [-11, 11) for 11 tokens, got 11
ValueError: blank: expected an index in [-11, 11) for 11 tokens, got -12
ValueError: activation: expected one of tanh, relu, sigmoid, identity, leaky_relu, hardtanh, silu, gelu, got 'mish'
ValueError: activation: expected leaky_relu or leaky_relu(negative_slope), got 'leaky_relu(0.1, 0.2)'
ValueError: activation: expected leaky_relu or leaky_relu(negative_slope), got 'leaky_relu(1e39)'
ValueError: activation: expected hardtanh or hardtanh(min_val, max_val), got 'hardtanh(1, -1)'
ValueError: activation: expected gelu, got 'gelu(tanh)'
ValueError: reduction: expected one of none, sum, mean, got 'average'
ValueError: clamp: expected a number, got nan; without clamping it is -1
ValueError: clamp: expected a number, got nan; without clamping it is -1
ValueError: gradient_tolerance: expected None or a share in [0, 1), got 1.0
ValueError: gradient_tolerance: expected None or a share in [0, 1), got -0.001
ValueError: gradient_tolerance: expected None or a share in [0, 1), got nan
ValueError: workspace_bytes: expected None or a positive number, got 0
ValueError: blank: expected an index in [-11, 11) for 11 tokens, got 11
ValueError: reduction: expected one of none, sum, mean, got 'average'
ValueError: workspace_bytes: expected None or a positive number, got -1
ValueError: blank: expected an index in [-11, 11) for 11 tokens, got 11
ValueError: activation: expected leaky_relu or leaky_relu(negative_slope), got 'leaky_relu(0.1'
ValueError: reduction: expected one of none, sum, mean, got 'average'""",
    )


def test_padding_labels_are_not_checked() -> None:
    problem = random_joint(2, 4, 3, lengths=[(4, 1), (3, 2)])
    targets = problem.targets.clone()
    targets[0, 1:] = 10**9
    targets[1, 2:] = 0
    expected = rnnt_op.joint_rnnt_loss(*problem.arguments)
    assert torch.equal(
        rnnt_op.joint_rnnt_loss(*replace(problem, targets=targets).arguments), expected
    )


def test_values_are_checked_in_a_compiled_step_too() -> None:
    problem = random_joint(2, 4, 3, lengths=[(4, 3), (3, 2)])
    torch._dynamo.reset()
    compiled = torch.compile(rnnt_op.joint_rnnt_loss, fullgraph=True, backend="aot_eager")
    compiled(*problem.arguments)
    with pytest.raises(ValueError, match="encoder_lengths: expected 1 to 4 frames, got 9"):
        compiled(*replace(problem, encoder_lengths=long(4, 9)).arguments)
