"""Parakeet's losses without logits, against the models' own and against the reference."""

from typing import Any

import pytest
import torch
from integration_support import assert_equal, refused_calls, required, value_and_gradients
from torch import Tensor

from rnnt_op import reference
from rnnt_op.topologies import RNNT, tdt

pytestmark = pytest.mark.slow  # importing transformers takes seconds

VOCAB_SIZE, BLANK = 9, 8
ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_mel_bins": 16,
    "subsampling_conv_channels": 4,
    "conv_kernel_size": 3,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "layerdrop": 0.0,
}


def random_model(kind: str, pad: int | None = None, **options: Any) -> Any:
    """A small float64 model with random weights, in training mode."""
    transformers = required("transformers")
    config = getattr(transformers, f"Parakeet{kind}Config")(
        encoder_config=ENCODER,
        vocab_size=VOCAB_SIZE,
        decoder_hidden_size=12,
        num_decoder_layers=1,
        blank_token_id=BLANK,
        pad_token_id={"RNNT": BLANK, "TDT": 7}[kind] if pad is None else pad,
        **options,
    )
    return getattr(transformers, f"ParakeetFor{kind}")(config).double().train()


def batch_for(model: Any) -> dict[str, Tensor]:
    """Two utterances of 8 and 5 frames behind the encoder, with 3 labels and 1."""
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[1, 40:] = 0
    padding = model.config.pad_token_id
    labels = torch.tensor([[1, 2, 3], [4, padding, padding]])
    return {
        "input_features": torch.randn(2, 64, 16, dtype=torch.float64),
        "attention_mask": mask,
        "decoder_input_ids": torch.nn.functional.pad(labels, (1, 0), value=BLANK),
        "labels": labels,
    }


def trained(model: Any) -> list[Tensor]:
    """The parameters that a loss has a gradient of."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        # Batch normalisation follows it, so its gradient is rounding.
        if not name.endswith("depthwise_conv.bias")
    ]


def reference_losses(model: Any, batch: dict[str, Tensor], sigma: float) -> Tensor:
    """Of the logits that the model itself builds."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    durations = getattr(model.config, "durations", None)
    return reference.rnnt_loss(
        logits,
        batch["labels"],
        torch.tensor([8, 5]),
        torch.tensor([3, 1]),
        blank=BLANK,
        topology=RNNT if durations is None else tdt(durations, sigma=sigma),
        reduction="none",
    )


REDUCTIONS = {
    "mean_volume": lambda losses: losses.sum() / 4,
    "mean_batch": lambda losses: losses.mean(),
    "mean": lambda losses: (losses / torch.tensor([3, 1])).mean(),
    "sum": lambda losses: losses.sum(),
    "none": lambda losses: losses,
}


@pytest.mark.parametrize("reduction", [None, *REDUCTIONS])
@pytest.mark.parametrize("kind", ["RNNT", "TDT"])
def test_equals_reference(kind: str, reduction: str | None) -> None:
    model = random_model(kind)
    batch = batch_for(model)
    default = {"RNNT": "mean_volume", "TDT": "mean"}[kind]
    sigma = 0.05 if kind == "TDT" else 0.0
    losses = reference_losses(model, batch, sigma)
    reduce = REDUCTIONS[reduction or default]
    expected = value_and_gradients(reduce(losses), trained(model))

    fuse_loss(model)
    options = {"sigma": sigma} if sigma else {}
    if reduction is not None:
        options["reduction"] = reduction
    with refused_calls(model.joint):
        output = model(**batch, **options)
    assert output.logits is None
    assert output.last_hidden_state.shape == (2, 8, 16)
    assert_equal(value_and_gradients(output.loss, trained(model)), expected)


@pytest.mark.parametrize("kind", ["RNNT", "TDT"])
def test_equals_the_models_own_loss(kind: str) -> None:
    if kind == "RNNT":
        required("torchaudio")
    model = random_model(kind)
    batch = batch_for(model)
    # The model's own losses are float32.
    expected = value_and_gradients(model(**batch).loss, trained(model))
    fuse_loss(model)
    assert_equal(value_and_gradients(model(**batch).loss, trained(model)), expected, 1e-4)


def test_what_is_not_the_loss_stays() -> None:
    model = random_model("TDT").eval()
    batch = batch_for(model)
    del batch["labels"]
    name, state = type(model).__name__, {k: v.clone() for k, v in model.state_dict().items()}
    logits = model(**batch).logits
    generate = type(model).generate
    fuse_loss(model)
    fuse_loss(model)
    assert_equal([model(**batch).logits], [logits], 0)
    assert_equal(list(model.state_dict().values()), list(state.values()), 0)
    assert type(model).generate is generate
    assert type(model).__name__ == name
    assert isinstance(model, required("transformers").ParakeetForTDT)


def test_tuples() -> None:
    model = random_model("RNNT")
    batch = batch_for(model)
    fuse_loss(model)
    # In the order of the output's fields, without those that are None.
    states, projected, loss = model(**batch, return_dict=False)
    output = model(**batch)
    assert_equal(
        [states, projected, loss],
        [output.last_hidden_state, output.pooler_output, output.loss],
        0,
    )


def test_what_does_not_map_is_refused() -> None:
    with pytest.raises(TypeError, match="model: expected ParakeetForRNNT or ParakeetForTDT, got"):
        fuse_loss(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="got Mish"):
        fuse_loss(random_model("RNNT", hidden_act="mish"))
    model = random_model("RNNT")
    fuse_loss(model)
    with pytest.raises(ValueError, match="decoder_cache: expected none with labels"):
        model(**batch_for(model), use_decoder_cache=True)
    model = random_model("RNNT")
    model.loss_function = torch.nn.functional.cross_entropy
    with pytest.raises(ValueError, match="expected the loss function of its class"):
        fuse_loss(model)


def fuse_loss(model: Any) -> None:
    required("transformers")
    from rnnt_op.integrations.transformers import fuse_loss

    fuse_loss(model)
