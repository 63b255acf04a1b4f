"""Leads the real client, `datasets` and `huggingface_hub`, to a `hub_server.HubServer` and to nothing else."""

import inspect
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hub_server import HubServer

COPIED = ("ENDPOINT", "HF_HUB_CACHE", "HF_ASSETS_CACHE")  # constants that other modules copy at import


def hub_environment(hub: "HubServer", home: Path) -> dict[str, str]:
    """Return the variables with which a child process knows no other hub than this, and no cache but `home`."""
    caches = {"HF_HUB_CACHE": "hub", "HF_ASSETS_CACHE": "assets", "HF_DATASETS_CACHE": "datasets", "HF_HOME": ""}
    ones = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_IMPLICIT_TOKEN")
    zeros = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")  # the last would ask Amazon's S3
    return {
        "HF_ENDPOINT": hub.url,
        **{name: str(home / folder) for name, folder in caches.items()},
        **dict.fromkeys(ones, "1"),
        **dict.fromkeys(zeros, "0"),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1"),
    }


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: "HubServer", home: Path) -> None:
    """Lead this process to the hub, whatever it imported already: every constant is as in a new process."""
    import datasets
    from huggingface_hub import HfFileSystem, close_session, constants, hf_api, hf_file_system
    from huggingface_hub.utils import _detect_agent

    for name, value in hub_environment(hub, home).items():
        monkeypatch.setenv(name, value)
    for module in (constants, datasets.config):  # the second reads the first
        for name, value in runpy.run_path(str(module.__file__)).items():
            if isinstance(value, str | int | float | Path | frozenset) and not name.startswith("__"):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)  # it looks up the host datasets-server.127.0.0.1
    for module in [module for key, module in sys.modules.items() if key.startswith("huggingface_hub.")]:
        for name in set(COPIED) & set(vars(module)):
            monkeypatch.setattr(module, name, getattr(constants, name))
    for client in (hf_api.api, hf_file_system.hffs, hf_file_system.hffs._api):  # made at import
        monkeypatch.setattr(client, "endpoint", hub.url)
    monkeypatch.setattr(_detect_agent, "_registry", {})  # else the first request in a process asks for it
    hf_file_system.hffs.invalidate_cache()
    HfFileSystem.clear_instance_cache()
    close_session()


def without_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client of this process retry as often as ever but at once, and streams end without a sleep of 5 s.

    Call it after `use_hub`. A Retry-After header is still obeyed, with the client's second on top.
    """
    import datasets
    from huggingface_hub import utils

    for name in [name for name in vars(datasets.config) if name.endswith("RETRY_INTERVAL")]:
        monkeypatch.setattr(datasets.config, name, 0)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    function: Any
    for function in (utils.http_backoff, inspect.unwrap(utils.http_stream_backoff)):
        monkeypatch.setitem(function.__kwdefaults__, "base_wait_time", 0)  # of which the longer waits are multiples


def forget_what_is_known() -> None:
    """Have the client ask for everything again, as in a new process."""
    from huggingface_hub import HfFileSystem, hf_file_system

    hf_file_system.hffs.invalidate_cache()
    HfFileSystem.clear_instance_cache()
