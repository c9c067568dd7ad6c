"""A stranger's folder or file: nothing in it runs, opens another file, or asks for memory that its weights lack."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipelines.info import info
from pipelines.probe import probe
from tec_cache.base.load import load_base, native_grid, random_model
from tec_cache.base.source import find_source
from tec_cache.config import ProbeConfig
from tec_cache.errors import ConfigError, TecCacheError, WeightsError
from tec_cache.recipes import BASES
from tec_cache.weights.files import sha256_of_state
from tec_cache.weights.hub import hub_state
from tests.conftest import write_shards, write_tiny_base


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def changed(folder: Path, **fields: Any) -> Path:
    """Change fields of a folder's config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


ARGUMENTS: dict[str, Callable[[Path], Any]] = {
    "checkpoint_path": lambda evil: str(evil),
    "pretrained_cfg": lambda evil: {"file": str(evil)},
    "pretrained_cfg_overlay": lambda evil: {"file": str(evil), "custom_load": True},
    "pretrained": lambda evil: True,
    "cache_dir": lambda evil: str(evil.parent),
    "scriptable": lambda evil: True,
    "weight_init": lambda evil: "skip",
    "block_fn": lambda evil: "os.system",
    "embed_layer": lambda evil: "builtins.exec",
    "mlp_layer": lambda evil: {"__class__": "os.system"},
    "__init__": lambda evil: "x",
    "act_layer": lambda evil: "os.system",
    "features_only": lambda evil: True,
    "use_naflex": lambda evil: True,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_other_argument_reaches_timm_and_no_pickle_is_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, evil = tmp_path / "executed", tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps(Attack(marker)))
    folder = write_tiny_base(tmp_path / "base")
    args = json.loads((folder / "config.json").read_text())["model_args"]
    changed(folder, model_args=args | {name: ARGUMENTS[name](evil)})
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(timm, "create_model", lambda *a, **kwargs: seen.append(kwargs))
    for use in (lambda: load_base(str(folder), grid=4), lambda: native_grid(str(folder)),
                lambda: random_model(str(folder), grid=4)):  # fmt: skip
        with pytest.raises(ConfigError, match=name) as error:
            use()
        assert "config.json" in error.value.where
    assert not seen
    assert not marker.exists()
    pickle.loads(evil.read_bytes())  # it would indeed have run
    assert marker.exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.pth", "model.pth"])
def test_a_pickle_in_a_folder_is_read_without_running_it(file: str, tmp_path: Path) -> None:
    folder, marker = write_tiny_base(tmp_path / "base"), tmp_path / "executed"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / file)
    assert load_base(str(folder), grid=4).identity["weights_sha256"] == sha256_of_state(state)
    torch.save({"model": state, "args": Attack(marker)}, folder / file)
    with pytest.raises(WeightsError, match="refused to unpickle"):
        load_base(str(folder), grid=4)
    assert not marker.exists()


@pytest.mark.parametrize(
    "architecture", ["hf-hub:someone/model", "local-dir:/tmp/x", "../x", "", 7, None, ["a"], "a" * 9999]
)
def test_an_architecture_is_a_name_of_timms_own(architecture: Any, tmp_path: Path) -> None:
    folder = changed(write_tiny_base(tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text()) | {"architecture": architecture}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="knows no model") as error:
        load_base(str(folder), grid=4)
    assert len(error.value.what) < 400


@pytest.mark.parametrize("name", ["timm:hf-hub:someone/model", "timm:hf_hub:someone/model", "timm:local-dir:FOLDER"])
def test_a_place_behind_timm_is_refused_and_the_folder_is_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match="--base FOLDER"):
        find_source(name, None)


HUGE: dict[str, dict[str, Any]] = {
    "an architecture of seven thousand million weights": {"architecture": "vit_7b_patch16_dinov3", "model_args": {}},
    "the widest that is allowed": {"model_args": {"embed_dim": 8192, "depth": 12, "num_heads": 8}},
    "the deepest that is allowed": {"model_args": {"embed_dim": 2048, "depth": 200, "num_heads": 8}},
    "too wide": {"model_args": {"embed_dim": 10**9}},
    "too many tokens": {"model_args": {"img_size": 4096, "patch_size": 1}},
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_model_that_its_weights_do_not_fill_is_refused_before_it_takes_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(write_tiny_base(tmp_path / "base"), **HUGE[kind])
    made: list[int] = []
    create = timm.create_model

    def counted(*args: Any, **kwargs: Any) -> Any:
        model = create(*args, **kwargs)
        made.append(sum(p.numel() for p in model.parameters() if p.device.type != "meta"))
        return model

    monkeypatch.setattr(timm, "create_model", counted)
    with pytest.raises(TecCacheError):
        load_base(str(folder), grid=4)
    assert sum(made) == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ("architecture", "model_args", "pretrained_cfg", "tec_cache", "model_type", "hidden_size", "patch_size",
          "image_size", "layer_norm_eps", "hidden_act", "num_attention_heads", "num_hidden_layers")  # fmt: skip


@settings(derandomize=True, max_examples=60, deadline=None)
@given(base=st.sampled_from(["timm", "vit", "dinov2", "dinov3_vit", "clip"]), field=st.sampled_from(FIELDS), value=JSON)
def test_any_value_in_a_configuration_is_used_or_refused(
    tmp_path_factory: pytest.TempPathFactory, base: str, field: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("configs")
    config: dict[str, Any] = {"model_type": base, "hidden_size": 48, "num_attention_heads": 3}
    if base == "timm":
        config = {"architecture": "test_vit", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    (folder / "model.safetensors").write_bytes(b"")
    message = "config.json"
    try:
        find_source(str(folder), None)
    except TecCacheError as error:
        message = str(error)
    assert "config.json" in message
    assert len(message) < 3000


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, '{"a": ' * 50_000, "\x00", '{"architecture": NaN}']
)
def test_a_configuration_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TecCacheError, match=r"config\.json"):
        load_base(str(tmp_path))


# Weights in several files


ELSEWHERE = ("../secret.safetensors", "/etc/secret.safetensors", "..", "a/b.safetensors", "a\\b.safetensors",
             ".hidden.safetensors", "model.safetensors.index.json", "")  # fmt: skip


@pytest.mark.parametrize("file", ELSEWHERE)
def test_an_index_names_files_beside_it_only(file: str, tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path / "base")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"cls_token": file}}))
    with pytest.raises(WeightsError, match="not a file beside it"):
        load_base(str(folder), grid=4)


def test_an_index_and_its_files_hold_the_same_tensors(tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path / "base")
    state = load_file(folder / "model.safetensors")
    names, half = sorted(state), len(state) // 2
    parts = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {name: file for file, part in parts.items() for name in part}
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index}))
    assert load_base(str(folder), grid=4).identity["weights_sha256"] == sha256_of_state(state)
    file.write_text(json.dumps({"weight_map": index | {"more": "a.safetensors"}}))
    with pytest.raises(WeightsError, match="'more' is in none of the files"):
        load_base(str(folder), grid=4)
    save_file(state, folder / "b.safetensors")
    file.write_text(json.dumps({"weight_map": index}))
    with pytest.raises(WeightsError, match="is in two files"):
        load_base(str(folder), grid=4)


# One model's weights beside another's configuration


def test_a_mixture_of_two_exports_is_refused_by_base_probe_and_info(tmp_path: Path) -> None:
    """Three heads for six: every shape fits."""
    folder = write_tiny_base(tmp_path / "base")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    settings_of = {"task": "pretrain", "config": {}, "targets": [{"kind": "pixels"}], "cache": "0" * 64}
    changed(folder, tec_cache={"model_sha256": digest, "step": 3, "settings": settings_of})
    assert load_base(str(folder), grid=4).num_heads == 3
    other = write_tiny_base(tmp_path / "other", seed=1, num_heads=6)
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    message = "config.json was written for other weights"
    with pytest.raises(WeightsError, match=message):
        load_base(str(folder), grid=4)
    photos = str(write_shards(tmp_path / "photos", [4]))
    with pytest.raises(WeightsError, match=message):
        probe(ProbeConfig(model=str(folder), train=photos, test=photos))
    with pytest.raises(WeightsError, match=message):
        info(str(folder))
    # weights that are given by hand are somebody's wish
    assert load_base(str(folder), other / "model.safetensors", grid=4).num_heads == 3


# timm's folders


def test_a_folder_of_timms_hub_needs_no_model_args(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 128, 128], "num_classes": 7}
    for config in ({"architecture": "test_vit", "pretrained_cfg": cfg}, {"architecture": "test_vit", **cfg}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        base = load_base(str(tmp_path), grid=4)
        assert (base.mean, base.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert base.identity["weights_sha256"] == sha256_of_state(state)
        assert native_grid(str(tmp_path)) == 8
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    origin = {name: origin for name, _, origin in load_base(str(tmp_path), grid=4).facts}["mean"]
    assert "for the folder does not say; --mean R G B" in origin


# The hub


@pytest.fixture
def _hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))


@pytest.mark.usefixtures("_hub")
@pytest.mark.parametrize("name", [name for name, recipe in BASES.items() if recipe.hub])
def test_where_the_hub_cannot_be_reached_it_is_asked_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        asked.append(args)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a retry"))
    begin = time.monotonic()
    with pytest.raises(WeightsError, match="could not be had from timm's hub") as error:
        hub_state(BASES[name].timm_name, todo=BASES[name].official_file)
    assert len(asked) <= 4  # one request, over whatever families of addresses there are
    assert time.monotonic() - begin < 30
    assert BASES[name].official_file in error.value.todo


@pytest.mark.usefixtures("_hub")
def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    forever = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: forever.wait(20))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    try:
        with pytest.raises(WeightsError, match=r"no answer within 0\.2 seconds"):
            hub_state("vit_base_patch16_224.mae", todo="")
    finally:
        forever.set()


@pytest.mark.usefixtures("_hub")
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_the_local_cache_are_found_without_asking_anybody(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("a name was looked up"))
    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    repository = tmp_path / "hub" / "models--timm--test_vit.r160_in1k"
    snapshot = repository / "snapshots" / "abc"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot.mkdir(parents=True)
    if file.endswith("bin"):
        torch.save(model.state_dict(), snapshot / file)
    else:
        save_file(model.state_dict(), snapshot / file)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    assert load_base("timm:test_vit.r160_in1k", grid=4).identity["weights_sha256"] == sha256_of_state(state)
    if file.endswith("bin"):
        marker = tmp_path / "executed"
        torch.save({"state_dict": model.state_dict(), "args": Attack(marker)}, snapshot / file)
        with pytest.raises(WeightsError, match="refused to unpickle"):
            load_base("timm:test_vit.r160_in1k", grid=4)
        assert not marker.exists()
