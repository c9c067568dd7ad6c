"""`train --init` an export or a run: what is taken is the source's, what is not is as the seed says, and it is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.export import export
from pipelines.extract import extract
from pipelines.terminal.texts import train_text
from pipelines.train import train
from tec_cache.errors import ConfigError, IdentityError, TecCacheError, WeightsError
from tec_cache.run.layout import checkpoints
from tec_cache.run.settings import load_settings
from tests.conftest import TINY, last_checkpoint, tiny_config, tiny_training, write_tiny_base

FROZEN = {"base_lr": 0.0, "weight_decay": 0.0, "steps": 1}
"""One step after which all weights are as they were."""
WHOLE = ["encoder", "input adapter", "encoder adapters"]
DECODER = ["decoder blocks", "feature head", "attention head"]


@pytest.fixture(scope="module")
def source(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps, and its export beside it."""
    folder = tmp_path_factory.mktemp("source")
    train(tiny_training(made_cache, folder / "run", steps=5))
    export(folder / "run", folder / "export")
    return folder


@pytest.fixture(scope="module")
def fresh(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The random weights of seed 7."""
    run = tmp_path_factory.mktemp("fresh") / "r"
    train(tiny_training(made_cache, run, seed=7, **FROZEN))
    return dict(last_checkpoint(run)["model"])


def started(cache: Path, run: Path, init: Path, **changes: object) -> dict[str, torch.Tensor]:
    train(tiny_training(cache, run, init=str(init), seed=7, **(FROZEN | changes)))
    return dict(last_checkpoint(run)["model"])


def alike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in ours if name in theirs and torch.equal(ours[name], theirs[name])}


def test_a_run_gives_everything_that_fits(made_cache: Path, source: Path, tmp_path: Path) -> None:
    ours = started(made_cache, tmp_path / "r", source / "run")
    assert alike(ours, last_checkpoint(source / "run")["model"]) == set(ours)
    init = load_settings(tmp_path / "r")["init"]
    assert (init["kind"], init["step"], init["taken"], init["random"]) == ("run", 5, WHOLE + DECODER, [])


def test_an_export_gives_encoder_and_adapters_and_the_rest_is_as_the_seed_says(
    made_cache: Path, source: Path, fresh: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ours = started(made_cache, tmp_path / "r", source / "export")
    theirs = last_checkpoint(source / "run")["model"]
    decoder = {name for name in ours if name.startswith(("decoder.", "heads."))}
    assert alike(ours, theirs) >= set(ours) - decoder, "the class token too is the one before the input adapter"
    assert alike(ours, fresh) >= decoder
    moved = {name for name in decoder if not torch.equal(theirs[name], fresh[name])}
    assert len(moved) > 10, "so it would be seen"
    init = load_settings(tmp_path / "r")["init"]
    assert (init["kind"], init["taken"], init["random"]) == ("export", WHOLE, DECODER)


def test_without_an_input_adapter_the_class_token_is_the_folded_one(
    made_cache: Path, source: Path, tmp_path: Path
) -> None:
    token = load_file(source / "export" / "model.safetensors")["cls_token"]
    for name in ("run", "export"):
        ours = started(made_cache, tmp_path / name, source / name, adapters="encoder")
        assert torch.equal(ours["encoder.cls_token"], token)
    raw = load_file(source / "export" / "adapters" / "adapters.safetensors")["input_adapter.class_token"]
    assert not torch.equal(raw, token)


def test_an_export_without_adapters_leaves_them_random_and_says_so(
    made_cache: Path, fresh: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    train(tiny_training(made_cache, tmp_path / "plain", steps=2, adapters="none"))
    export(tmp_path / "plain", tmp_path / "export")
    ours = started(made_cache, tmp_path / "r", tmp_path / "export")
    rest = {name for name in ours if not name.startswith("encoder.")}
    assert alike(ours, fresh) >= rest
    assert load_settings(tmp_path / "r")["init"]["random"] == [*WHOLE[1:], *DECODER]


def test_from_pixels_to_targets_all_but_the_heads_goes_on(
    made_cache: Path, source: Path, fresh: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    train(tiny_training(made_cache, tmp_path / "pixels", steps=2, pixels=True))
    said = train(tiny_training(made_cache, tmp_path / "r", init=str(tmp_path / "pixels"), seed=7, **FROZEN))
    ours, theirs = (last_checkpoint(tmp_path / name)["model"] for name in ("r", "pixels"))
    heads = {name for name in ours if name.startswith("heads.")}
    assert alike(ours, theirs) >= set(ours) - heads
    assert alike(ours, fresh) >= heads
    text = train_text(said, False, "")
    assert "began with   encoder, input adapter, encoder adapters, decoder blocks of a run, step 2" in text
    assert "             random: feature head, attention head" in text


def test_blocks_of_another_number_of_heads_have_the_same_shapes_and_are_not_taken(
    made_cache: Path, source: Path, fresh: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ours = started(made_cache, tmp_path / "r", source / "run", decoder_heads=8)
    blocks = {name for name in ours if name.startswith("decoder.blocks.")}
    assert alike(ours, fresh) >= blocks
    assert load_settings(tmp_path / "r")["init"]["random"] == ["decoder blocks"]


def test_sets_are_known_by_their_names(made_cache: Path, source: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(made_cache, tmp_path / "cache"))
    extract(tiny_config(None, cache, write_tiny_base(tmp_path / "other", seed=5), name="other"))
    ours = started(cache, tmp_path / "two", source / "run", target=("other", "tiny"))
    init = load_settings(tmp_path / "two")["init"]
    others = ["encoder adapters of other", "feature head of other", "attention head of other"]
    assert init["random"] == others
    theirs = last_checkpoint(source / "run")["model"]
    assert torch.equal(ours["encoder_adapters.1.norm_before.weight"], theirs["encoder_adapters.0.norm_before.weight"])
    assert torch.equal(ours["heads.1.feature.head.weight"], theirs["heads.0.feature.head.weight"])
    export(tmp_path / "two", tmp_path / "export")
    back = started(cache, tmp_path / "back", tmp_path / "export", target=("tiny",))
    assert load_settings(tmp_path / "back")["init"]["taken"] == WHOLE
    assert torch.equal(back["encoder_adapters.0.fuse.0.weight"], ours["encoder_adapters.1.fuse.0.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"embed_dim": 24}, "do not fit"), ({"depth": 6}, "do not fit"), ({"num_heads": 4}, "heads 4, the base's 3")],
)
def test_an_encoder_that_does_not_fit_is_refused(
    made_cache: Path, source: Path, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    for name in ("run", "export"):
        config = tiny_training(made_cache, tmp_path / "r", init=str(source / name), student_args=TINY | changes)
        with pytest.raises(WeightsError, match=message) as error:
            train(config)
        assert error.value.where or error.value.details
        assert error.value.todo
    assert not (tmp_path / "r").exists()


def test_what_is_neither_is_refused(made_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither an export nor a run here.*did you mean base"):
        train(tiny_training(made_cache, tmp_path / "r", init="bsae"))
    with pytest.raises(ConfigError, match="neither"):
        train(tiny_training(made_cache, tmp_path / "r", init=str(made_cache)))
    train(tiny_training(made_cache, tmp_path / "begun", steps=1))
    shutil.rmtree(tmp_path / "begun" / "checkpoints")
    with pytest.raises(TecCacheError, match="no checkpoint yet"):
        train(tiny_training(made_cache, tmp_path / "r", init=str(tmp_path / "begun")))
    assert not (tmp_path / "r").exists()


def test_a_changed_source_is_noticed_and_a_lost_one_is_needed_until_the_first_checkpoint(
    made_cache: Path, source: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source / "export", tmp_path / "export"))
    config = tiny_training(made_cache, tmp_path / "r", init=str(folder), steps=2)
    train(config)
    whole = last_checkpoint(tmp_path / "r")["model"]
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    elsewhere = tiny_training(made_cache, tmp_path / "r", init=str(moved), steps=3)
    assert train(elsewhere).steps == 3, "the same weights, in another place"
    assert train(tiny_training(made_cache, tmp_path / "r", init=str(folder), steps=4)).steps == 4, "not needed any more"
    for path in checkpoints(tmp_path / "r"):
        path.unlink()
    with pytest.raises(ConfigError, match="neither an export nor a run"):
        train(config)
    shutil.move(moved, folder)
    train(config)
    assert alike(last_checkpoint(tmp_path / "r")["model"], whole) == set(whole)
    exchange(folder)
    with pytest.raises(IdentityError, match=r"init\.sha256: stored"):
        train(tiny_training(made_cache, tmp_path / "r", init=str(folder), steps=5))
    with pytest.raises(IdentityError, match=r"config\.init: stored \"export\", asked \"random\""):
        train(tiny_training(made_cache, tmp_path / "r", steps=5))


def exchange(folder: Path) -> None:
    """Change one weight of an export, as another export in its place would."""
    import hashlib

    weights, document = folder / "model.safetensors", folder / "config.json"
    state = load_file(weights)
    state["norm.bias"] = state["norm.bias"] + 1
    save_file(state, weights, metadata={"format": "pt"})
    made = json.loads(document.read_text())
    made["tec_cache"]["model_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    document.write_text(json.dumps(made))


def test_a_source_run_may_be_trained_further(made_cache: Path, source: Path, tmp_path: Path) -> None:
    first = Path(shutil.copytree(source / "run", tmp_path / "first"))
    config = tiny_training(made_cache, tmp_path / "r", init=str(first), steps=2)
    train(config)
    train(tiny_training(made_cache, first, steps=6))
    assert train(tiny_training(made_cache, tmp_path / "r", init=str(first), steps=3)).steps == 3, "step 5 is there"
    train(tiny_training(made_cache, first, steps=7))
    assert train(tiny_training(made_cache, tmp_path / "r", init=str(first), steps=4)).steps == 4, "now it is not"


def test_damage_is_noticed(made_cache: Path, source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source / "export", tmp_path / "export"))
    for file in (folder / "adapters" / "adapters.safetensors", folder / "model.safetensors"):
        whole = bytearray(file.read_bytes())
        whole[-3] ^= 1
        file.write_bytes(whole)
        with pytest.raises(WeightsError):
            train(tiny_training(made_cache, tmp_path / "r", init=str(folder)))
        whole[-3] ^= 1
        file.write_bytes(whole)
    assert not (tmp_path / "r").exists()
