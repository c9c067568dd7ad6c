"""Several target sets in one training: one encoder, one mask, and for each set its own adapters, heads and weight."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.export import export, student_of_run
from pipelines.extract import extract
from pipelines.loading.encoder_source import load_encoder
from pipelines.pack import pack
from pipelines.terminal.texts import train_text
from pipelines.train import train
from tec_cache.base.source import Given
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.config import TrainConfig, wanted_sets
from tec_cache.distributed import Ranks
from tec_cache.errors import CacheError, ConfigError, IdentityError
from tec_cache.finetune.model import adapters_of
from tec_cache.loader import Loader
from tec_cache.run.metrics import read_metrics
from tec_cache.run.settings import load_settings
from tec_cache.student.masking import random_mask
from tec_cache.student.model import Goal, Student, create_student
from tec_cache.tasks.gradients import DWARFED, SetGradients, dwarfed, gradient_norms
from tec_cache.types import Targets, TargetSpec
from tests.conftest import TINY, last_checkpoint, payload_of, tiny_config, tiny_training, write_tiny_base

ONE = TargetSpec(grid=4, channels=24, num_heads=2, k=3, normalization="patch")
OTHER = TargetSpec(grid=4, channels=36, num_heads=3, k=5, normalization="patch", class_token=True)
SMALL: dict[str, Any] = {"decoder_width": 32, "decoder_heads": 4}


def student_of(goals: TargetSpec | dict[str, TargetSpec], **options: Any) -> Student:
    given = goals if isinstance(goals, TargetSpec) else {name: Goal(spec=spec, tau=1.5) for name, spec in goals.items()}
    return create_student("vit_tiny_patch16_224", targets=given, model_args=dict(TINY), **SMALL, **options).double()


def targets_of(spec: TargetSpec, seed: int, batch: int = 3) -> Targets:
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = torch.stack([torch.randperm(16, generator=g)[: spec.num_rows - 1] for _ in range(batch)])
    token = drawn(batch, spec.channels) if spec.class_token else None
    return Targets(drawn(batch, 16, spec.channels), drawn(batch, spec.num_heads, spec.num_rows, 16), rows, token)


def seen(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    return torch.randn(batch, 3, 32, 32, generator=g, dtype=torch.float64), torch.rand(batch, 16, generator=g)


def gradients(student: Student, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    student.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def test_two_equal_sets_of_half_weight_are_one_set() -> None:
    """Float64: the loss is the mean of the two sets', and the encoder's gradient that of a student with one set."""
    alone, both = student_of(ONE), student_of({"a": ONE, "b": ONE})
    state = alone.state_dict()
    copied = {
        name: state[name.replace("heads.1.", "heads.0.").replace("adapters.1.", "adapters.0.")]
        for name in both.state_dict()
    }
    both.load_state_dict(copied)
    for goal in both.goals.values():
        assert goal.tau == 1.5
    alone.goals[""] = Goal(spec=ONE, tau=1.5)
    (images, noise), targets = seen(), targets_of(ONE, 1)
    one = alone(images, targets, noise=noise)
    two = both(images, {"a": targets, "b": targets}, noise=noise)
    assert set(two) == {"a/feature", "a/attention", "b/feature", "b/attention"}
    half = 0.5 * (two["a/feature"] + two["a/attention"]) + 0.5 * (two["b/feature"] + two["b/attention"])
    whole = one["feature"] + one["attention"]
    torch.testing.assert_close(half, whole, rtol=1e-12, atol=0)
    expected, found = gradients(alone, whole), gradients(both, half)
    shared = [name for name in expected if not name.startswith(("heads.", "encoder_adapters."))]
    assert any(name.startswith("encoder.blocks.0") for name in shared)
    for name in shared:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-14)
    for part in ("heads", "encoder_adapters"):
        own = [name for name in expected if name.startswith(f"{part}.0.")]
        assert own
        for name in own:
            for number in (0, 1):
                torch.testing.assert_close(
                    2 * found[name.replace(".0.", f".{number}.", 1)], expected[name], rtol=1e-9, atol=1e-14
                )


def test_the_encoders_gradient_is_the_sum_of_the_sets() -> None:
    student = student_of({"a": ONE, "b": OTHER})
    (images, noise), targets = seen(), {"a": targets_of(ONE, 1), "b": targets_of(OTHER, 2)}

    def of(weights: dict[str, float]) -> dict[str, torch.Tensor]:
        losses = student(images, targets, noise=noise)
        return gradients(student, sum(weights[name[0]] * loss for name, loss in losses.items()))  # type: ignore[arg-type]

    both, one, other = of({"a": 0.7, "b": 0.2}), of({"a": 1.0, "b": 0.0}), of({"a": 0.0, "b": 1.0})
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, 0.7 * one[name] + 0.2 * other[name], rtol=1e-9, atol=1e-13)
    assert not any(one[name].any() for name in one if name.startswith(("heads.1.", "encoder_adapters.1.")))


def test_rows_of_one_set_in_another_order_change_that_sets_losses_only() -> None:
    student = student_of({"a": ONE, "b": OTHER})
    (images, noise), a, b = seen(), targets_of(ONE, 1), targets_of(OTHER, 2)
    before = student(images, {"a": a, "b": b}, noise=noise)
    turned = Targets(*(t.roll(1, 0) for t in (b.features, b.attention, b.rows, b.class_token) if t is not None))
    after = student(images, {"a": a, "b": turned}, noise=noise)
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("a/"), name


def test_each_set_has_adapters_and_heads_of_its_own_unless_the_adapters_are_shared() -> None:
    both, shared = student_of({"a": ONE, "b": OTHER}), student_of({"a": ONE, "b": OTHER}, adapters_shared=True)
    alone = student_of(ONE)
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in alone.named_children()}
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in both.named_children()}
    assert count["encoder"] == sizes["encoder"]
    assert count["decoder"] == sizes["decoder"]
    assert count["input_adapter"] == sizes["input_adapter"]
    assert count["encoder_adapters"] == 2 * sizes["encoder_adapters"]
    assert len(shared.encoder_adapters) == 1
    assert [list(heads) for heads in both.heads] == [["feature", "attention"], ["feature", "attention", "class"]]  # type: ignore[call-overload]
    (images, noise), targets = seen(), {"a": targets_of(ONE, 1), "b": targets_of(OTHER, 2)}
    layers = shared.forward_layers(images, random_mask(noise, 0.75))
    one, other = shared.fused(layers)
    assert one is other
    assert shared(images, targets, noise=noise).keys() == both(images, targets, noise=noise).keys()


def test_sets_over_different_grids_are_refused() -> None:
    odd = TargetSpec(grid=8, channels=24, num_heads=0, k=None, normalization="patch")
    with pytest.raises(ConfigError, match="different grids"):
        student_of({"a": ONE, "b": odd})


def test_gradient_norms_are_those_at_all_the_encoder_gives() -> None:
    student = student_of({"a": ONE, "b": OTHER})
    (images, noise), targets = seen(), {"a": targets_of(ONE, 1), "b": targets_of(OTHER, 2)}
    mask = random_mask(noise, student.mask_ratio)
    weights = {"a": {"a/feature": 1.0, "a/attention": 0.5}, "b": {"b/feature": 2.0, "b/attention": 0.0, "b/class": 1.0}}
    norms = gradient_norms(student, images, targets, mask, weights)
    assert all(p.grad is None for p in student.parameters())
    layers = [layer.detach().requires_grad_() for layer in student.forward_layers(images, mask)]
    for place, of_set in enumerate(weights.values()):
        squares = []
        for view in range(3):

            def only(t: torch.Tensor | None, view: int = view) -> Any:
                return None if t is None else t[view : view + 1]

            own = [layer[view : view + 1].detach().requires_grad_() for layer in layers]
            seen_by = {
                n: Targets(*map(only, (t.features, t.attention, t.rows, t.class_token))) for n, t in targets.items()
            }
            losses = student.judged(own, seen_by, random_mask(noise[view : view + 1], student.mask_ratio))
            sum(w * losses[name] for name, w in of_set.items()).backward()  # type: ignore[union-attr]
            squares.append(sum(float(layer.grad.square().sum()) for layer in own if layer.grad is not None))
        assert float(norms[place]) == pytest.approx((sum(squares) / 3) ** 0.5, rel=1e-6)


def test_balanced_weights_equalize_the_running_norms_and_keep_their_sum() -> None:
    running = torch.zeros(2)
    found = SetGradients({"a": 1.0, "b": 0.5}, Ranks(), running)
    assert found.factors() == {"a": 1.0, "b": 0.5}, "as given, before anything was measured"
    found.add(torch.tensor([4.0, 1.0]))
    assert running.tolist() == [4.0, 1.0], "the first one counts whole"
    a, b = found.factors().values()
    assert a + b == pytest.approx(1.5)
    assert a * 4.0 / (b * 1.0) == pytest.approx(1.0 / 0.5), "norms as the given weights are"
    found.add(torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(running, torch.tensor([0.9 * 4 + 0.1 * 2, 1.0]))
    found.add(torch.tensor([float("nan"), 1.0]))
    torch.testing.assert_close(running, torch.tensor([3.8, 1.0]))
    again = SetGradients({"a": 1.0, "b": 0.5}, Ranks(), running.clone())
    assert again.factors() == found.factors(), "a checkpoint needs to hold nothing else"


def test_a_gradient_that_dwarfs_another_is_named() -> None:
    assert dwarfed({"a": 1.0, "b": 0.9 * DWARFED}) == ""
    assert dwarfed({"a": 1.0, "b": 12.4, "c": 5.0}) == "the gradient of b is 12 times that of a"
    assert dwarfed({"a": 1.0}) == dwarfed({"a": 0.0, "b": 3.0}) == dwarfed({"a": float("nan"), "b": 1.0}) == ""


def test_names_and_weights() -> None:
    assert wanted_sets(("mae", "ibot:0.5", "timm:vit_x", "timm:vit_x2:3")) == {
        "mae": 1.0, "ibot": 0.5, "timm:vit_x": 1.0, "timm:vit_x2": 3.0
    }  # fmt: skip
    for wrong in (("mae:0",), ("mae:-1",), ("mae:inf",), ("mae:nan",), (":2",), ("mae", "mae:2")):
        with pytest.raises(ConfigError):
            TrainConfig(cache="c", out="o", target=wrong)
    for alone in ({"balance": "norm"}, {"adapters_shared": True}):
        with pytest.raises(ConfigError, match="one target set"):
            TrainConfig(cache="c", out="o", target="mae", **alone)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of other width, heads, patch and registers: it sees 24 pixels where the first sees 32."""
    changes = {"embed_dim": 36, "num_heads": 2, "reg_tokens": 2}
    return write_tiny_base(tmp_path_factory.mktemp("other") / "other", seed=5, **changes)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_base: Path, other_base: Path) -> Path:
    """A cache with two sets: `tiny`, exact, and `other`, coded and with class tokens."""
    cache = tmp_path_factory.mktemp("twice") / "cache"
    extract(tiny_config(shards, cache, tiny_base))
    extract(tiny_config(None, cache, other_base, k="5", quality="0.05,0.04", class_target=True))
    return cache


def test_the_loader_gives_each_sets_own_codes_beside_the_crops_once(
    twice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(twice)
    sets = [cache["tiny"], cache["other"]]
    how: dict[str, Any] = {"batch_size": 16, "pixel_sizes": (32,), "workers": 1}
    alone = [list(Loader(cache, target, **how).batches(0, 6)) for target in sets]
    read: list[str] = []
    whole = Cache.read_block

    def counted(self: Cache, crops: Any, *others: Any) -> Any:
        read.append(crops.payload.name)
        return whole(self, crops, *others)

    monkeypatch.setattr(Cache, "read_block", counted)
    both = list(Loader(cache, sets, **how).batches(0, 6))
    blocks = len(read)
    for place, batch in enumerate(both):
        assert set(batch.codes) == {"tiny", "other"}
        for target, batches in zip(sets, alone, strict=True):
            mine = batches[place]
            assert torch.equal(batch.pixels[32], mine.pixels[32])
            assert np.array_equal(batch.sample_keys, mine.sample_keys)
            assert batch.codes[target.name].keys() == mine.codes[target.name].keys()
            for name, values in mine.codes[target.name].items():
                assert torch.equal(batch.codes[target.name][name], values)
    read.clear()
    list(Loader(cache, sets[0], **how).batches(0, 6))
    assert len(read) == blocks, "no crop is read for each set again"


def recorded(run: Path) -> list[dict[str, float]]:
    timed = ("images_per_second", "waited", "seconds", "time")
    return [{n: v for n, v in line.items() if n not in timed} for line in read_metrics(run)]


BOTH = {"target": ("tiny", "other:0.5")}


@pytest.fixture(scope="module")
def trained(twice: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_training(twice, run, **BOTH, balance="norm", steps=12, save_every=1))
    return run


def test_every_number_is_named_by_its_set(trained: Path) -> None:
    lines = recorded(trained)
    terms = {"tiny/feature", "tiny/attention", "other/feature", "other/attention", "other/class"}
    assert all(terms < line.keys() for line in lines)
    assert [("tiny/gradient" in line, "other/weight" in line) for line in lines] == [(True, True)] * 8 + [
        (False, False)
    ] * 4
    for line in lines[:8]:
        pulls = [line["tiny/gradient"] / 1.0, line["other/gradient"] / 0.5]
        assert 0.3 < pulls[0] / pulls[1] < 3, "the running means lag behind, the norms are alike all the same"
        weights = [line["tiny/weight"], line["other/weight"]]
        assert sum(weights) == pytest.approx(1.5)
        total = sum(
            w * sum(line[t] for t in terms if t.startswith(n)) for n, w in zip(("tiny", "other"), weights, strict=True)
        )
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_without_balance_the_weights_are_those_given(twice: Path, tmp_path: Path) -> None:
    summary = train(tiny_training(twice, tmp_path / "run", **BOTH, steps=2))
    for line in recorded(tmp_path / "run"):
        terms = {n: line[n] for n in line if n.startswith(("tiny/", "other/")) and not n.endswith("gradient")}
        assert line["loss"] == pytest.approx(sum((0.5 if n[0] == "o" else 1) * v for n, v in terms.items()), rel=1e-5)
    assert set(summary.gradients) == {"tiny", "other"}
    assert "gradients    tiny " in train_text(summary, False, "")
    assert set(summary.target_errors) == {"tiny", "other"}
    assert "gradient_norms" not in last_checkpoint(tmp_path / "run")["model"]


def test_measuring_changes_nothing(twice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny_training(twice, tmp_path / "a", **BOTH, steps=4))
    monkeypatch.setattr("tec_cache.tasks.pretrain.is_measured", lambda *_: False)
    train(tiny_training(twice, tmp_path / "b", **BOTH, steps=4))
    one, other = (last_checkpoint(tmp_path / name)["model"] for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_interrupted_and_gone_on_it_is_the_same_to_the_last_bit(trained: Path, twice: Path, tmp_path: Path) -> None:
    for steps in (3, 9, 12):
        train(tiny_training(twice, tmp_path / "run", **BOTH, balance="norm", steps=steps, save_every=1))
    one, other = (last_checkpoint(run)["model"] for run in (trained, tmp_path / "run"))
    assert "gradient_norms" in one
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert recorded(trained) == recorded(tmp_path / "run")


def test_micro_batches_and_another_number_of_sets_are_what_they_say(twice: Path, tmp_path: Path) -> None:
    train(tiny_training(twice, tmp_path / "a", **BOTH, steps=3, micro_batch=8))
    assert [n for line in recorded(tmp_path / "a") for n in line if n.endswith("gradient")]
    for changed in ({"target": ("tiny", "other")}, {"target": "tiny"}, {"target": ("other:0.5", "tiny")}):
        with pytest.raises(IdentityError, match="target"):
            train(tiny_training(twice, tmp_path / "a", steps=3, micro_batch=8, **changed))


@pytest.mark.parametrize("packed", [False, True])
def test_all_is_every_set_and_a_pack_gives_the_same(twice: Path, tmp_path: Path, packed: bool) -> None:
    place = twice
    if packed:
        place = tmp_path / "pack"
        pack(str(twice), str(place))
    first = train(tiny_training(twice, tmp_path / "named", target=("other", "tiny"), steps=3))
    every = train(tiny_training(place, tmp_path / "all", target="all", steps=3))
    assert every.losses == first.losses


def test_all_goes_on_with_the_sets_that_it_began_with(twice: Path, tiny_base: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(twice, tmp_path / "cache"))
    train(tiny_training(cache, tmp_path / "run", target="all", steps=2))
    extract(tiny_config(None, cache, tiny_base, name="third"))
    summary = train(tiny_training(cache, tmp_path / "run", target="all", steps=3))
    assert summary.steps == 3
    assert not any(name.startswith("third/") for name in summary.losses)


def test_cached_equals_several_bases_online(twice: Path, tiny_base: Path, other_base: Path, tmp_path: Path) -> None:
    how = {"k": "3", "tau": 1.0, "steps": 3}
    cached = train(tiny_training(twice, tmp_path / "c", target=("tiny", "other:0.5"), class_weight=0.0, **how))
    online = train(tiny_training(twice, tmp_path / "o", online=(str(tiny_base), f"{other_base}:0.5"), **how))
    assert set(online.base_calls) == {"tiny", "other"}
    assert all(calls >= 3 for calls in online.base_calls.values())
    assert cached.losses.keys() == online.losses.keys()
    for name, loss in cached.losses.items():
        place, other = name.partition("/")[0], online.losses[name]
        assert loss == pytest.approx(other, rel=2e-3 if place == "tiny" else 0.06), name


def test_an_export_holds_the_adapters_of_each_set_by_name(trained: Path, tmp_path: Path) -> None:
    export(str(trained), str(tmp_path / "export"))
    state = last_checkpoint(trained)["model"]
    loaded = load_encoder(str(tmp_path / "export"), None, grid=4, given=Given())
    assert set(loaded.adapters_states) == {"tiny", "other"}
    for number, name in enumerate(("tiny", "other")):
        mine = adapters_of(loaded, name)
        assert mine is not None
        prefix = f"encoder_adapters.{number}."
        assert set(mine) == {n.removeprefix(prefix) for n in state if n.startswith(prefix)}
        assert all(torch.equal(value, state[prefix + n]) for n, value in mine.items())
    student_of_run(load_settings(trained)).load_state_dict(state)
    for wrong in ("pretrained", "third"):
        with pytest.raises(ConfigError, match="tiny"):
            adapters_of(loaded, wrong)


def test_views_stage_and_partial_are_as_with_one_set(twice: Path, tmp_path: Path) -> None:
    plain = train(tiny_training(twice, tmp_path / "plain", **BOTH, views=1, steps=4))
    staged = train(tiny_training(twice, tmp_path / "staged", **BOTH, views=1, steps=4, stage=str(tmp_path / "copies")))
    assert staged.losses == plain.losses
    cache = Path(shutil.copytree(twice, tmp_path / "cache"))
    unit = open_cache(cache)["other"].units[-1]
    (cache / "records" / "targets" / "other").joinpath(*str(record_of(cache, unit)).split("/")).unlink()
    shutil.rmtree(cache / "index")
    with pytest.raises(CacheError, match="other"):
        train(tiny_training(cache, tmp_path / "whole", **BOTH, steps=2))
    part = train(tiny_training(cache, tmp_path / "part", **BOTH, partial=True, steps=2))
    assert part.steps == 2
    assert load_settings(tmp_path / "part")["groups"]


def record_of(cache: Path, unit: Any) -> Path:
    from tec_cache.cache import layout

    return Path(layout.target_record("other", unit)).relative_to("records/targets/other")


def test_a_damaged_block_of_one_set_takes_its_rows_from_all(twice: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(twice, tmp_path / "cache"))
    opened = open_cache(cache)
    unit = opened["other"].units[0]
    payload = payload_of(opened, unit, "other")
    data = bytearray(payload.read_bytes())
    offset, size, _ = opened["other"].record(unit).blocks["features"][0]
    data[offset + size // 2] ^= 255
    payload.write_bytes(data)
    one = tiny_training(cache, tmp_path / "stop", **BOTH, views=1, epochs=2, warmup_epochs=0)
    with pytest.raises(CacheError, match="damaged"):
        train(one)
    skipped = train(
        tiny_training(cache, tmp_path / "skip", **BOTH, views=1, epochs=2, warmup_epochs=0, on_error="skip")
    )
    assert skipped.finished
    assert len(skipped.damaged) == 1
