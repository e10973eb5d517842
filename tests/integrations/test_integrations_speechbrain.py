"""SpeechBrain's loss under our name, against the reference and its own modules."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from integration_support import assert_equal, random_logits, required, value_and_gradients
from problems import random_joint

from rnnt_op import reference
from rnnt_op.integrations.speechbrain import joint_transducer_loss, transducer_loss

# Shares of the longest utterance: 6 frames, 3 labels.
SHARES = torch.tensor([1.0, 4 / 6, 5 / 6]), torch.tensor([1.0, 2 / 3, 0.0])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_lengths_are_shares(reduction: str) -> None:
    problem = random_logits(blank=2)
    loss = transducer_loss(problem.logits, problem.targets, *SHARES, 2, reduction)
    expected = reference.rnnt_loss(*problem.arguments, blank=2, reduction=reduction)
    assert_equal(
        value_and_gradients(loss, [problem.logits]),
        value_and_gradients(expected, [problem.logits]),
    )


def test_equals_speechbrain() -> None:
    required("torchaudio")
    theirs = required("speechbrain.nnet.losses").transducer_loss
    if "use_torchaudio" not in inspect.signature(theirs).parameters:
        pytest.skip("this SpeechBrain's loss needs a GPU")
    problem = random_logits(blank=2).to(torch.float32, torch.int32)
    for reduction in ("none", "sum", "mean"):
        actual, expected = (
            value_and_gradients(
                loss(problem.logits, problem.targets, *SHARES, 2, reduction), [problem.logits]
            )
            for loss in (transducer_loss, theirs)
        )
        assert_equal(actual, expected, tolerance=1e-5)


def joint_and_layer(nonlinearity: type[torch.nn.Module]) -> tuple:
    """SpeechBrain's modules where they can be imported, else others with their attributes."""
    layer = torch.nn.Linear(4, 5, dtype=torch.float64)
    layer.max_norm = None
    layer.w = torch.nn.Linear(4, 5, dtype=torch.float64)
    return SimpleNamespace(joint="sum", nonlinearity=nonlinearity()), layer


@pytest.mark.parametrize("nonlinearity", [torch.nn.Tanh, torch.nn.ReLU])
@pytest.mark.parametrize("real", [False, True], ids=["attributes", "speechbrain"])
def test_joint_network(nonlinearity: type[torch.nn.Module], real: bool) -> None:
    problem = random_joint(
        3, 6, 3, joint_dim=4, vocab_size=5, lengths=[(6, 3), (4, 2), (5, 0)], blank=0
    )
    if real:
        joints = required("speechbrain.nnet.transducer.transducer_joint")
        linear = required("speechbrain.nnet.linear")
        joint = joints.Transducer_joint(joint="sum", nonlinearity=nonlinearity)
        layer = linear.Linear(input_size=4, n_neurons=5).double()
    else:
        joint, layer = joint_and_layer(nonlinearity)
    encoder, predictor = problem.encoder, problem.predictor
    inputs = [encoder, predictor, layer.w.weight, layer.w.bias]
    loss = joint_transducer_loss(joint, layer, encoder, predictor, problem.targets, *SHARES, 0)
    states = encoder.unsqueeze(2), predictor.unsqueeze(1)
    hidden = joint(*states) if real else joint.nonlinearity(sum(states))
    expected = reference.rnnt_loss(
        layer(hidden) if real else layer.w(hidden),
        problem.targets,
        problem.encoder_lengths,
        problem.target_lengths,
        blank=0,
    )
    assert_equal(value_and_gradients(loss, inputs), value_and_gradients(expected, inputs))


def test_what_does_not_map_is_refused() -> None:
    problem = random_logits()
    with pytest.raises(ValueError, match="use_torchaudio: expected True"):
        transducer_loss(problem.logits, problem.targets, *SHARES, 0, use_torchaudio=False)

    def joint_loss(joint: SimpleNamespace, layer: torch.nn.Module) -> None:
        states = torch.zeros(3, 6, 4).double(), torch.zeros(3, 4, 4).double()
        joint_transducer_loss(joint, layer, *states, problem.targets, *SHARES, 0)

    joint, layer = joint_and_layer(torch.nn.LeakyReLU)
    with pytest.raises(ValueError, match="got LeakyReLU"):
        joint_loss(joint, layer)
    joint, layer = joint_and_layer(torch.nn.Tanh)
    layer.max_norm = 1.0
    with pytest.raises(ValueError, match="output_layer: expected no max_norm"):
        joint_loss(joint, layer)
    joint.joint = "concat"
    with pytest.raises(ValueError, match="joint: expected 'sum', got 'concat'"):
        joint_loss(joint, layer)
