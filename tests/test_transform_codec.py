"""The transform codec: errors on unseen views, every shape of target, what is refused, what a reader has to do."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load
from torch.utils._python_dispatch import TorchDispatchMode

from tec_cache.codec import grid
from tec_cache.codec.errors import row_divergence, target_errors
from tec_cache.codec.fit import fit_transform
from tec_cache.codec.grid import dct_matrix, frequency_order, grid_dct
from tec_cache.codec.transform import MAX_JOINT_ROWS, TransformCodec
from tec_cache.errors import ConfigError, NonFiniteError
from tec_cache.targets import normalize_targets
from tec_cache.types import Targets, TargetSpec


def spec(k: Any = 3, rows: int = 4, columns: int | None = None, normalization: Any = "patch") -> TargetSpec:
    return TargetSpec(
        grid=rows, columns=columns, channels=48, num_heads=0 if k is None else 3, k=k, normalization=normalization
    )


def targets(s: TargetSpec, count: int, seed: int = 0) -> Targets:
    """Smooth over the grid, correlated over channels and rows, as a base's targets are; seeds share the statistics."""
    g = torch.Generator().manual_seed(1000 + seed)
    fixed = torch.Generator().manual_seed(7)
    waves = 1 / (1 + torch.arange(s.num_tokens)) ** 0.7

    def field(channels: int, hidden: int) -> torch.Tensor:
        mix = torch.randn(hidden, channels, generator=fixed) * (1 / (1 + torch.arange(hidden)) ** 0.5)[:, None]
        spectrum = torch.randn(count, s.num_tokens, hidden, generator=g) * waves[:, None] * 4
        return grid_dct(spectrum, s.grid_shape, inverse=True) @ mix

    features = field(s.channels, 32) + torch.randn(s.channels, generator=fixed) + 0.05
    if not s.num_rows:
        return normalize_targets(Targets(features), s.normalization)
    logits = field(s.num_heads * s.num_rows, 9).transpose(1, 2).unflatten(1, (s.num_heads, s.num_rows)) + 50
    if s.k == "all":
        rows = torch.arange(s.num_tokens).expand(count, -1)
    else:
        rows = torch.stack([torch.randperm(s.num_tokens, generator=g)[: s.num_rows - 1] for _ in range(count)])
    return normalize_targets(Targets(features, logits, rows), s.normalization)


@cache
def fitted(s: TargetSpec, mse: float = 0.04, kl: float = 0.03, count: int = 80) -> TransformCodec:
    return fit_transform(targets(s, count), s, mse=mse, kl=kl)


def tensors_of(codec: TransformCodec, t: Targets) -> dict[str, torch.Tensor]:
    """Encode, and check that the arrays are what `arrays` says."""
    arrays, declared = codec.encode(t, codec.spec), codec.arrays(codec.spec)
    assert {n: (a.shape, a.dtype.name) for n, a in arrays.items()} == {
        n: ((len(t.features), *d.shape), d.dtype) for n, d in declared.items()
    }
    assert all(sorted(d.order) == list(range(arrays[n].ndim)) for n, d in declared.items() if d.order)
    return {n: torch.from_numpy(a) for n, a in arrays.items()}


def there_and_back(codec: TransformCodec, t: Targets) -> Targets:
    return codec.decode(tensors_of(codec, t), codec.spec)


def rate(codec: TransformCodec, t: Targets) -> float:
    """Entropy of the codes' low bytes, bits each: what a compressor has to work with."""
    codes = tensors_of(codec, t)["features"][:, codec.features.wide :]
    p = torch.bincount(codes.flatten().int()) / codes.numel()
    return -float((p[p > 0] * p[p > 0].log2()).sum())


SHAPES = [
    spec(3),
    spec(0),
    spec(None),
    spec("all"),
    spec(5, rows=3, columns=6),
    spec(3, normalization="feature"),
    spec(3, normalization="none"),
]


@pytest.mark.parametrize("s", SHAPES, ids=str)
def test_unseen_views_keep_the_errors_asked_for(s: TargetSpec) -> None:
    codec, unseen = fitted(s), targets(s, 60, seed=1)
    found = target_errors(unseen, there_and_back(codec, unseen))
    assert 0.02 < found.mse <= 0.042
    if s.k is None:
        assert found.kl is None
    else:
        assert found.kl is not None
        assert 0.01 < found.kl <= 0.033


def test_the_last_quarter_of_the_sample_sets_the_step() -> None:
    """The basis does not see it. Ten times as strong here, it takes a ten times larger step."""
    s, t = spec(None), targets(spec(None), 80)
    t.features[60:] *= 10
    codec, last = fit_transform(t, s, mse=0.04), Targets(t.features[60:])
    assert 0.03 < target_errors(last, there_and_back(codec, last)).mse <= 0.04


def test_rows_come_back_in_their_order() -> None:
    for s in (spec(5), spec(2, rows=17, columns=16), spec("all")):
        t = targets(s, 8)
        assert torch.equal(there_and_back(fitted(s, count=8), t).rows, t.rows)  # type: ignore[arg-type]
    assert fitted(spec(5), count=8).arrays(spec(5))["rows"].dtype == "uint8"
    large = spec(2, rows=17, columns=16)
    assert fitted(large, count=8).arrays(large)["rows"].dtype == "uint16"


def test_a_smaller_error_costs_more_and_is_smaller() -> None:
    s, unseen = spec(3), targets(spec(3), 40, seed=1)
    found = []
    for mse, kl in ((0.003, 0.001), (0.02, 0.01), (0.1, 0.08), (0.3, 0.2)):
        codec = fitted(s, mse, kl)
        errors = target_errors(unseen, there_and_back(codec, unseen))
        found.append((errors.mse, errors.kl, -rate(codec, unseen)))
        assert errors.mse == pytest.approx(mse, rel=0.3)
        assert errors.kl == pytest.approx(kl, rel=0.5)
    assert all(a < b for x, y in pairwise(found) for a, b in zip(x, y, strict=True))  # type: ignore[operator]


def test_heads_alone_share_a_basis_where_there_are_too_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = spec("all"), targets(spec("all"), 24)
    assert s.num_heads * s.num_rows <= MAX_JOINT_ROWS
    monkeypatch.setattr("tec_cache.codec.transform.MAX_JOINT_ROWS", 10)
    codec = fit_transform(t, s, mse=0.04, kl=0.03)
    assert codec.attention is not None
    assert codec.attention.mean.shape == (3,)
    assert codec.arrays(s)["attention"].shape[0] == s.num_rows
    unseen = targets(s, 24, seed=1)
    found = target_errors(unseen, there_and_back(TransformCodec.from_bytes(codec.to_bytes()), unseen)).kl
    assert found is not None
    assert 0.01 < found < 0.035


def test_massive_activations_do_not_overflow() -> None:
    """One channel is 300 times the others at one token of a view, as in models without registers."""
    s = spec(None, normalization="none")
    t = targets(s, 60)
    t.features[torch.arange(60), torch.arange(60) % 16, 5] += 900.0
    codec = fit_transform(t, s, mse=1e-5, kl=None)
    assert codec.features.wide > 0
    back = there_and_back(codec, t)
    assert target_errors(t, back).mse <= 1e-5
    assert (back.features - t.features).abs().max() < 15


def test_a_view_beyond_the_range_gets_a_larger_step_and_leaves_the_others_alone() -> None:
    s = spec(3)
    codec, t = fitted(s), targets(s, 6, seed=1)
    plain = there_and_back(codec, t)
    assert t.attention is not None
    wild = Targets(t.features.clone(), t.attention.clone(), t.rows)
    wild.features[2] *= 3000.0
    wild.attention[4] *= 20_000.0  # type: ignore[index]
    arrays = tensors_of(codec, wild)
    gain = arrays["gain"]
    assert gain[2, 0] > 1
    assert gain[4, 1] > 1
    assert (gain > 1).sum() == 2
    back = codec.decode(arrays, s)
    assert torch.equal(back.features[[0, 1, 3, 4, 5]], plain.features[[0, 1, 3, 4, 5]])
    # its error relative to itself is no larger than half a step in 127
    assert target_errors(_one(wild, 2), _one(back, 2)).mse < 0.04
    assert (back.attention[4] - wild.attention[4] + 20_000 * 50).isfinite().all()  # type: ignore[index]


def test_what_is_not_finite_is_refused() -> None:
    s = spec(3)
    for part, view, value in (("features", 1, math.nan), ("attention", 7, math.inf), ("features", 7, -math.inf)):
        t = targets(s, 8)
        getattr(t, part)[view, 1, 1] = value
        with pytest.raises(NonFiniteError):
            fitted(s).encode(t, s)
        with pytest.raises(NonFiniteError):
            fit_transform(t, s, mse=0.04, kl=0.03)


@pytest.mark.parametrize(("mse", "kl"), [(0.0, 0.03), (1.5, 0.03), (0.04, None), (0.04, 0.0), (1e-12, 0.03)])
def test_errors_that_cannot_be_reached_are_refused(mse: float, kl: float | None) -> None:
    with pytest.raises(ConfigError):
        fit_transform(targets(spec(3), 8), spec(3), mse=mse, kl=kl)


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_few_views_fit(count: int) -> None:
    s = spec(3)
    codec = fit_transform(targets(s, count), s, mse=0.04, kl=0.03)
    unseen = targets(s, 40, seed=1)
    assert target_errors(unseen, there_and_back(codec, unseen)).mse < (0.06 if count > 3 else 0.7)


def test_constant_targets_come_back() -> None:
    s = spec(0)
    t = Targets(torch.zeros(6, 16, 48), torch.full((6, 3, 1, 16), 7.0), torch.empty(6, 0, dtype=torch.int64))
    back = there_and_back(fit_transform(t, s, mse=0.04, kl=0.03), t)
    assert back.features.abs().max() == 0
    assert back.attention is not None
    assert back.attention.abs().max() == 0


def test_half_precision_samples_fit_the_same() -> None:
    s, t = spec(3), targets(spec(3), 40)
    assert t.attention is not None
    half = Targets(t.features.half(), (t.attention - 50).half(), t.rows)
    codec = fit_transform(half, s, mse=0.04, kl=0.03)
    assert codec.features.step == pytest.approx(fit_transform(t, s, mse=0.04, kl=0.03).features.step, rel=0.01)


def test_the_same_sample_gives_the_same_bytes() -> None:
    s = spec(3)
    first = fit_transform(targets(s, 40), s, mse=0.04, kl=0.03)
    assert first.to_bytes() == fit_transform(targets(s, 40), s, mse=0.04, kl=0.03).to_bytes()


def test_bytes_make_the_same_codec() -> None:
    for s in (spec(3), spec(None), spec(5, rows=3, columns=6)):
        codec, t = fitted(s), targets(s, 5, seed=1)
        data = codec.to_bytes()
        again = TransformCodec.from_bytes(data)
        assert again.to_bytes() == data
        assert (again.spec, again.mse, again.kl) == (codec.spec, codec.mse, codec.kl)
        ours, theirs = codec.encode(t, s), again.encode(t, s)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
        arrays = {name: torch.from_numpy(a) for name, a in ours.items()}
        assert torch.equal(codec.decode(arrays, s).features, again.decode(arrays, s).features)


def _changed(data: bytes, **changes: Any) -> bytes:
    """Change entries of the JSON; a dotted name reaches inside."""
    from safetensors.torch import save

    about = _about(data)
    for name, value in changes.items():
        inner, place = name.split("__"), about
        for key in inner[:-1]:
            place = place[key]
        place[inner[-1]] = value
    return save(load(data), {"codec": json.dumps(about)})


def _about(data: bytes) -> dict[str, Any]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["codec"])  # type: ignore[no-any-return]


def test_garbage_is_refused() -> None:
    from safetensors.torch import save

    data = fitted(spec(3)).to_bytes()
    about, tensors = json.dumps(_about(data)), load(data)
    assert TransformCodec.from_bytes(_changed(data)).to_bytes() == data  # the helper itself does no harm
    wrong = {
        "empty": b"",
        "text": b"not a codec at all",
        "cut": data[:-5],
        "no metadata": save(tensors),
        "not JSON": save(tensors, {"codec": "{"}),
        "not an object": save(tensors, {"codec": "[]"}),
        "version": _changed(data, version=2),
        "name": _changed(data, name="int8"),
        "one more entry": _changed(data, more=1),
        "step": _changed(data, features__step=0.0),
        "step is text": _changed(data, features__step="1"),
        "wide": _changed(data, features__wide=10**6),
        "low": _changed(data, attention__low=-1),
        "attention is missing": _changed(data, attention=None),
        "spec": _changed(data, spec__channels=47),
        "spec is text": _changed(data, spec="x"),
        "a tensor is missing": save({n: t for n, t in tensors.items() if n != "attention.mean"}, {"codec": about}),
        "a tensor more": save(tensors | {"x": torch.zeros(1)}, {"codec": about}),
        "not finite": save(tensors | {"features.mean": tensors["features.mean"] * math.nan}, {"codec": about}),
        "dtype": save(tensors | {"features.mean": tensors["features.mean"].double()}, {"codec": about}),
        "not orthonormal": save(tensors | {"features.basis": tensors["features.basis"] * 1.1}, {"codec": about}),
        "a place twice": save(tensors | {"features.scan": tensors["features.scan"] * 0}, {"codec": about}),
        "a place outside": save(tensors | {"features.scan": tensors["features.scan"] + 700}, {"codec": about}),
        "frequencies": save(tensors | {"frequencies": tensors["frequencies"] * 0}, {"codec": about}),
    }
    for what, bad in wrong.items():
        with pytest.raises(ValueError, match="transform codec"):
            raise AssertionError(f"{what} was read: {TransformCodec.from_bytes(bad)}")


def test_another_spec_is_refused() -> None:
    codec, other = fitted(spec(3)), spec(2)
    with pytest.raises(ConfigError, match="fitted for"):
        codec.encode(targets(other, 2), other)
    with pytest.raises(ConfigError, match="fitted for"):
        codec.decode(tensors_of(codec, targets(spec(3), 2)), other)
    with pytest.raises(ConfigError, match="fitted for"):
        codec.arrays(other)


def test_some_views_decode_as_among_all() -> None:
    s = spec(3)
    codec, t = fitted(s), targets(s, 9, seed=1)
    arrays = tensors_of(codec, t)
    whole = codec.decode(arrays, s)
    for part in ([3], [8, 0, 3]):
        some = codec.decode({name: a[part] for name, a in arrays.items()}, s)
        assert torch.allclose(some.features, whole.features[part], atol=1e-5)
        assert some.attention is not None
        assert whole.attention is not None
        assert torch.allclose(some.attention, whole.attention[part], atol=1e-5)
        assert torch.equal(some.rows, whole.rows[part])  # type: ignore[arg-type, index]


def rebuild(data: bytes, codes: npt.NDArray[np.uint8], gain: float, name: str) -> Any:
    """Decode one view in numpy from the file and the documented mathematics alone: (L, M)."""
    about, tensors = _about(data), {n: t.double().numpy() for n, t in load(data).items()}
    mean, basis, scan = (tensors[f"{name}.{part}"] for part in ("mean", "basis", "scan"))
    wide, low, step = (about[name][part] for part in ("wide", "low", "step"))
    folded = codes[wide:].astype(np.int64)
    folded[:wide] += 256 * codes[:wide].astype(np.int64)
    levels = np.where(folded % 2 == 0, folded // 2, -(folded + 1) // 2)
    rows, columns = about["spec"]["grid"], about["spec"]["columns"] or about["spec"]["grid"]
    y = np.zeros(rows * columns * len(mean))
    y[scan.astype(int)] = levels * step * gain
    y = y.reshape(rows * columns, len(mean))
    y[:low], y[low:] = y[:low] @ basis[0], y[low:] @ basis[1]
    grid = np.zeros_like(y)
    grid[tensors["frequencies"].astype(int)] = y

    def waves(n: int) -> Any:
        u, x = np.arange(n)[:, None], np.arange(n)[None]
        scale = np.where(u == 0, np.sqrt(1 / n), np.sqrt(2 / n))
        return scale * np.cos(np.pi * (2 * x + 1) * u / (2 * n))

    values = np.einsum("ur,vc,uvm->rcm", waves(rows), waves(columns), grid.reshape(rows, columns, -1))
    return values.reshape(rows * columns, -1) + mean


@pytest.mark.parametrize("s", [spec(3), spec(5, rows=3, columns=6, normalization="none")], ids=str)
def test_numpy_decodes_the_same(s: TargetSpec) -> None:
    codec, t = fitted(s, 0.004, 0.002), targets(s, 4, seed=1)
    t.features[1] *= 500.0  # this one has a gain
    arrays, data = codec.encode(t, s), codec.to_bytes()
    back = codec.decode({name: torch.from_numpy(a) for name, a in arrays.items()}, s)
    assert codec.features.wide > 0
    assert arrays["gain"][1, 0] > 1
    for i in range(4):
        features = rebuild(data, arrays["features"][i], arrays["gain"][i, 0], "features")
        assert np.abs(features - back.features[i].numpy()).max() <= 1e-5 * max(1.0, np.abs(features).max())
        logits = rebuild(data, arrays["attention"][i], arrays["gain"][i, 1], "attention")
        assert back.attention is not None
        theirs = back.attention[i].flatten(0, 1).numpy().T
        assert np.abs(logits - theirs).max() <= 1e-5 * max(1.0, np.abs(logits).max())


def test_golden_codes_decode() -> None:
    """Version 1 on disk: a file and codes made by hand, and what they must mean for ever."""
    from safetensors.torch import save

    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    tensors = {
        "frequencies": torch.tensor([0, 2, 1, 3], dtype=torch.int32),
        "features.mean": torch.tensor([10.0, 20.0]),
        "features.basis": torch.stack([torch.eye(2), swap]),
        "features.scan": torch.tensor([0, 3, 4], dtype=torch.int32),
        "features.deviation": torch.tensor([9.0, 2.0, 1.0]),
    }
    layout = {"grid": 2, "columns": None, "channels": 2, "num_heads": 0, "k": None, "normalization": "none"}
    about = {"name": "transform", "version": 1, "spec": layout, "mse": 0.5, "kl": None, "attention": None}
    about["features"] = {"low": 1, "step": 2.0, "wide": 1}
    codec = TransformCodec.from_bytes(save(tensors, {"codec": json.dumps(about)}))
    codes = torch.tensor([[1, 4, 3, 2], [0, 0, 0, 1]], dtype=torch.uint8)  # levels 130, -2, 1 and 0, 0, -1
    found = codec.decode({"features": codes, "gain": torch.tensor([[1.0], [2.0]])}, codec.spec).features
    # 260 on the mean of channel 0; -4 on the wave down the rows (frequency 2), whose second component is channel
    # 0; 2 on the wave along the columns (frequency 1), whose first component is channel 1
    expected = torch.tensor(
        [[[138.0, 21], [138, 19], [142, 21], [142, 19]], [[10.0, 18], [10, 22], [10, 18], [10, 22]]]
    )
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_transform_is_orthonormal_and_sorted() -> None:
    for n in (1, 2, 7, 14):
        assert torch.allclose(dct_matrix(n) @ dct_matrix(n).T, torch.eye(n), atol=1e-6)
    x = torch.randn(2, 18, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(grid_dct(grid_dct(x, (3, 6)), (3, 6), inverse=True), x, atol=1e-5)
    assert frequency_order((2, 2)).tolist() == [0, 1, 2, 3]
    assert frequency_order((2, 4)).tolist() == [0, 1, 2, 4, 5, 6, 3, 7]  # a row of 4 waves half as fast as one of 2


def test_codes_are_sorted_by_deviation_and_compress() -> None:
    codec, t = fitted(spec(3)), targets(spec(3), 40, seed=1)
    assert (codec.features.deviation.diff() <= 0).all()
    codes = tensors_of(codec, t)["features"][:, codec.features.wide :].float()
    third = codes.shape[1] // 3
    assert codes[:, :third].mean() > 2 * codes[:, -third:].mean()


def test_errors_are_what_they_say() -> None:
    exact = Targets(torch.tensor([[[3.0, 1.0]], [[1.0, 3.0]]]), torch.zeros(2, 1, 1, 2), None)
    decoded = Targets(torch.tensor([[[3.0, 2.0]], [[1.0, 3.0]]]), torch.tensor([[[[0.0, 0.0]]], [[[0.0, 2.0]]]]))
    found = target_errors(exact, decoded)
    assert found.mse == 0.25, "the energy is about the channels' means"
    assert found.mse_of_views.tolist() == [0.5, 0.0]
    expected = math.log((1 + math.exp(2)) / 2) - 1  # KL(1/2, 1/2 || softmax(0, 2))
    assert found.kl_of_views.tolist() == pytest.approx([0.0, expected])
    assert found.kl == pytest.approx(expected / 2)
    found.add(exact, decoded)
    assert (len(found.mse_of_views), found.mse) == (4, 0.25)
    assert row_divergence(torch.tensor([0.0, 4.0]), torch.tensor([7.0, 11.0]), tau=1.8) == pytest.approx(0, abs=1e-12)


def _one(t: Targets, i: int) -> Targets:
    return Targets(t.features[i : i + 1])


def test_decoding_keeps_its_parameters_per_device() -> None:
    codec = fitted(spec(3))
    device = torch.device("meta")
    moved = codec.features.to(device)
    assert moved is codec.features.to(device)
    assert moved.mean.device == device
    assert codec.features.to(torch.device("cpu")) is codec.features


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute; on a GPU each is a kernel or more. Views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("s", [spec(3), spec(5, normalization="none"), spec("all")], ids=str)
def test_what_depends_on_the_codec_alone_is_computed_once(s: TargetSpec) -> None:
    """The dead zone alone is 180 operations a tensor; a batch takes 77."""
    codec, t = TransformCodec.from_bytes(fitted(s, 0.004, 0.002).to_bytes()), targets(s, 8, seed=1)
    arrays = tensors_of(codec, t)
    codec.decode(arrays, s)
    with Operations() as encoding:
        codec.encode(t, s)
    assert encoding.counts.total() <= 90
    assert not [name for name in encoding.counts if name.split(".")[1] in ("exp", "log2", "full", "full_like")]
    with Operations() as decoding:
        codec.decode(arrays, s)
    assert not [n for n in decoding.counts if n.split(".")[1] in ("sort", "argsort", "scatter_reduce_", "new_full")]


@pytest.mark.parametrize("mse", [0.04, 0.004, 1e-5])
def test_products_of_half_precision_are_far_below_the_quantization(mse: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; with codes of two bytes too."""
    s = spec(3)
    codec, t = fitted(s, mse, mse), targets(s, 16, seed=1)
    assert (codec.features.wide > 0) == (mse < 0.04)
    arrays = tensors_of(codec, t)
    exact = codec.decode(arrays, s)
    monkeypatch.setattr(grid, "product_dtype", lambda device: torch.float16)
    half = TransformCodec.from_bytes(codec.to_bytes()).decode(arrays, s)
    assert not torch.equal(half.features, exact.features)
    errors = target_errors(exact, half)
    assert errors.mse < 1e-6
    assert errors.kl is not None
    assert errors.kl < 1e-5
    # the largest codes there can be, all of one sign
    arrays["features"] = torch.full_like(arrays["features"], 255)
    assert TransformCodec.from_bytes(codec.to_bytes()).decode(arrays, s).features.isfinite().all()
