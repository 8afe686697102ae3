"""Each parameter is in exactly one group, and schedules have the values their recipes promise."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from composer.core import State, Time, Timestamp, TimeUnit
from composer.optim import DecoupledAdamW, LinearWithWarmupScheduler

from bert.errors import RecipeError
from bert.recipe import builders, optim
from bert.recipe.optim import WarmupStableDecayScheduler, parameter_groups


class Toy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(6, 4)
        self.filter_network = torch.nn.Linear(4, 4)
        self.filter_reverse = torch.nn.Linear(4, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.decoder = torch.nn.Linear(4, 6)
        self.decoder.weight = self.embedding.weight
        self.frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)


def names(model: torch.nn.Module, groups: list[dict]) -> list[list[str]]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[by_id[id(parameter)] for parameter in group["params"]] for group in groups]


def test_without_groups_there_is_one_of_all_trainable_parameters() -> None:
    model = Toy()
    groups = parameter_groups(model.named_parameters(), None)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names(model, groups) == [trainable]
    assert set(groups[0]) == {"params"}


def test_the_first_pattern_wins_and_the_rest_stays_together(caplog: pytest.LogCaptureFixture) -> None:
    model = Toy()
    settings = [
        {"pattern": r"filter.*weight", "lr": 1e-3, "weight_decay": 0.1},
        {"pattern": r"filter|bias$|norm", "weight_decay": 0.0},
    ]
    with caplog.at_level(logging.INFO, logger="bert"):
        groups = parameter_groups(model.named_parameters(), settings)
    assert names(model, groups) == [
        ["embedding.weight"],
        ["filter_network.weight", "filter_reverse.weight"],
        ["filter_network.bias", "filter_reverse.bias", "norm.weight", "norm.bias", "decoder.bias"],
    ]
    assert [{k: v for k, v in group.items() if k != "params"} for group in groups] == [
        {},
        {"lr": 1e-3, "weight_decay": 0.1},
        {"weight_decay": 0.0},
    ]
    assert "2 tensors, 32 parameters" in caplog.text
    optimizer = DecoupledAdamW(groups, lr=8e-4, weight_decay=1e-5)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(8e-4, 1e-5), (1e-3, 0.1), (8e-4, 0.0)]


def test_no_default_group_where_patterns_take_everything() -> None:
    model = Toy()
    assert (
        names(model, parameter_groups(model.named_parameters(), [{"pattern": ".", "lr": 1.0}]))[0][0]
        == "embedding.weight"
    )


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"pattern": "flter", "lr": 1.0}], "'flter' matches no parameter"),
        ([{"pattern": "filter"}, {"pattern": "filter_network"}], r"param_groups\[1\].*matches no parameter"),
        ([{"pattern": "frozen"}], "'frozen' matches no parameter"),
        ([{"pattern": "("}], "not a regular expression"),
        ([{"pattern": 3}], "not a regular expression"),
        ([{"lr": 1.0}], "must be a section with a 'pattern'"),
        (["filter"], "must be a section with a 'pattern'"),
        ([{"pattern": "filter", "weight_decey": 0.0}], "did you mean 'weight_decay'"),
        ([{"pattern": "filter", "lr": "1e-3x"}], r"param_groups\[0\].lr must be a number"),
    ],
)
def test_mistakes_in_groups(groups: list, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parameter_groups(Toy().named_parameters(), groups)


def state(now: int, duration: str, unit: TimeUnit = TimeUnit.BATCH, dataloader_len: int | None = None) -> State:
    values = {
        "timestamp": Timestamp().copy(**{unit.name.lower(): now}),  # type: ignore[arg-type]
        "max_duration": Time.from_timestring(duration),
        "dataloader_len": dataloader_len,
    }
    return cast(State, SimpleNamespace(**values))


@pytest.mark.parametrize(
    ("now", "expected"),
    [(0, 0.0), (5, 0.5), (10, 1.0), (50, 1.0), (80, 1.0), (90, 0.55), (100, 0.1), (120, 0.1)],
)
def test_warmup_stable_decay(now: int, expected: float) -> None:
    for t_warmup, t_decay in (("0.1dur", "0.2dur"), ("10ba", "20ba")):
        schedule = WarmupStableDecayScheduler(t_warmup, t_decay, alpha_f=0.1)
        assert schedule(state(now, "100ba")) == pytest.approx(expected)


def test_warmup_stable_decay_in_other_units_and_shapes() -> None:
    schedule = WarmupStableDecayScheduler("0.1dur", "0.4dur", alpha_f=0.0, shape="sqrt")
    assert schedule(state(700, "1000sp", TimeUnit.SAMPLE)) == pytest.approx(
        0.5
    )  # a quarter of the decay: 1 - sqrt(1/4)
    assert schedule(state(14, "2ep", dataloader_len=10)) == pytest.approx(0.5)
    assert WarmupStableDecayScheduler("0dur", "0dur")(state(99, "100ba")) == 1.0
    with pytest.raises(RecipeError, match="longer than the run"):
        WarmupStableDecayScheduler("0.5dur", "0.6dur")(state(1, "100ba"))
    with pytest.raises(RecipeError, match="in the run's unit"):
        WarmupStableDecayScheduler("5ba")(state(1, "100sp", TimeUnit.SAMPLE))
    with pytest.raises(RecipeError, match="did you mean 'linear'"):
        WarmupStableDecayScheduler("5ba", shape="linaer")


@pytest.mark.parametrize(
    ("sample", "expected"),
    [(0, 0.0), (8_601_600, 0.5), (17_203_200, 1.0), (151_961_600, 0.51), (286_720_000, 0.02)],
)
def test_the_papers_schedule(sample: int, expected: float) -> None:
    schedule = LinearWithWarmupScheduler(t_warmup="0.06dur", alpha_f=0.02)
    assert schedule(state(sample, "286720000sp", TimeUnit.SAMPLE)) == pytest.approx(expected)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_fused_optimizer_is_composers(amsgrad: bool) -> None:
    settings = {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 5e-4, "amsgrad": amsgrad}
    torch.manual_seed(0)
    ours, theirs = Toy(), Toy()
    theirs.load_state_dict(ours.state_dict())
    groups = [{"pattern": "filter", "lr": 0.01, "weight_decay": 0.0}]
    made = [
        cls(parameter_groups(model.named_parameters(), groups), **settings)
        for cls, model in ((optim.DecoupledAdamW, ours), (DecoupledAdamW, theirs))
    ]

    def train(models: list[Toy], optimizers: list[torch.optim.Optimizer], steps: range) -> None:
        for step in steps:
            ids = torch.randint(0, 6, (8,), generator=torch.Generator().manual_seed(step))
            for model, optimizer in zip(models, optimizers, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * (1 - step / 20)
                hidden = model.norm(model.filter_reverse(model.filter_network(model.embedding(ids))))
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model.decoder(hidden), ids).backward()
                optimizer.step()

    def check() -> None:
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert [group["weight_decay"] for group in made[0].param_groups] == [5e-4, 0.0]

    train([ours, theirs], made, range(8))
    check()
    # Each goes on from the other's checkpoint.
    states = [optimizer.state_dict() for optimizer in made]
    for optimizer, state in zip(made, reversed(states), strict=True):
        optimizer.load_state_dict(copy.deepcopy(state))
    train([ours, theirs], made, range(8, 16))
    check()


def test_adamw_is_fused_unless_told_otherwise_and_pytorchs() -> None:
    torch.manual_seed(0)
    ours, theirs, plain = Toy(), Toy(), Toy()
    for other in (theirs, plain):
        other.load_state_dict(ours.state_dict())
    settings = {"lr": 0.1, "weight_decay": 0.1}
    optimizers = [
        builders.build("optimizer", "adamw", settings, params=ours.parameters()),
        torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.1, foreach=False),
        builders.build("optimizer", "adamw", {**settings, "foreach": True, "fused": False}, params=plain.parameters()),
    ]
    assert [bool(optimizer.param_groups[0]["fused"]) for optimizer in optimizers] == [True, False, False]
    for step in range(3):
        for model, optimizer in zip((ours, theirs, plain), optimizers, strict=True):
            model.decoder(model.norm(model.embedding(torch.tensor([step, 1])))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, expected, unfused in zip(ours.parameters(), theirs.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, expected)
        torch.testing.assert_close(unfused, expected)
