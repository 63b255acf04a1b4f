"""Whether the machine has what a run needs: versions, a number format in hardware, a folder with room, text, a hub."""

import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import torch

from moelet.data import START, one_epoch
from moelet.errors import TemporaryError, UserError
from moelet.foresee.patient import FAULT, NOTE, OK, Finding, Patient
from moelet.foresee.sizes import empty_model, files
from moelet.precision import choose_dtype, cpu_has_bf16, product_seconds
from moelet.sections import SourceSettings

PYTHON = (3, 11)
WANTED = {  # pyproject.toml's, and a test says so
    "torch": "2.10", "numpy": "2", "sentencepiece": "0.2.2", "datasets": "5", "safetensors": "0.6", "pydantic": "2.11",
    "typer": "0.20", "rich": "14", "matplotlib": "3.10",
}  # fmt: skip
BF16_SINCE = (8, 0)  # compute capability; is_bf16_supported() says True on older cards, by slow emulation
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of /proc/cpuinfo, on x86 and Arm
SLOWER = 1.2  # bf16 products that take this many times as long as float32's are told of
HUB, SECONDS = "https://huggingface.co", 5.0


def versions(patient: Patient) -> Iterator[Finding]:
    """Whether Python and the packages are new enough."""
    wrong = [] if sys.version_info[:2] >= PYTHON else [f"Python {sys.version.split()[0]}, 3.11 is needed"]
    for package, least in WANTED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            wrong.append(f"{package} is missing")
            continue
        if _parts(found) < _parts(least):
            wrong.append(f"{package} {found}, {least} is needed")
    told = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    if wrong:
        yield Finding("versions", FAULT, "; ".join(wrong), "Run pip install -r requirements.txt")
    else:
        yield Finding("versions", OK, told)


def _parts(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3]]


def precision(patient: Patient) -> Iterator[Finding]:
    """Whether the format that each device would compute in is one that it has in hardware."""
    name = patient.hparams.train.precision
    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    for device in [torch.device("cpu"), *(torch.device("cuda", index) for index in cards)]:
        yield _format(name, device, used=device.type == patient.device.type)
    if patient.hparams.train.device == "cuda" and not cards:
        told = 'train.device is "cuda" and torch finds no card'
        yield Finding("precision", FAULT, told, 'Set train.device to "auto", or install a CUDA build of torch.')


def _format(name: str, device: torch.device, used: bool) -> Finding:
    what = f"precision of {device}"
    try:
        dtype = choose_dtype(name, device)
    except UserError as error:
        return Finding(what, FAULT if used else NOTE, str(error), 'Set train.precision to "auto".')
    found, remedy = str(dtype).removeprefix("torch."), 'Set train.precision to "fp16" on a card, to "fp32" on a CPU.'
    where = "this processor"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        where = f"a card of compute capability {capability[0]}.{capability[1]}"
        if dtype == torch.bfloat16 and capability < BF16_SINCE:
            return Finding(what, FAULT, f"bf16 would be emulated on {where}, which needs 8.0 for it", remedy)
    elif dtype == torch.bfloat16 and (reason := lost_on_cpu()) is not None:
        return Finding(what, FAULT, reason, remedy)
    if dtype != torch.float32:
        return Finding(what, OK, f"{found}, in hardware on {where}")
    return Finding(what, OK, f"float32 on {where}{_why_float32(name)}")


def _why_float32(name: str) -> str:
    """Return why it isn't a narrower format; "auto" takes one on any card."""
    if name != "auto":
        return f', as train.precision "{name}" says'
    if not cpu_has_bf16():
        return ", which has no products of bf16"
    narrow, wide = product_seconds(torch.bfloat16, torch.float32)
    return f": its bf16 products were timed and no faster (timed again: {narrow / wide:.2f} of float32's time)"


def lost_on_cpu() -> str | None:
    """Return why bf16 gains nothing on this processor, by its own flags and by the clock; None where it does."""
    flags = _flags()
    if flags is not None and not flags & BF16_FLAGS:
        return "bf16 would be emulated: the processor's flags have neither avx512_bf16, amx_bf16 nor bf16"
    narrow, wide = product_seconds(torch.bfloat16, torch.float32)
    if narrow > SLOWER * wide:
        return f"bf16 is slow or emulated here: its products take {narrow / wide:.1f} times as long as float32's"
    return None


def _flags() -> set[str] | None:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.split())
    return None


def folder(patient: Patient) -> Iterator[Finding]:
    """Whether the run's folder can be made, and whether its disk has room for the checkpoints."""
    hparams = patient.hparams
    target = Path(hparams.train.run or "runs").absolute()
    place = next(path for path in (target, *target.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=place) as made:
            (Path(made) / "file").write_bytes(b"written")
    except OSError as error:
        told = f"{target} can't be written: {place} refuses ({error.strerror})"
        yield Finding("run folder", FAULT, told, "Give another folder with --run or train.run, or change its owner.")
        return
    pieces = hparams.model.vocab_size or hparams.tokenizer.vocab_size
    needed = files(hparams, empty_model(hparams.model, pieces))["run"]
    free = shutil.disk_usage(place).free
    told = f"{free / 2**30:,.1f} GB free in {place}, a run of these settings keeps up to {needed / 2**30:,.2f} GB"
    if free < needed:
        yield Finding("run folder", FAULT, told, "Make room, lower train.keep_checkpoints, or give another folder.")
    else:
        yield Finding("run folder", OK, told)


def hub_sources(patient: Patient) -> list[SourceSettings]:
    """Return the sources of the settings that are datasets on the hub."""
    data = patient.hparams.data
    sources: list[SourceSettings] = [data, *data.parts]
    return [source for source in sources if source.source == "hub" and not os.path.exists(source.dataset or "")]


def hub(patient: Patient) -> Iterator[Finding]:
    """Whether the hub answers, and has the datasets that the settings name."""
    endpoint = os.environ.get("HF_ENDPOINT") or HUB
    sources = hub_sources(patient)
    state = FAULT if sources else NOTE
    told = "" if sources else "; these settings don't need it"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding("hub", state, f"HF_HUB_OFFLINE is set{told}", "Unset it to read from the hub.")
        return
    if (reason := _unreachable(endpoint)) is not None:
        remedy = "Check the network, a proxy (HTTPS_PROXY), or HF_ENDPOINT; or prepare the text elsewhere."
        yield Finding("hub", state, f"{endpoint} can't be reached ({reason}){told}", remedy)
        return
    for source in sources:
        if (reason := _refused(source)) is not None:
            remedy = "Check data.dataset and data.revision; for a gated one, accept its terms and run hf auth login."
            yield Finding("hub", FAULT, f"{source.dataset}: {reason}", remedy)
            return
    names = ", ".join(str(source.dataset) for source in sources)
    yield Finding("hub", OK, f"{endpoint} answers" + (f", and has {names}" if names else ""))


def _unreachable(endpoint: str) -> str | None:
    """Return why nobody answers at the endpoint, or at the proxy on the way to it; None where somebody does."""
    scheme = urlsplit(endpoint).scheme or "https"
    proxy = os.environ.get(f"{scheme}_proxy") or os.environ.get(f"{scheme.upper()}_PROXY")
    place = urlsplit(proxy or endpoint)
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname or "", port), SECONDS).close()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _refused(source: SourceSettings) -> str | None:
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(str(source.dataset), revision=source.revision, timeout=SECONDS)
    except Exception as error:  # whatever the client raises is a result to report
        return " ".join(str(error).split())[:200]
    return None


def text(patient: Patient) -> Iterator[Finding]:
    """Whether there is text, where it lies on this machine."""
    data = patient.hparams.data
    if hub_sources(patient):
        yield Finding("text", NOTE, "comes from the hub, and isn't read here")
        return
    try:
        windows = one_epoch(data.model_copy(update={"shuffle_window": 1}), 0, "all", START)
        found = sum(len(pieces) for pieces, _ in islice(windows, 1))
    except (UserError, TemporaryError, OSError) as error:
        yield Finding("text", FAULT, str(error), "Set data.files or data.source to text that is there.")
        return
    if found == 0:
        yield Finding("text", FAULT, f"{data.source} holds no text", "Set data.files or data.source to text.")
    else:
        yield Finding("text", OK, f"{data.source}: it can be read")
