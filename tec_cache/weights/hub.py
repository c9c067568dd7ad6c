"""Weights through timm's hub: found in the local caches, else fetched, and within seconds said to be out of reach."""

from __future__ import annotations

import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from torch import Tensor

from tec_cache.errors import WeightsError
from tec_cache.weights.content import load_content

_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights in a repository of the hub, in timm's order."""


def hub_state(timm_name: str, *, todo: str) -> dict[str, Tensor]:
    """Return a model's pretrained weights under timm's names, without its classifier.

    A file in the local caches is taken without asking anybody. Otherwise the hub is asked once, through whatever
    proxy or endpoint is configured; where no answer comes within its own timeout (HF_HUB_ETAG_TIMEOUT, 10 seconds),
    or offline, that is an error at once, without the minute of retries. Whatever is fetched is read here, pickle-free.
    todo: the remedy. Raises WeightsError.
    """
    import timm

    config = timm.models.get_pretrained_cfg(timm_name)
    try:
        file = _file(config)
        overlay = {"state_dict": load_content(file), "custom_load": False}
        model = timm.create_model(timm_name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    except WeightsError:
        raise
    except Exception as error:
        # huggingface_hub, urllib and timm raise a dozen kinds of error for one fact: the weights are not here
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else type(error).__name__
        raise WeightsError(
            f"the weights of {timm_name} could not be had from timm's hub",
            details=[reason],
            where=timm_name,
            todo=todo,
        ) from error
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}


def _file(config: Any) -> Path:
    """Return the local file of a configuration's weights, fetching it where that is possible."""
    if config is None or not (config.hf_hub_id or config.url):
        raise FileNotFoundError("timm names no place for them")
    return _from_hub(config) if config.hf_hub_id else _from_url(config)


def _from_hub(config: Any) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = config.hf_hub_id.partition("@")
    how: dict[str, Any] = {"revision": revision or None}
    names = (config.hf_hub_filename,) if config.hf_hub_filename else _FILES
    for name in names:
        cached = hub.try_to_load_from_cache(repository, name, **how)
        if isinstance(cached, str):
            return Path(cached)
    _require_answer(hub.hf_hub_url(repository, names[0], **how))
    for name in names:
        try:
            return Path(hub.hf_hub_download(repository, name, **how))
        except EntryNotFoundError:
            if name == names[-1]:
                raise
    raise FileNotFoundError(repository)


def _from_url(config: Any) -> Path:
    from timm.models._hub import check_cached_file, download_cached_file

    if not check_cached_file(config.url):
        _require_answer(config.url if isinstance(config.url, str) else config.url[0])
    return Path(download_cached_file(config.url))


def _require_answer(url: str) -> None:
    """Ask once for a file's headers; raise where no answer comes in time.

    Any answer of a server will do, a refusal or a certificate that Python does not know too: the download, through the
    library that owns the place, then says what it is. In a thread, because looking up a name may wait far longer than
    any timeout says.
    """
    from huggingface_hub import constants

    seconds, failed = constants.HF_HUB_ETAG_TIMEOUT, list[BaseException]()
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            return
        except Exception as error:
            if not isinstance(getattr(error, "reason", error), ssl.SSLError):
                failed.append(error)

    thread = threading.Thread(target=ask, name="hub", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    if failed:
        raise failed[0]
