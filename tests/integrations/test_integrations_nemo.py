"""NeMo's losses and fused joint network, against the reference, and against NeMo where it is."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integration_support import (
    LogitsProblem,
    assert_equal,
    random_logits,
    refused_calls,
    required,
    stands_for,
    value_and_gradients,
)
from torch import Tensor, nn

from rnnt_op import reference
from rnnt_op.integrations.nemo import RNNTLoss, fuse_loss
from rnnt_op.topologies import RNNT, Topology, multi_blank, tdt

DURATIONS = [0, 1, 2]
TOKENS, BLANK = 6, 5
LATTICES: dict[str, tuple[dict[str, Any], Topology]] = {
    "default": ({}, RNNT),
    "warprnnt_numba": ({"fastemit_lambda": 0.2, "clamp": -1.0}, RNNT),
    "pytorch": ({}, RNNT),
    "multiblank_rnnt": (
        {"big_blank_durations": [2, 4], "sigma": 0.05},
        multi_blank([2, 4], sigma=0.05),
    ),
    "tdt": ({"durations": DURATIONS, "sigma": 0.05, "omega": 0.0}, tdt(DURATIONS, sigma=0.05)),
}


def problem_for(topology: Topology) -> LogitsProblem:
    problem = random_logits(vocab_size=TOKENS, blank=BLANK, extra_columns=topology.extra_columns)
    problem.targets.clamp_(max=2)  # below all big blanks
    return problem


def reduced(losses: Tensor, labels: Tensor, reduction: str | None) -> Tensor:
    """NeMo's reductions, as its docstring words them."""
    if reduction == "mean_batch":
        return losses.mean()
    if reduction == "mean":
        return (losses / labels).mean()
    if reduction == "mean_volume":
        return losses.sum() / labels.sum()
    return losses.sum() if reduction == "sum" else losses


@pytest.mark.parametrize("name", LATTICES)
def test_lattices(name: str) -> None:
    kwargs, topology = LATTICES[name]
    problem = problem_for(topology)
    loss = RNNTLoss(BLANK, loss_name=name, loss_kwargs=kwargs)(*problem.arguments)
    expected = reference.rnnt_loss(
        *problem.arguments,
        blank=BLANK,
        topology=topology,
        fast_emit=kwargs.get("fastemit_lambda", 0),
    )
    assert_equal(
        value_and_gradients(loss, [problem.logits]),
        value_and_gradients(expected, [problem.logits]),
    )


@pytest.mark.parametrize("reduction", ["mean_batch", "mean_volume", "mean", "sum", None])
def test_reductions(reduction: str | None) -> None:
    problem = random_logits([(6, 3), (4, 2)], TOKENS, blank=BLANK)
    module = RNNTLoss(BLANK, reduction)
    losses = reference.rnnt_loss(*problem.arguments, blank=BLANK, reduction="none")
    expected = reduced(losses, problem.labels, reduction)
    assert_equal([module(*problem.arguments)], [expected])
    parts = list(losses.split(1)), list(problem.labels.split(1))
    assert_equal([module.reduce(*parts)], [expected])


def test_omega_draws_the_regular_loss_of_the_tokens() -> None:
    problem = problem_for(tdt(DURATIONS))
    kwargs = {"durations": DURATIONS, "sigma": 0.05, "omega": 1.0}
    loss = RNNTLoss(BLANK, loss_name="tdt", loss_kwargs=kwargs)(*problem.arguments)
    tokens = problem.logits[..., :TOKENS]
    expected = reference.rnnt_loss(tokens, *problem.arguments[1:], blank=BLANK)
    assert_equal(
        value_and_gradients(loss, [problem.logits]),
        value_and_gradients(expected, [problem.logits]),
    )


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("graph_w_transducer", {}, "loss_name: expected one of default, .*'graph_w_transducer'"),
        ("tdt", {"durations": [0, 1], "fastemit_lambda": 0.1}, "neither fastemit_lambda nor clamp"),
        ("tdt", {"durations": [0, 1], "clamp": 1.0}, "neither fastemit_lambda nor clamp"),
        ("tdt", {"sigma": 0.05}, "durations: expected distinct numbers of frames"),
        ("default", {"sigma": 0.05}, "loss_kwargs: default has no sigma; remove it"),
    ],
)
def test_what_does_not_map_is_refused(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RNNTLoss(BLANK, loss_name=name, loss_kwargs=kwargs)


@stands_for("nemo.collections.asr.modules.rnnt_abstract.AbstractRNNTJoint")
class AbstractJoint(nn.Module):
    def joint(self, f: Tensor, g: Tensor) -> Tensor:
        return self.joint_after_projection(self.project_encoder(f), self.project_prednet(g))


@stands_for("nemo.collections.asr.modules.rnnt.RNNTJoint")
class Joint(AbstractJoint):
    """Stands in for NeMo's ``RNNTJoint``: what the adapter uses of it, under its names."""

    def __init__(self, columns: int, activation: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.enc, self.pred = nn.Linear(4, 7), nn.Linear(3, 7)
        layer = {"relu": nn.ReLU(inplace=True), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid()}
        dropped = [nn.Dropout(dropout)] if dropout else []
        self.joint_net = nn.Sequential(layer[activation], *dropped, nn.Linear(7, columns))
        self.activation = activation
        self.masking_prob, self.temperature, self.log_softmax = -1.0, 1.0, None
        self.fuse_loss_wer, self.fused_batch_size = False, None
        self.loss = self.wer = None

    def project_encoder(self, encoder_output: Tensor) -> Tensor:
        return self.enc(encoder_output)

    def project_prednet(self, prednet_output: Tensor) -> Tensor:
        return self.pred(prednet_output)

    def joint_after_projection(self, f: Tensor, g: Tensor) -> Tensor:
        logits = self.joint_net(f.unsqueeze(2) + g.unsqueeze(1))
        if not logits.is_cuda if self.log_softmax is None else self.log_softmax:
            return (logits / self.temperature).log_softmax(-1)
        return logits

    def is_adapter_available(self) -> bool:
        return False

    def set_fuse_loss_wer(self, fuse: bool, loss: Any, metric: Any) -> None:
        self.fuse_loss_wer, self.loss, self.wer = fuse, loss, metric

    def set_fused_batch_size(self, size: int) -> None:
        self.fused_batch_size = size

    def forward(self, *, encoder_outputs: Tensor, decoder_outputs: Tensor | None, **given) -> Any:
        if decoder_outputs is None:
            assert self.fuse_loss_wer
            return None, "wer", "numerator", "denominator"
        return logits_of(self, encoder_outputs, decoder_outputs)


def logits_of(joint: Any, encoder_outputs: Tensor, decoder_outputs: Tensor) -> Tensor:
    return joint.joint(encoder_outputs.transpose(1, 2), decoder_outputs.transpose(1, 2))


def states(frames: int = 6, labels: int = 3) -> list[Tensor]:
    shapes = [(3, 4, frames), (3, 3, labels + 1)]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("name", ["default", "multiblank_rnnt", "tdt"])
def test_fused_joint(name: str, activation: str) -> None:
    kwargs, topology = LATTICES[name]
    joint = Joint(TOKENS + topology.extra_columns, activation).double()
    problem = problem_for(topology)
    inputs = [*states(), *joint.parameters()]
    logits = logits_of(joint, *inputs[:2])
    expected = reference.rnnt_loss(
        logits, *problem.arguments[1:], blank=BLANK, topology=topology, reduction="none"
    )
    model = SimpleNamespace(
        joint=joint, loss=RNNTLoss(BLANK, "mean_volume", name, kwargs), wer=object()
    )
    fuse_loss(model)
    given = {
        "encoder_outputs": inputs[0],
        "decoder_outputs": inputs[1],
        "encoder_lengths": problem.frames,
        "transcripts": nn.functional.pad(problem.targets, (0, 2), value=-7),
        "transcript_lengths": problem.labels,
    }
    with refused_calls(joint.joint_net):
        loss, *rates = joint(**given)
    assert rates == [None, None, None]
    assert_equal(
        value_and_gradients(loss, inputs),
        value_and_gradients(reduced(expected, problem.labels, "mean_volume"), inputs),
    )
    loss, *rates = joint(**given, compute_wer=True)
    assert loss is not None
    assert rates == ["wer", "numerator", "denominator"]
    assert joint(**{**given, "decoder_outputs": None}, compute_wer=True)[0] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["warprnnt_numba", "pytorch", "multiblank_rnnt_pytorch"])
def test_equals_nemo(name: str) -> None:
    nemo = required("nemo.collections.asr.losses.rnnt")
    kwargs = LATTICES["multiblank_rnnt"][0] if name.startswith("multi") else {}
    problem = problem_for(RNNT).to(torch.float32)
    names = ("log_probs", "targets", "input_lengths", "target_lengths")
    given = dict(zip(names, problem.arguments, strict=True))
    for reduction in ("mean_batch", "mean_volume", "sum", None):
        expected, actual = (
            value_and_gradients(
                kind(BLANK, reduction, name, dict(kwargs))(**given), [problem.logits]
            )
            for kind in (nemo.RNNTLoss, RNNTLoss)
        )
        assert_equal(actual, expected, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pytorch", "tdt", "multiblank_rnnt_pytorch"])
def test_equals_nemos_fused_joint(name: str) -> None:
    losses = required("nemo.collections.asr.losses.rnnt")
    modules = required("nemo.collections.asr.modules.rnnt")
    kwargs, topology = LATTICES[name.removesuffix("_pytorch") if "multi" in name else name]
    sizes = {"encoder_hidden": 4, "pred_hidden": 3, "joint_hidden": 7, "activation": "relu"}
    joint = modules.RNNTJoint(
        sizes,
        num_classes=BLANK,
        num_extra_outputs=topology.extra_columns,
        fuse_loss_wer=True,
        fused_batch_size=2,
    ).double()
    loss = losses.RNNTLoss(BLANK, "mean_volume", name, dict(kwargs))
    model = SimpleNamespace(joint=joint, loss=loss, wer=WordErrorRate())
    problem = problem_for(topology)
    encoded, predicted = states()
    inputs = [encoded, predicted, *joint.parameters()]
    given = {
        "encoder_outputs": encoded,
        "decoder_outputs": predicted,
        "encoder_lengths": problem.frames,
        "transcripts": problem.targets,
        "transcript_lengths": problem.labels,
    }
    if name == "tdt":  # NeMo's needs a GPU
        per_sample = reference.rnnt_loss(
            logits_of(joint, encoded, predicted),
            *problem.arguments[1:],
            blank=BLANK,
            topology=topology,
            reduction="none",
        )
        expected = reduced(per_sample, problem.labels, "mean_volume")
    else:
        joint.set_loss(loss)
        joint.set_wer(model.wer)
        expected, *rates = joint(**given, compute_wer=True)
        assert rates == [0.5, 2, 4]
    expected = value_and_gradients(expected, inputs)
    fuse_loss(model)
    actual, *rates = joint(**given, compute_wer=True)
    assert_equal(value_and_gradients(actual, inputs), expected, tolerance=1e-5)
    assert rates == [0.5, 2, 4]
    logits = joint.joint(encoded.transpose(1, 2), predicted.transpose(1, 2))
    assert logits.shape == (3, 6, 4, TOKENS + topology.extra_columns)


class WordErrorRate:
    """Half of two words wrong, in each sub-batch."""

    _to_sync = True

    def update(self, **_: Any) -> None:
        pass

    def compute(self) -> tuple[float, int, int]:
        return 0.5, 1, 2

    def reset(self) -> None:
        pass

    def get_hypotheses(self) -> list[Any]:
        return []
