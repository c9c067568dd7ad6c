"""What a release fixes holds on every way in; who contradicts it is told; what nobody says is said to be assumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from cli import cli
from pipelines.extract import extract
from pipelines.info import describe_cache
from pipelines.terminal.texts import extract_text, info_text
from tec_cache.base.facts import hidden_shape, require_alike, settle
from tec_cache.base.load import load_base, outline
from tec_cache.base.source import Given, find_source
from tec_cache.config import ExtractConfig
from tec_cache.errors import ConfigError, TecCacheError, WeightsError
from tec_cache.recipes import BASES, IMAGENET_MEAN, IMAGENET_STD
from tec_cache.student.position import sincos_position
from tec_cache.weights.files import read_weights
from tec_cache.weights.releases import RELEASES
from tests.conftest import TINY, photo, tiny_config, write_tiny_base

SHORT = {"depth": 1}
"""One block: what a release fixes does not depend on how many there are."""
IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def state_of(name: str, **args: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **args)
    return {key: torch.randn_like(value) * 0.05 for key, value in model.state_dict().items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def dino(state: dict[str, Tensor]) -> dict[str, Any]:
    teacher = {f"backbone.{name}": value for name, value in state.items()} | {"head.mlp.0.weight": torch.ones(3, 3)}
    return {"teacher": teacher, "student": {f"module.{name}": value for name, value in teacher.items()}, "epoch": 9}


def mae(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"model": state | {"decoder_embed.weight": torch.ones(3, 3), "mask_token": torch.ones(1, 1, 3)}}


def mae_encoder(state: dict[str, Tensor]) -> dict[str, Any]:
    width = state["pos_embed"].shape[2]
    return state | {"pos_embed": sincos_position(width, round((state["pos_embed"].shape[1] - 1) ** 0.5))}


def moco_encoder(state: dict[str, Tensor]) -> dict[str, Any]:
    """MoCo v3's rows and columns change places against MAE's."""
    fixed = mae_encoder(state)["pos_embed"]
    half = fixed.shape[2] // 2
    return state | {"pos_embed": torch.cat([fixed[..., half:], fixed[..., :half]], dim=2)}


def moco(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"state_dict": {f"module.base_encoder.{name}": value for name, value in state.items()}}


def ibot(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"state_dict": state | {"masked_embed": torch.ones(1, 3)}}


def transformers_mae(state: dict[str, Tensor]) -> dict[str, Any]:
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj.": "embeddings.patch_embeddings.projection.", "blocks.": "encoder.layer.",
             "norm1.": "layernorm_before.", "norm2.": "layernorm_after.", "attn.proj.": "attention.output.dense.",
             "mlp.fc1.": "intermediate.dense.", "mlp.fc2.": "output.dense."}  # fmt: skip
    content: dict[str, Any] = {"decoder.mask_token": torch.ones(1, 1, 3)}
    for name, value in state.items():
        new = f"layernorm.{name[5:]}" if name.startswith("norm.") else name
        for ours, theirs in names.items():
            new = new.replace(ours, theirs)
        if ".attn.qkv." in new:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                content["vit." + new.replace("attn.qkv", f"attention.attention.{part}")] = third
        else:
            content["vit." + new] = value
    return content


WAYS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "DINO": (dino, "DINO"),
    "MAE with its decoder": (mae, "MAE"),
    "MAE's bare encoder": (mae_encoder, "MAE"),
    "MAE of transformers": (transformers_mae, "MAE"),
    "iBOT": (ibot, "iBOT"),
    "MoCo v3": (moco, "MoCo v3"),
    "MoCo v3's bare encoder": (moco_encoder, "MoCo v3"),
}


def facts_of(base: Any) -> dict[str, tuple[str, str]]:
    return {name: (value, origin) for name, value, origin in base.facts}


@pytest.mark.parametrize("way", WAYS)
def test_a_recognised_release_has_its_pixels_under_a_bare_architecture_and_alone(way: str, tmp_path: Path) -> None:
    write, title = WAYS[way]
    path = saved(tmp_path / "weights.pth", write(state_of("vit_tiny_patch16_224", **SHORT)))
    for name, file in (("timm:vit_tiny_patch16_224", path), (str(path), None)):
        base = load_base(name, file, grid=4, last_layers=1, given=Given(args=SHORT))
        assert (base.mean, base.std) == IMAGENET
        facts = facts_of(base)
        assert facts["weights"] == (title, "told by the file itself")
        assert facts["mean"] == ("0.485, 0.456, 0.406", f"{title}'s")
        assert base.identity["mean"] == list(IMAGENET_MEAN)


def test_a_file_that_says_nothing_says_so_and_can_be_told(tmp_path: Path) -> None:
    file = tmp_path / "augreg.safetensors"
    save_file(state_of("vit_tiny_patch16_224", **SHORT), file)
    short = Given(args=SHORT)
    named = load_base("timm:vit_tiny_patch16_224", file, grid=4, last_layers=1, given=short)
    assert (named.mean, named.std) == INCEPTION
    value, origin = facts_of(named)["mean"]
    assert value == "0.5, 0.5, 0.5"
    assert "timm's vit_tiny_patch16_224 (augreg" in origin
    assert "--mean R G B" in origin
    alone = load_base(str(file), grid=4, last_layers=1, given=short)
    assert (alone.mean, alone.std) == IMAGENET
    assert "the file does not say; --mean R G B" in facts_of(alone)["mean"][1]
    given = Given.of((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), SHORT)
    told = load_base(str(file), grid=4, last_layers=1, given=given)
    assert (told.mean, told.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert facts_of(told)["std"] == ("0.4, 0.5, 0.6", "--std")
    assert len({json.dumps(base.identity) for base in (named, alone, told)}) == 3
    assert len({base.identity["weights_sha256"] for base in (named, alone, told)}) == 1


@pytest.mark.parametrize("write", [moco, moco_encoder])
def test_mocos_small_model_has_twelve_heads_on_every_way_in(write: Callable[..., Any], tmp_path: Path) -> None:
    path = saved(tmp_path / "moco.pth", write(state_of("vit_small_patch16_224", **SHORT)))
    for name, file in (("timm:vit_small_patch16_224", path), (str(path), None)):
        base = load_base(name, file, grid=4, k=2, last_layers=1, given=Given(args=SHORT))
        assert (base.num_heads, base.identity["model_args"]) == (12, {"depth": 1, "num_heads": 12})
        assert facts_of(base)["heads"] == ("12", "MoCo v3's")
    with pytest.raises(ConfigError, match=r"--base-arg says num_heads = 6, MoCo v3 of width 384 has 12"):
        load_base("timm:vit_small_patch16_224", path, grid=4, given=Given.of(None, None, SHORT | {"num_heads": 6}))


CONTRADICTIONS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "a name of ours": ("dino", mae, "weights of MAE, and DINO's were named"),
    "a tag of timm's": ("timm:vit_base_patch16_224.mae", dino, "weights of DINO, and MAE's were named"),
    "a tag's statistics": (
        "timm:vit_base_patch16_224.augreg_in21k",
        mae_encoder,
        "says mean = 0.5, 0.5, 0.5, MAE's is",
    ),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_weights_of_another_release_than_was_named_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, write, message = CONTRADICTIONS[kind]
    path = saved(tmp_path / "other.pth", write(state_of("vit_tiny_patch16_224", **SHORT)))
    read, source = read_weights(path), find_source(name, path)
    made = outline("vit_base_patch16_224", SHORT, name)
    with pytest.raises(TecCacheError, match=message):
        settle(source, read.release, read.num_heads, Given(), made)


def test_of_dino_and_ibot_either_name_will_do() -> None:
    made = outline("vit_base_patch16_224", SHORT, "ibot")
    assert settle(find_source("ibot", None), "dino", None, Given(), made).mean == IMAGENET_MEAN


def test_dinov3s_satellite_models_keep_their_own_statistics() -> None:
    source = find_source("timm:vit_large_patch16_dinov3.sat493m", None)
    made = outline(source.architecture, SHORT, "x")
    assert settle(source, "dinov3", 16, Given(), made).mean == (0.43, 0.411, 0.296)
    assert settle(find_source("timm:vit_large_patch16_dinov3", "f"), "dinov3", 16, Given(), made).mean == IMAGENET_MEAN
    with pytest.raises(ConfigError, match="the file's own positions say 8"):
        settle(find_source("timm:vit_large_patch16_dinov3", "f"), "dinov3", 8, Given(args={"num_heads": 16}), made)


NATIVE = [name for name in timm.list_models("vit*clip*", pretrained=True)
          if (config := timm.models.get_pretrained_cfg(name)) and config.notes and "quickgelu" not in name]  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_weights_that_timm_notes_as_quickgelu_get_its_class(name: str) -> None:
    source = find_source(f"timm:{name}", "clip.safetensors")
    model = outline(source.architecture, SHORT, name)
    assert hidden_shape(model)["activation"] == "quick_gelu"
    assert "QuickGELU" in source.notes[0]
    facts = settle(source, None, None, Given(), model).facts
    assert next(fact.value for fact in facts if fact.name == "note") == source.notes[0]
    assert "quickgelu" in facts[-1].value


def test_openais_clip_computes_quickgelu_whatever_name_it_has(tmp_path: Path) -> None:
    small = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    file = tmp_path / "clip.safetensors"
    save_file(state_of("vit_base_patch16_clip_224", **small), file)
    kinds = ("clip_224.openai", "clip_quickgelu_224.openai", "clip_224.laion2b")
    base, true, plain = (
        load_base(f"timm:vit_base_patch16_{kind}", file, grid=2, k=None, given=Given(args=small)) for kind in kinds
    )
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(base(images).features, true(images).features)
    assert not torch.allclose(base(images).features, plain(images).features)
    assert base.identity == true.identity
    assert [hidden_shape(b.model)["activation"] for b in (base, plain)] == ["quick_gelu", "gelu"]


def test_every_named_base_is_of_a_release_that_agrees_with_timm() -> None:
    for name, recipe in BASES.items():
        release = RELEASES[recipe.release]
        model: Any = outline(recipe.timm_name.partition(".")[0], SHORT, name)
        assert release.heads[model.embed_dim] == model.blocks[0].attn.num_heads, name
        assert hidden_shape(model)["activation"] in ("", release.activation) or release.activation is None, name
        if recipe.hub:
            config, source = timm.models.get_pretrained_cfg(recipe.timm_name), find_source(name, None)
            assert config is not None
            assert (config.mean, config.std) == (source.mean, source.std), name


# Arguments


@pytest.mark.parametrize(
    ("args", "message"),
    [({"num_heads": 0}, "num_heads"), ({"checkpoint_path": "x"}, "checkpoint_path"), ({"img_size": 32}, "--grid"),
     ({"num_classes": 5}, "no head"), ({"act_layer": "os.system"}, "act_layer"), ({"norm_eps": 0}, "norm_eps")],
)  # fmt: skip
def test_arguments_that_cannot_be_meant_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Given.of(None, None, args)


@pytest.mark.parametrize(("mean", "std"), [((0.1, 0.2), None), (None, (0.1, 0.0, 0.2)), ((float("nan"),) * 3, None)])
def test_statistics_that_cannot_be_meant_are_refused(mean: Any, std: Any) -> None:
    with pytest.raises(ConfigError, match=r"--(mean|std)"):
        Given.of(mean, std, {})


def test_an_argument_changes_what_no_shape_shows_and_the_identity(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.pth", state_of("vit_tiny_patch16_224", depth=2))
    given = Given.of(None, None, {"depth": 2, "num_heads": 6, "act_layer": "quick_gelu", "norm_eps": 1e-3})
    base = load_base("timm:vit_tiny_patch16_224", file, grid=4, k=2, given=given)
    assert hidden_shape(base.model) == {"heads": 6, "activation": "quick_gelu", "norm eps": [1e-3]}
    assert base.identity["model_args"] == given.args
    facts = facts_of(base)
    assert [facts[name][1] for name in ("heads", "activation", "norm eps")] == ["--base-arg"] * 3
    plain = load_base("timm:vit_tiny_patch16_224", file, grid=4, k=2, given=Given(args={"depth": 2}))
    images = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(base(images).features, plain(images).features)


def test_an_argument_against_the_folder_is_a_contradiction(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"--base-arg num_heads=6 contradicts config\.json, which says 3"):
        load_base(str(tiny_base), grid=4, given=Given.of(None, None, {"num_heads": 6}))


def test_a_student_with_other_heads_does_not_start_from_a_base() -> None:
    base = outline("vit_tiny_patch16_224", {}, "base")
    with pytest.raises(WeightsError, match="heads 6, the base's 3"):
        require_alike(base, outline("vit_tiny_patch16_224", {"num_heads": 6}, "student"), "base")
    require_alike(base, outline("vit_tiny_patch16_224", {}, "student"), "base")


# Commands


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos/a").mkdir(parents=True)
    for number in range(6):
        photo(number).save(tmp_path / f"photos/a/{number}.jpg")
    return tmp_path / "photos"


def test_extract_says_what_it_assumes_keeps_it_and_goes_on_with_it(photos: Path, tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    told: dict[str, Any] = {"mean": (0.1, 0.2, 0.3), "base_args": {"act_layer": "quick_gelu"}, "name": "set"}
    config = tiny_config(photos, tmp_path / "c", base, **told)
    dry = extract(config, dry_run=True)
    summary = extract(config)
    assert dry.facts == summary.facts
    text = extract_text(summary, False, config, True)
    for line in ("mean        0.1, 0.2, 0.3  (--mean)", "std         0.2, 0.25, 0.3  (config.json)",
                 "activation  quick_gelu  (--base-arg)", "rows of the class token and of its top 3  (--k)",
                 "source       single files, taken as 1 shard", "32 x 32: 4 x 4 patches of 8, class"):  # fmt: skip
        assert line in text
        assert line.startswith("source") or line in info_text(describe_cache(str(tmp_path / "c")))
    # one more view, without a word of the base
    more = ExtractConfig(input=str(photos), cache=str(tmp_path / "c"), name="set", views=3, device="cpu", threads=1)
    assert extract(more).facts == summary.facts
    with pytest.raises(ConfigError, match=r"mean"):
        extract(tiny_config(photos, tmp_path / "c", base, **(told | {"mean": (0.1, 0.2, 0.4)})))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["extract", "p", "--cache", "c", "--base", "mae", "--mean", "0.5", "0.5"], "--mean"),
        (["extract", "p", "--cache", "c", "--views-only", "--mean", "0.5", "0.5", "0.5"], "--mean"),
        (["extract", "p", "--cache", "c", "--base", "mae", "--std", "1", "0", "1"], "--std"),
        (["extract", "p", "--cache", "c", "--base", "mae", "--base-arg", "checkpoint_path=x.pth"], "checkpoint_path"),
        (["train", "--cache", "c", "--out", "r", "--base-arg", "depth=3"], "--online"),
        (["probe", "mae", "--train", "a", "--test", "b", "--base-arg", "depth"], "NAME=VALUE"),
    ],
)
def test_the_command_line_refuses_what_is_not_used_or_cannot_be_meant(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    monkeypatch.chdir(tmp_path)  # a cache that is begun and refused leaves its lock
    result = CliRunner().invoke(cli, words)
    error = result.exception
    assert result.exit_code == 2 or (isinstance(error, TecCacheError) and error.exit_code == 2)
    assert message in result.output + str(error)


def test_the_options_of_every_command_that_loads_a_base(photos: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    base, cache = write_tiny_base(tmp_path / "base"), tmp_path / "c"
    told = ["--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6", "--base-arg", "act_layer=quick_gelu"]
    run = CliRunner().invoke

    def done(*words: str) -> dict[str, Any]:
        result = run(cli, [*words, "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    shape = ["--views", "1", "--size", "32", "--grid", "4", "--k", "3", "--quality", "exact"]
    found = done("extract", str(photos), "--cache", str(cache), "--base", str(base), *shape, *told)
    assert ["mean", "0.1, 0.2, 0.3", "--mean"] in found["facts"]
    # verified as it was made, without a word; and said otherwise, it is another base
    assert done("verify", str(cache), "--base")["clean"]
    other = run(cli, ["verify", str(cache), "--base", "--mean", "0.3", "0.2", "0.1"])
    assert other.exit_code == 3
    assert "mean" in other.output
    student = [f"--student-arg={name}={value}" for name, value in TINY.items()]
    words = ["train", "--cache", str(cache), "--out", str(tmp_path / "r"), "--online", str(base), "--student",
             "vit_tiny_patch16_224", *student, "--batch-size", "2", "--epochs", "1", "--steps", "1",
             "--decoder-width", "32", "--decoder-heads", "4"]  # fmt: skip
    done(*words, *told)
    assert done(*words, *told)["steps"] == 1  # it goes on with the same words, and not with others
    assert done(*words)["steps"] == 1  # what is left out is the run's own
    assert run(cli, [*words, "--mean", "0.3", "0.2", "0.1"]).exit_code != 0
    settings = json.loads((tmp_path / "r" / "run.json").read_text())
    assert json.dumps(settings).count("quick_gelu") >= 2  # as it was given, and in the identity of the base
    done("probe", str(base), "--train", str(photos), "--test", str(photos), "--neighbours", "1", *told)
