"""The recipes of docs/distributed.md, as they stand there, on two ranks: losses and the gradients
of all parameters are those of one process that has the whole batch.
"""

from __future__ import annotations

import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from places import ROOT
from problems import CountCalls, relative_error
from ranks import Ranks
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

DOCUMENT = (ROOT / "docs" / "distributed.md").read_text()
RECIPES = dict(re.findall(r"<!-- ([\w -]+) -->\n```python\n(.*?)```", DOCUMENT, re.DOTALL))

STEPS = (
    "step",
    "accumulate",
    "accumulate sharded",
    "global mean",
    "autocast",
    "autocast scaled",
    "clipped",
)
"""Recipes of a training step; the others prepare one."""

ENCODER_LENGTHS, TARGET_LENGTHS = (9, 8, 7, 2), (4, 2, 5, 3)
FEATURES, JOINT_DIM, VOCAB_SIZE = 6, 8, 11

ALL, EVEN = (0, 4), (0, 2, 4)
"""Which utterances a rank has: those from split[rank] to split[rank + 1]."""


def slow(*values: Any) -> Any:
    """A case that compiles a model on each rank."""
    return pytest.param(*values, marks=pytest.mark.slow)


class Outcome(NamedTuple):
    """What training steps come to on a rank."""

    losses: list[Tensor]
    gradients: list[list[Tensor]]
    graphs: int
    """How many the compiler has made."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


def execute(recipe: str, names: dict[str, Any]) -> None:
    exec(compile(RECIPES[recipe], f"docs/distributed.md: {recipe}", "exec"), names)


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor that may be sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def utterances(start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Arguments of the model, as long as the longest utterance."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, max(ENCODER_LENGTHS), FEATURES, generator=generator).to(dtype)
    targets = torch.randint(1, VOCAB_SIZE, (4, max(TARGET_LENGTHS)), generator=generator)
    frames, labels = ENCODER_LENGTHS[start:stop], TARGET_LENGTHS[start:stop]
    return (
        features[start:stop, : max(frames, default=0)].clone(memory_format=torch.contiguous_format),
        targets[start:stop, : max(labels, default=0)].clone(memory_format=torch.contiguous_format),
        torch.tensor(frames),
        torch.tensor(labels),
    )


class Training:
    """A model wrapped by recipes, and this rank's part of the batch.

    Args:
        recipes: joined by " + "; the last one may be a step.
        split: which utterances a rank has.
        rank: None: that of this process.
        seed: of the model's weights.
        dtype: of the model and its features.
        optimizer: makes one of parameters.
        backend: what compiles.
        options: of the head.
        names: what else recipes use.
    """

    def __init__(
        self,
        recipes: str,
        split: Sequence[int] = EVEN,
        *,
        rank: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        backend: str = "aot_eager",
        options: dict[str, Any] | None = None,
        **names: Any,
    ) -> None:
        torch._dynamo.reset()
        counters.clear()
        *setup, step = recipes.split(" + ")
        if step not in STEPS:
            setup, step = [*setup, step], "step"
        rank = dist.get_rank() if rank is None else rank
        start, stop = split[rank : rank + 2]
        self.names: dict[str, Any] = {}
        execute("imports", self.names)
        torch.manual_seed(seed)
        model = self.names["Transducer"](FEATURES, JOINT_DIM, VOCAB_SIZE, **(options or {}))
        self.names |= {
            "model": model.to(dtype),
            "batch": utterances(start, stop, dtype),
            "micro_batches": [utterances(b, b + 1, dtype) for b in range(start, stop)],
            **names,
        }
        with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
            for recipe in setup:
                execute(recipe, self.names)
        self.names.setdefault("optimizer", optimizer(self.model.parameters(), lr=0.01))
        self._step = step
        torch.manual_seed(rank)

    @property
    def model(self) -> torch.nn.Module:
        return self.names["model"]

    def step(self) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients of all parameters."""
        execute(self._step, self.names)
        return self.names["loss"].detach(), [whole(p.grad) for p in self.model.parameters()]

    def steps(self, count: int) -> Outcome:
        losses, gradients = zip(*(self.step() for _ in range(count)), strict=True)
        return Outcome(losses, gradients, counters["aot_autograd"]["ok"])

    def parameters(self) -> list[Tensor]:
        return [whole(p) for p in self.model.parameters()]


def train(recipes: str, *arguments: Any, steps: int = 2, **options: Any) -> Outcome:
    return Training(recipes, *arguments, **options).steps(steps)


def mean(of_ranks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The mean over ranks of each tensor that they have."""
    return [torch.stack(tensors).mean(0) for tensors in zip(*of_ranks, strict=True)]


def assert_same(outcomes: Sequence[Outcome], expected: Outcome, tolerance: float = 1e-5) -> None:
    """Each rank's gradients are those expected, and so is the mean of their losses."""
    losses = mean([outcome.losses for outcome in outcomes])
    torch.testing.assert_close(losses, list(expected.losses), rtol=tolerance, atol=0)
    for outcome in outcomes:
        for actual, right in zip(outcome.gradients, expected.gradients, strict=True):
            errors = [relative_error([a], [r]) for a, r in zip(actual, right, strict=True)]
            assert max(errors) <= tolerance, errors


def on_ranks(ranks: Ranks, recipes: str, *arguments: Any, **options: Any) -> list[Outcome]:
    return ranks.run(functools.partial(train, recipes, *arguments, **options))


@functools.cache
def alone(recipes: str = "step", **options: Any) -> Outcome:
    """The same by a single process that has the whole batch."""
    return train(recipes, ALL, rank=0, **options)


@pytest.mark.parametrize(
    "recipes",
    [
        "ddp",
        "ddp + accumulate",
        "fsdp root",
        "fsdp",
        "fsdp keep",
        "fsdp head",
        "fsdp + accumulate sharded",
        "checkpoint + ddp",
        "checkpoint head + ddp",
        "checkpoint selectively + ddp",
        "checkpoint + fsdp",
        "checkpoint head + fsdp",
        "checkpoint selectively + fsdp",
    ],
)
def test_eager(ranks: Ranks, recipes: str) -> None:
    assert_same(on_ranks(ranks, recipes), alone())


PROJECTED = {"encoder_dim": JOINT_DIM, "predictor_dim": JOINT_DIM}


@pytest.mark.parametrize("recipes", ["ddp", "fsdp"])
def test_projections(ranks: Ranks, recipes: str) -> None:
    outcomes = on_ranks(ranks, recipes, options=PROJECTED)
    assert_same(outcomes, train("step", ALL, rank=0, options=PROJECTED))


@pytest.mark.parametrize(("replicas", "shards"), [(1, 2), (2, 1)])
def test_hsdp(ranks: Ranks, replicas: int, shards: int) -> None:
    assert_same(on_ranks(ranks, "hsdp", replicas=replicas, shards=shards), alone())


@pytest.mark.parametrize(
    ("recipes", "graphs"),
    [
        slow("compile + ddp + accumulate", 1),
        slow("ddp + compile whole", 1),
        slow("compile + fsdp root", 1),
        slow("fsdp root + compile", 1),
        slow("compile parts + fsdp", 2),
        slow("fsdp + compile parts", 2),
        slow("fsdp + compile whole", 3),
        slow("checkpoint selectively + compile + ddp", 1),
        slow("checkpoint head + compile parts + fsdp", 2),
    ],
)
def test_compiled(ranks: Ranks, recipes: str, graphs: int) -> None:
    outcomes = on_ranks(ranks, recipes)
    assert_same(outcomes, alone())
    assert [outcome.graphs for outcome in outcomes] == [graphs] * ranks.size


@pytest.mark.slow
def test_inductor(ranks: Ranks) -> None:
    assert_same(on_ranks(ranks, "compile parts + fsdp", backend="inductor"), alone())


@pytest.mark.slow
def test_ddp_cuts_the_graph_at_its_buckets(ranks: Ranks) -> None:
    """The head's gradients are sent while the encoder's are computed."""
    outcomes = ranks.run(_train_with_small_buckets, "ddp + compile whole")
    assert_same(outcomes, alone())
    assert all(outcome.graphs > 1 for outcome in outcomes)


def _train_with_small_buckets(recipes: str) -> Outcome:
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 100):
        small = functools.partial(DistributedDataParallel, bucket_cap_mb=1e-4)
        return train(recipes, DistributedDataParallel=small)


@pytest.mark.parametrize("recipes", ["fsdp head", "vocabulary parallel"])
def test_clipped_gradients(ranks: Ranks, recipes: str) -> None:
    single = Training("step", ALL, rank=0)
    loss, gradients = single.step()
    torch.nn.utils.clip_grad_norm_(single.model.parameters(), 1.0)
    clipped = [p.grad for p in single.model.parameters()]
    assert not torch.equal(clipped[0], gradients[0])
    outcomes = on_ranks(ranks, f"{recipes} + kinds + clipped", ALL, rank=0, steps=1)
    assert_same(outcomes, Outcome([loss], [clipped], 0))


@pytest.mark.parametrize("recipes", ["fsdp bfloat16", slow("compile parts + fsdp bfloat16")])
def test_bfloat16_parameters(ranks: Ranks, recipes: str) -> None:
    # After a step FSDP2's weights are float32, a single process's are bfloat16.
    expected = alone(dtype=torch.bfloat16, steps=1)
    outcomes = on_ranks(ranks, recipes, steps=1)
    assert_same(outcomes, expected, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(
    ("wrapped", "recipe", "dtype"),
    [
        ("ddp", "autocast", torch.bfloat16),
        ("fsdp", "autocast", torch.bfloat16),
        ("ddp", "autocast scaled", torch.float16),
        ("fsdp", "autocast scaled", torch.float16),
        slow("compile + ddp", "autocast scaled", torch.float16),
    ],
)
def test_autocast(ranks: Ranks, wrapped: str, recipe: str, dtype: torch.dtype) -> None:
    expected = alone(f"scaler + {recipe}")
    outcomes = on_ranks(ranks, f"scaler + {wrapped} + {recipe}")
    assert_same(outcomes, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("wrapped", ["ddp", "fsdp"])
def test_infinity_on_one_rank_skips_the_step_on_all(ranks: Ranks, wrapped: str) -> None:
    results = ranks.run(_step_with_infinity, f"scaler + {wrapped} + autocast scaled")
    for scale, before, after in results:
        assert scale == 2.0**9  # half of what it was
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def _step_with_infinity(recipes: str) -> tuple[float, list[Tensor], list[Tensor]]:
    training = Training(recipes)
    if dist.get_rank() == 1:
        training.names["batch"][0][0, 0, 0] = float("inf")
    before = training.parameters()
    training.step()
    return training.names["scaler"].get_scale(), before, training.parameters()


@pytest.mark.parametrize(
    ("wrapped", "split"),
    [
        *itertools.product(["ddp", "fsdp"], [EVEN, (0, 3, 4), (0, 4, 4)]),
        slow("compile parts + fsdp", (0, 4, 4)),
    ],
    ids=str,
)
def test_mean_over_the_global_batch(ranks: Ranks, wrapped: str, split: tuple[int, ...]) -> None:
    assert_same(on_ranks(ranks, f"stand-in + {wrapped} + global mean", split), alone())


@pytest.mark.parametrize(
    "recipes",
    [
        "vocabulary parallel",
        slow("vocabulary parallel + compile"),
        "vocabulary parallel + checkpoint",
    ],
)
def test_one_batch_on_all_ranks(ranks: Ranks, recipes: str) -> None:
    assert_same(on_ranks(ranks, recipes, ALL, rank=0), alone())


@pytest.mark.parametrize(
    "recipes",
    [
        "ddp",
        "checkpoint + ddp",
        "checkpoint head + ddp",
        "checkpoint selectively + ddp",
        slow("checkpoint + compile + ddp"),
        "checkpoint head + fsdp",
    ],
)
def test_joint_dropout(ranks: Ranks, recipes: str) -> None:
    """Each rank has a generator, and so masks, of its own; a recomputation meets the same masks."""
    dropout = {"steps": 1, "options": {"dropout": 0.4}}
    single = [train("step", rank=rank, **dropout) for rank in range(ranks.size)]
    gradients = mean([outcome.gradients[0] for outcome in single])
    expected = Outcome(mean([outcome.losses for outcome in single]), [gradients], 0)
    assert_same(on_ranks(ranks, recipes, **dropout), expected)


@pytest.mark.parametrize("wrapped", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("recipes", "step", "calls"),
    [
        ("checkpoint", "step", {"joint_loss_with_grads": 2}),
        ("checkpoint selectively", "step", {"joint_loss_with_grads": 1}),
        ("scaler + checkpoint", "autocast scaled", {"joint_loss": 2, "joint_loss_backward": 1}),
        (
            "scaler + checkpoint selectively",
            "autocast scaled",
            {"joint_loss": 1, "joint_loss_backward": 1},
        ),
    ],
)
def test_what_is_recomputed(
    ranks: Ranks, wrapped: str, recipes: str, step: str, calls: dict[str, int]
) -> None:
    counted = ranks.run(_count_calls, f"{recipes} + {wrapped} + {step}")
    assert counted == [calls] * ranks.size


def _count_calls(recipes: str) -> dict[str, int]:
    training = Training(recipes)
    with CountCalls() as counter:
        training.step()
    return counter.calls


ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # which is meant so


@ALONE
@pytest.mark.parametrize(
    "wrapped", ["ddp", "fsdp", slow("compile + ddp"), "checkpoint head + fsdp"]
)
def test_checkpoint_of_two_ranks_resumes_on_one(ranks: Ranks, wrapped: str, tmp_path: Path) -> None:
    saved = ranks.run(_save, wrapped, EVEN, None, tmp_path)
    assert_same(saved, _resume("step", ALL, 0, tmp_path))


@ALONE
@pytest.mark.parametrize("wrapped", ["ddp", "fsdp"])
def test_checkpoint_of_one_process_resumes_on_two(
    ranks: Ranks, wrapped: str, tmp_path: Path
) -> None:
    saved = _save("step", ALL, 0, tmp_path)
    assert_same(ranks.run(_resume, wrapped, EVEN, None, tmp_path), saved)


def _save(recipes: str, split: tuple[int, ...], rank: int | None, directory: Path) -> Outcome:
    """Saves after one step; what the next ones come to."""
    names = {"optimizer": torch.optim.AdamW, "directory": directory}
    training = Training(recipes, split, rank=rank, **names)
    training.step()
    execute("save", training.names)
    return training.steps(2)


def _resume(recipes: str, split: tuple[int, ...], rank: int | None, directory: Path) -> Outcome:
    """Loads into another model; what the next steps come to."""
    names = {"optimizer": torch.optim.AdamW, "directory": directory}
    training = Training(recipes, split, rank=rank, seed=1, **names)
    execute("resume", training.names)
    return training.steps(2)


def test_methods_outside_forward(ranks: Ranks) -> None:
    for rank, actual in enumerate(ranks.run(_decode, "fsdp + methods", None)):
        torch.testing.assert_close(actual, _decode("step", rank))


def _decode(recipes: str, rank: int | None) -> list[Tensor]:
    """What the head says about a rank's utterances outside its forward."""
    training = Training(recipes, rank=rank, options=PROJECTED)
    head, batch = training.model.head, training.names["batch"]
    encoded, predicted = _states(batch)
    posteriors = head.posteriors(encoded, predicted, *batch[1:])
    alignment = head.align(encoded, predicted, *batch[1:])
    return [*posteriors, *alignment, head.logits(encoded[:, 0], predicted[:, 0]).detach()]


def _states(batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Encoder and predictor states of a batch."""
    features, targets, *_ = batch
    generator = torch.Generator().manual_seed(1)
    shapes = features.shape[:2], (len(targets), targets.shape[1] + 1)
    return tuple(torch.randn(*shape, JOINT_DIM, generator=generator) for shape in shapes)


MESH = "mesh=init_device_mesh('cpu', (2,))"
BFLOAT16 = "mp_policy=MixedPrecisionPolicy(torch.bfloat16)"
SKIPPED = (
    "Unsupported: Attempted to call function marked as skipped"
    if torch.__version__ < "2.14"
    else "Unsupported: Call to"
)
SHARDED = "ValueError: rnnt_op: ranks that share an output layer got different batches."


@pytest.mark.parametrize(
    ("recipes", "statement", "error"),
    [
        ("fsdp", "rnnt_op.joint_rnnt_loss(*states, *model.head.parameters(), *labels)", SHARDED),
        ("fsdp", "model.head.posteriors(*states, *labels)", SHARDED),
        ("fsdp", "model.head.align(*states, *labels)", SHARDED),
        ("fsdp root", "model.head(*states, *labels)", SHARDED),
        (
            "step",
            f"fully_shard(model.head, {MESH}); fully_shard(model, {MESH}, {BFLOAT16}); model(*batch)",
            "TypeError: weight: expected torch.bfloat16, the dtype of encoder, got torch.float32",
        ),
        (
            "ddp",
            "model(*(argument[:0] for argument in batch))",
            "ValueError: encoder: expected at least one sample, got an empty batch",
        ),
        (
            "fsdp head",
            "model(*batch).backward(); nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)",
            "RuntimeError: aten._foreach_norm.Scalar",
        ),
        (
            "ddp",
            "torch.compile(model, fullgraph=True)(*batch)",
            "Unsupported: Unsupported method call",
        ),
        (
            "fsdp",
            "torch.compile(model, fullgraph=True)(*batch)",
            SKIPPED,
        ),
        pytest.param(
            "step",
            "model.encoder = nn.Sequential(nn.Linear(6, 8)); model.encoder.compile(fullgraph=True); model(*batch)",
            "RuntimeError: torch.compile with fullgraph=True found no compiled frames",
            marks=pytest.mark.skipif(
                not "2.13" <= torch.__version__ < "2.14", reason="only torch 2.13 refuses it"
            ),
        ),
        (
            "step",
            "torch.utils.checkpoint.checkpoint(model, *batch, use_reentrant=True).backward()",
            "RuntimeError: element 0 of tensors does not require grad",
        ),
    ],
)
def test_errors(ranks: Ranks, recipes: str, statement: str, error: str) -> None:
    for text in ranks.run(_error_of, recipes, statement):
        assert text.startswith(error)
    assert f"`{error}" in DOCUMENT


def _error_of(recipes: str, statement: str) -> str:
    names = Training(recipes).names
    names["labels"] = names["batch"][1:]
    names["states"] = _states(names["batch"])
    try:
        exec(statement, names)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_every_block_is_run() -> None:
    source = Path(__file__).read_text()
    assert DOCUMENT.count("```python") == len(RECIPES)
    assert [r for r in RECIPES if not re.search(rf'["+] ?{r} ?["+]', source)] == []


def test_error_of_one_rank_is_reported(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match=r"rank 1: .*\n(.*\n)*ValueError: only here"):
        ranks.run(_fail_on_rank_1)
    assert ranks.run(dist.get_rank) == [0, 1]


def _fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("only here")
    dist.barrier()


def test_hanging_rank_is_reported(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.run(dist.get_rank)
    monkeypatch.setattr("ranks.SECONDS", 1)
    with pytest.raises(AssertionError, match="no answer within 1 s"):
        ranks.run(_hang_on_rank_1)


def _hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(3600)
