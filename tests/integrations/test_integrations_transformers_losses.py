"""transformers' ``rnnt_loss`` and ``tdt_loss`` under our name, against transformers' in float64,
and the models' losses on what a processor makes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import test_integrations_transformers as parakeet
import torch
from integration_support import (
    assert_equal,
    random_logits,
    refused_calls,
    required,
    value_and_gradients,
)
from torch import Tensor

from rnnt_op import reference
from rnnt_op.topologies import tdt

pytestmark = pytest.mark.slow  # importing transformers takes seconds

BLANK, DURATIONS = 4, (0, 1, 2, 4)
LENGTHS = ((6, 3), (4, 2), (5, 1))
reductions = pytest.mark.parametrize("reduction", [None, *parakeet.REDUCTIONS])


@pytest.fixture
def ours() -> Any:
    required("transformers")
    from rnnt_op.integrations import transformers

    return transformers


@contextmanager
def in_float64() -> Iterator[None]:
    """Meanwhile transformers' casts to float32 are to float64, and so are its own tensors."""
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(Tensor, "float", Tensor.double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def reduced(losses: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """As the docstrings of transformers word the reductions."""
    return {
        "mean_volume": losses.sum() / labels.sum(),
        "mean_batch": losses.mean(),
        "mean": (losses / labels).mean(),
        "sum": losses.sum(),
        "none": losses,
    }[reduction]


def options(reduction: str | None) -> dict[str, str]:
    return {} if reduction is None else {"reduction": reduction}


def tdt_inputs(problem: Any) -> list[Tensor]:
    shape = *problem.logits.shape[:3], len(DURATIONS)
    return [problem.logits, torch.randn(shape, dtype=torch.float64).requires_grad_()]


@reductions
def test_rnnt_loss(ours: Any, reduction: str | None) -> None:
    problem = random_logits(LENGTHS, blank=BLANK)
    losses = reference.rnnt_loss(*problem.arguments, blank=BLANK, reduction="none")
    expected = reduced(losses, problem.labels, reduction or "mean_volume")
    loss = ours.rnnt_loss(*problem.arguments, BLANK, **options(reduction))
    assert_equal(
        value_and_gradients(loss, [problem.logits]),
        value_and_gradients(expected, [problem.logits]),
    )


@reductions
def test_rnnt_loss_equals_transformers(ours: Any, reduction: str | None) -> None:
    required("torchaudio")
    theirs = required("transformers.loss.loss_rnnt").rnnt_loss
    problem = random_logits(LENGTHS, blank=BLANK).to(torch.float32)  # all that torchaudio takes
    actual, expected = (
        value_and_gradients(
            rnnt_loss(*problem.arguments, BLANK, **options(reduction)), [problem.logits]
        )
        for rnnt_loss in (ours.rnnt_loss, theirs)
    )
    assert_equal(actual, expected, 2e-5)


@reductions
@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_tdt_loss_equals_transformers(ours: Any, sigma: float, reduction: str | None) -> None:
    theirs = required("transformers.loss.loss_tdt").tdt_loss
    problem = random_logits(LENGTHS, blank=BLANK)
    logits = tdt_inputs(problem)
    given = *logits, *problem.arguments[1:], BLANK, DURATIONS, sigma
    actual = value_and_gradients(ours.tdt_loss(*given, **options(reduction)), logits)
    with in_float64():
        expected = value_and_gradients(theirs(*given, **options(reduction)), logits)
    assert_equal(actual, expected, 1e-9)


def test_tdt_loss_equals_reference(ours: Any) -> None:
    # Of a sample without labels, too, and with labels and lengths as the models pass them.
    problem = random_logits(blank=BLANK)
    logits = tdt_inputs(problem)
    loss = ours.tdt_loss(
        *logits,
        *(t.int() for t in problem.arguments[1:]),
        blank_token_id=-1,
        durations=list(DURATIONS),
        reduction="sum",
    )
    expected = reference.rnnt_loss(
        torch.cat(logits, -1),
        *problem.arguments[1:],
        blank=BLANK,
        topology=tdt(DURATIONS),
        reduction="sum",
    )
    assert_equal(value_and_gradients(loss, logits), value_and_gradients(expected, logits))


def test_half_precision_is_summed_in_float32(ours: Any) -> None:
    problem = random_logits(LENGTHS, blank=BLANK).to(torch.bfloat16)
    loss = ours.rnnt_loss(*problem.arguments, BLANK)
    assert loss.dtype == torch.float32
    wide = ours.rnnt_loss(problem.logits.float(), *problem.arguments[1:], BLANK)
    assert_equal([loss], [wide], 1e-6)


def test_what_does_not_map_is_refused(ours: Any) -> None:
    problem = random_logits(LENGTHS, blank=BLANK)
    with pytest.raises(ValueError, match="reduction: expected one of mean_batch, "):
        ours.rnnt_loss(*problem.arguments, BLANK, "batchmean")
    logits = tdt_inputs(problem)
    with pytest.raises(ValueError, match=r"duration_logits: expected shape \(3, 6, 4, 3\)"):
        ours.tdt_loss(*logits, *problem.arguments[1:], BLANK, (0, 1, 2))


def processor(kind: str) -> Any:
    """transformers' own, over a vocabulary of nine words of which the last is the blank."""
    transformers, tokenizers = required("transformers"), required("tokenizers")
    names = ["<unk>", "<pad>", *"abcdef", "<blank>"]
    words = {word: i for i, word in enumerate(names)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.ParakeetTokenizer(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<blank>"],
    )
    features = transformers.ParakeetFeatureExtractor(feature_size=16)
    return transformers.ParakeetProcessor(features, tokenizer, decoder_type=kind.lower())


@pytest.mark.parametrize("fused", [False, True], ids=["loss", "fused"])
@pytest.mark.parametrize("kind", ["RNNT", "TDT"])
def test_models_on_what_a_processor_makes(
    ours: Any, monkeypatch: pytest.MonkeyPatch, kind: str, fused: bool
) -> None:
    speech = [torch.randn(length).numpy() for length in (16000, 9000)]
    batch = processor(kind)(speech, text=["a b c", "d"], sampling_rate=16000)
    batch["input_features"] = batch["input_features"].double()
    model = parakeet.random_model(kind, pad=1)
    assert batch["labels"].tolist() == [[2, 3, 4], [5, 1, 1]]

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    features = {name: batch[name] for name in ("input_features", "attention_mask")}
    output = model(**inputs)
    # A model for RNN-T counts all that is no blank as labels, and so the padding.
    labels = torch.tensor([3, 3 if kind == "RNNT" else 1])
    losses = reference.rnnt_loss(
        output.logits,
        batch["labels"],
        model.get_audio_features(**features).attention_mask.sum(-1),
        labels,
        blank=parakeet.BLANK,
        topology=tdt(model.config.durations) if kind == "TDT" else reference.RNNT,
        reduction="none",
    )
    expected = reduced(losses, labels, "mean" if kind == "TDT" else "mean_volume")
    expected = value_and_gradients(expected, parakeet.trained(model))
    if kind == "TDT":
        with in_float64():
            theirs = value_and_gradients(model(**batch).loss, parakeet.trained(model))
        assert_equal(expected, theirs, 1e-9)

    if fused:
        ours.fuse_loss(model)
        with refused_calls(model.joint):
            loss = model(**batch).loss
    else:
        name = f"{kind.lower()}_loss"
        module = required(f"transformers.loss.loss_{kind.lower()}")
        monkeypatch.setattr(module, name, getattr(ours, name))
        loss = model(**batch).loss
    assert_equal(value_and_gradients(loss, parakeet.trained(model)), expected, 1e-9)
