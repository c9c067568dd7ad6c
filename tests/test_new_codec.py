"""A codec is one file and its line in `CODECS`: this file has one, which nothing else of the program has heard of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipelines.extract import extract
from pipelines.info import info
from pipelines.verify import verify
from tec_cache.cache.opening import open_cache
from tec_cache.codec import CODECS, ArraySpec, Making
from tec_cache.codec.common import centred, common_arrays, decode_common, encode_common
from tec_cache.errors import CacheError, ConfigError
from tec_cache.types import Targets, TargetSpec
from tests.conftest import tiny_config

LEVELS = 1000


@dataclass(frozen=True)
class SteppedCodec:
    """Integers of one step; the step is the fit."""

    step: float
    name = "stepped"

    def arrays(self, spec: TargetSpec) -> dict[str, ArraySpec]:
        logits = (spec.num_heads, spec.num_rows, spec.num_tokens)
        features = ArraySpec((spec.num_tokens, spec.channels), "int16")
        return {"features": features, "attention": ArraySpec(logits, "int16")} | common_arrays(spec)

    def encode(self, targets: Targets, spec: TargetSpec) -> dict[str, npt.NDArray[np.generic]]:
        assert targets.attention is not None
        values = {"features": targets.features, "attention": centred(targets.attention)}
        codes = {name: (value / self.step).round().cpu().numpy().astype(np.int16) for name, value in values.items()}
        return codes | encode_common(targets, spec)

    def decode(self, arrays: dict[str, torch.Tensor], spec: TargetSpec) -> Targets:
        features, attention = (arrays[name] * self.step for name in ("features", "attention"))
        return Targets(features, attention, *decode_common(arrays, spec, len(features), features.device))

    def to_bytes(self) -> bytes:
        return np.float64(self.step).tobytes()


def fit(targets: Targets, spec: TargetSpec, *, mse: float, kl: float | None) -> SteppedCodec:
    assert (mse, kl) == (0.01, 0.01)
    return SteppedCodec(float(targets.features.abs().max()) / LEVELS)


def read(parameters: bytes | None) -> SteppedCodec:
    if parameters is None or len(parameters) != 8:
        raise ValueError("not 8 bytes")
    return SteppedCodec(float(np.frombuffer(parameters, np.float64)[0]))


@pytest.fixture
def stepped(shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose targets are coded with it."""
    making = Making(f"{__name__}:read", f"{__name__}:fit", {"stepped": (0.01, 0.01)})
    monkeypatch.setitem(CODECS, "stepped", making)
    extract(tiny_config(shards, tmp_path / "cache", tiny_base, quality="stepped", name="tiny", limit=40, fit_views=8))
    return tmp_path / "cache"


def test_a_codec_of_one_file_codes_and_reads_targets(stepped: Path, made_cache: Path) -> None:
    cache, exact = open_cache(stepped), open_cache(made_cache)
    target, unit = cache["tiny"], cache.view_units[0]
    assert isinstance(target.codec, SteppedCodec)
    assert target.identity["codec"] == {"name": "stepped", "mse": 0.01, "kl": 0.01, "fit_views": 8}
    decoded, known = (
        of.decode({name: torch.from_numpy(a) for name, a in of.read_unit(of.record(unit)).items()})
        for of in (target, exact["tiny"])
    )
    assert (decoded.features - known.features).abs().max() <= 0.51 * target.codec.step + 2e-3  # the other's are halves
    assert torch.equal(decoded.rows, known.rows)
    assert info(str(stepped))["targets"]["tiny"]["quality"] == "stepped"
    assert not verify(str(stepped)).findings


def test_a_program_without_the_codec_says_so(stepped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CODECS, "stepped")
    with pytest.raises(CacheError, match="unknown codec 'stepped', known are exact, transform"):
        _ = open_cache(stepped)["tiny"]
    with pytest.raises(ConfigError, match="--quality stepped"):
        tiny_config(None, stepped, None, quality="stepped")
