"""ESPnet's losses and joint network, against the reference, and in ESPnet where it is."""

import sys
from typing import Any

import pytest
import torch
from integration_support import (
    assert_equal,
    random_logits,
    refused_calls,
    required,
    stands_for,
    value_and_gradients,
)
from torch import Tensor, nn

from rnnt_op import reference
from rnnt_op.integrations import warprnnt_pytorch
from rnnt_op.integrations.espnet import MultiblankRNNTLoss, fuse_loss
from rnnt_op.topologies import RNNT, multi_blank

IGNORE = -1
TOKENS = 7
FRAMES = torch.tensor([6, 4, 5])
LABELS = torch.tensor([3, 2, 0])


def test_big_blanks_stand_before_the_blank() -> None:
    problem = random_logits(vocab_size=TOKENS, blank=2)
    problem.targets.clamp_(min=3)
    loss = MultiblankRNNTLoss(2, [2, 4], sigma=0.05, fastemit_lambda=0.1)(*problem.arguments)
    topology = multi_blank([2, 4], columns=[1, 0], sigma=0.05)
    expected = reference.rnnt_loss(
        *problem.arguments, blank=2, topology=topology, fast_emit=0.1, reduction="mean"
    )
    assert_equal(
        value_and_gradients(loss, [problem.logits]),
        value_and_gradients(expected, [problem.logits]),
    )


@stands_for("espnet2.asr_transducer.joint_network.JointNetwork")
class Joint(nn.Module):
    """Stands in for ESPnet's ``JointNetwork``, with its names."""

    def __init__(self, activation: nn.Module, *, lin_dec_bias: bool = True) -> None:
        super().__init__()
        self.lin_enc = nn.Linear(4, 6)
        self.lin_dec = nn.Linear(3, 6, bias=lin_dec_bias)
        self.lin_out = nn.Linear(6, TOKENS)
        self.joint_activation = activation

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        hidden = self.joint_activation(self.lin_enc(encoder_out) + self.lin_dec(decoder_out))
        return self.lin_out(hidden)


class Decoder(nn.Embedding):
    """Stands in for an ESPnet decoder."""

    def set_device(self, device: torch.device) -> None:
        assert device == self.weight.device


@stands_for("espnet2.asr.espnet_model.ESPnetASRModel")
class Model(nn.Module):
    """Stands in for ``ESPnetASRModel``: what the adapter uses of it, under its names."""

    ignore_id = IGNORE

    def __init__(self, joint_network: nn.Module, criterion: nn.Module, blank: int) -> None:
        super().__init__()
        self.decoder = Decoder(TOKENS, 3)
        self.joint_network = joint_network
        self.criterion_transducer = criterion
        self.blank_id = blank
        self.error_calculator_trans: Any = None

    def _calc_transducer_loss(
        self, encoder_out: Tensor, encoder_out_lens: Tensor, labels: Tensor
    ) -> Any:
        raise NotImplementedError("would build logits")

    def loss_of_logits(self, encoder_out: Tensor, labels: Tensor, topology: Any) -> Tensor:
        """As the model computes it, in float64 by the reference."""
        targets = labels.masked_fill(labels == IGNORE, self.blank_id)
        start = torch.full((len(labels), 1), self.blank_id)
        decoder_out = self.decoder(torch.cat([start, targets], 1))
        logits = self.joint_network(encoder_out.unsqueeze(2), decoder_out.unsqueeze(1))
        return reference.rnnt_loss(
            logits, targets, FRAMES, LABELS, blank=self.blank_id, topology=topology
        )


def batch(blank: int) -> tuple[Tensor, Tensor]:
    """Encoder states and labels, padded with the index that ESPnet ignores."""
    labels = torch.randint(blank + 1, TOKENS, (3, 3))
    labels[torch.arange(3) >= LABELS.unsqueeze(1)] = IGNORE
    return torch.randn(3, 6, 4, dtype=torch.float64).requires_grad_(), labels


CRITERIA = [
    (warprnnt_pytorch.RNNTLoss(blank=0), RNNT),
    (
        MultiblankRNNTLoss(2, [2, 4], sigma=0.05),
        multi_blank([2, 4], columns=[1, 0], sigma=0.05),
    ),
]


@pytest.mark.parametrize(("criterion", "topology"), CRITERIA, ids=["regular", "multi_blank"])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.LeakyReLU(0.2)], ids=["tanh", "leaky"])
def test_fused_model(criterion: Any, topology: Any, activation: nn.Module) -> None:
    model = Model(Joint(activation, lin_dec_bias=False), criterion, criterion.blank).double()
    encoder_out, labels = batch(criterion.blank)
    inputs = [encoder_out, *model.parameters()]
    expected = value_and_gradients(model.loss_of_logits(encoder_out, labels, topology), inputs)
    fuse_loss(model)
    with refused_calls(model.joint_network):
        loss, *rates = model._calc_transducer_loss(encoder_out, FRAMES, labels)
    assert rates == [None, None]
    assert_equal(value_and_gradients(loss, inputs), expected)


def test_error_rates_are_espnets() -> None:
    model = Model(Joint(nn.Tanh()), warprnnt_pytorch.RNNTLoss(), 0).double()
    encoder_out, labels = batch(0)

    def rates(given: Tensor, targets: Tensor) -> tuple[float, float]:
        assert given is encoder_out
        assert torch.equal(targets, labels.where(labels != IGNORE, 0))
        return 0.25, 0.5

    model.error_calculator_trans = rates
    fuse_loss(model)
    assert model._calc_transducer_loss(encoder_out, FRAMES, labels)[1:] == (None, None)
    assert model.eval()._calc_transducer_loss(encoder_out, FRAMES, labels)[1:] == (0.25, 0.5)


def test_what_does_not_map_is_refused() -> None:
    with pytest.raises(ValueError, match="got Softplus"):
        fuse_loss(Model(Joint(nn.Softplus()), warprnnt_pytorch.RNNTLoss(), 0))
    with pytest.raises(ValueError, match="criterion_transducer: expected one of RNNTLoss, "):
        fuse_loss(Model(Joint(nn.Tanh()), nn.CrossEntropyLoss(), 0))


@pytest.mark.slow
def test_in_espnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "warprnnt_pytorch", warprnnt_pytorch)
    models = required("espnet2.asr.espnet_model")
    joints = required("espnet2.asr_transducer.joint_network")
    decoders = required("espnet2.asr.decoder.transducer_decoder")
    ctc = required("espnet2.asr.ctc")
    tokens = ["<blank>", *"abcde", "<sos/eos>"]
    assert len(tokens) == TOKENS
    model = models.ESPnetASRModel(
        vocab_size=TOKENS,
        token_list=tokens,
        frontend=None,
        specaug=None,
        normalize=None,
        preencoder=None,
        encoder=None,
        postencoder=None,
        decoder=decoders.TransducerDecoder(TOKENS, hidden_size=3),
        ctc=ctc.CTC(TOKENS, 4),
        joint_network=joints.JointNetwork(TOKENS, 4, 3, 6),
        ctc_weight=0.0,
        report_cer=False,
        report_wer=False,
    )
    encoder_out, labels = batch(0)
    encoder_out = encoder_out.detach().float().requires_grad_()
    inputs = [encoder_out, *model.decoder.parameters(), *model.joint_network.parameters()]
    theirs = value_and_gradients(
        model._calc_transducer_loss(encoder_out, FRAMES, labels)[0], inputs
    )
    truth = Model.loss_of_logits(model, encoder_out, labels, RNNT)
    assert_equal(theirs, value_and_gradients(truth, inputs), tolerance=1e-5)
    fuse_loss(model)
    loss, *rates = model._calc_transducer_loss(encoder_out, FRAMES, labels)
    assert rates == [None, None]
    assert_equal(value_and_gradients(loss, inputs), theirs, tolerance=1e-5)
