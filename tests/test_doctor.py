"""`moelet doctor`: planted faults are found, each by its name; a healthy machine has none."""

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinySettings, needs_kernels
from torch import nn

from moelet import attention, moe, precision
from moelet.cli import main
from moelet.foresee import checks_kernels, checks_machine, doctor
from moelet.foresee.doctor import CHECKS, examine
from moelet.foresee.patient import Finding, Patient
from moelet.hparams import Hparams, make_hparams, read_hparams
from moelet.kernels import native
from moelet.modelling import GPT

ROOT = Path(__file__).parent.parent
RECIPES = [ROOT / "hparams.json", *sorted((ROOT / "recipes").glob("*.json"))]
HERE = [name for name in CHECKS if name not in ("kernels", "hub")]  # the others start a process, and use the network


@pytest.fixture
def hparams(tiny_settings: TinySettings, tmp_path: Path) -> Hparams:
    return make_hparams(tiny_settings(train={"run": str(tmp_path / "run")}))


def faults(hparams: Hparams, names: list[str] = HERE) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(hparams, names) if finding.state == "fault"}


# a healthy machine


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_healthy_machine_has_no_fault(recipe: Path) -> None:
    """With the settings of every recipe; but for text and cards that aren't on this machine."""
    changes = ['data.source="embedded"', "train.device=cpu", "data.mix=null"]
    assert faults(read_hparams(recipe, changes)) == {}


def test_every_part_of_a_model_is_looked_at(tiny_settings: TinySettings) -> None:
    parts = {"positions": "rope", "qk_norm": True, "shared_expert": 32, "bigram_rows": 50, "smear": True}
    parts |= {"value_residual": True, "embed_residual": True, "zero_init": True, "activation": "swiglu"}
    everything = tiny_settings(model=parts | {"selection_bias": True}, balance={"bias_rate": 0.01})
    assert faults(make_hparams(everything)) == {}
    dense = tiny_settings(model={"n_experts": 1, "top_k": 1}, train={"precision": "auto"})
    assert faults(make_hparams(dense)) == {}


# planted: each is found, and under its name


def test_a_leaking_mask_is_found(hparams: Hparams, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the way of computing attention that has it, also where `auto` takes another."""
    right = attention.causal_mask

    def leaking(n_queries: int, n_keys: int, segments: Any, device: torch.device) -> torch.Tensor:
        return right(n_queries, n_keys, segments, device) | torch.ones(
            n_queries, n_keys, dtype=torch.bool, device=device
        ).tril(n_keys - n_queries + 1).triu(n_keys - n_queries + 1)

    monkeypatch.setattr(attention, "causal_mask", leaking)
    found = faults(hparams)
    assert "causality" in found and set(found) <= {"causality", "parity of attention", "parity of decoding"}
    assert "'explicit' sees later tokens" in found["causality"].told and "Don't train" in str(found["causality"].remedy)


def test_documents_that_see_each_other_are_found(hparams: Hparams, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.causal_mask
    monkeypatch.setattr(attention, "causal_mask", lambda a, b, segments, device: right(a, b, None, device))
    assert "sees other documents" in faults(hparams, ["causality"])["causality"].told


def test_an_evicting_expert_is_found(hparams: Hparams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capacity: the last tokens decide which of the earlier ones keep their expert."""
    right = moe.Experts.forward

    def with_capacity(
        self: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *beside: Any
    ) -> torch.Tensor:
        place = torch.arange(ids.numel()).view_as(ids).flip(0)  # later ones first
        kept = torch.zeros_like(weights)
        for expert in range(self.up_proj.shape[0]):
            mine = (ids == expert).nonzero()
            first = mine[place[mine[:, 0], mine[:, 1]].argsort()][: ids.numel() // self.up_proj.shape[0] // 2]
            kept[first[:, 0], first[:, 1]] = 1
        return right(self, x, ids, weights * kept, *beside)

    monkeypatch.setattr(moe.Experts, "forward", with_capacity)
    assert "change what the model says before them" in faults(hparams, ["causality"])["causality"].told


def pretend_t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does on one, it claims bf16, which it only emulates."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))


def test_emulated_bf16_is_found_on_a_card(hparams: Hparams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the choice goes by what torch says of support, and not by the card."""
    pretend_t4(monkeypatch)
    automatic = hparams.model_copy(update={"train": hparams.train.model_copy(update={"precision": "auto"})})
    assert faults(automatic, ["precision"]) == {}, "fp16 is right on it"
    monkeypatch.setattr(precision, "BF16_CAPABILITY", (0, 0))
    found = faults(automatic)
    assert set(found) == {"precision of cuda:0"}
    assert "capability 7.5" in found["precision of cuda:0"].told and "fp16" in str(found["precision of cuda:0"].remedy)


@pytest.mark.parametrize("sign", ["flags", "clock"])
def test_emulated_bf16_is_found_on_a_processor(hparams: Hparams, sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(checks_machine, "_flags", lambda: {"avx2"} if sign == "flags" else {"avx512_bf16"})
    monkeypatch.setattr(checks_machine, "product_seconds", lambda *formats: [3.0, 1.0])
    asked = hparams.model_copy(update={"train": hparams.train.model_copy(update={"precision": "bf16"})})
    found = faults(asked, ["precision"])
    assert set(found) == {"precision of cpu"} and "emulated" in found["precision of cpu"].told
    monkeypatch.setattr(checks_machine, "_flags", lambda: {"avx512_bf16"})
    monkeypatch.setattr(checks_machine, "product_seconds", lambda *formats: [0.3, 1.0])
    assert faults(asked, ["precision"]) == {}


def test_float32_has_its_reason(hparams: Hparams, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(name: str) -> str:
        train = hparams.train.model_copy(update={"precision": name, "device": "cpu"})
        return next(examine(hparams.model_copy(update={"train": train}), ["precision"])).told

    monkeypatch.setattr(precision, "cpu_gains_by_bf16", lambda: False)
    monkeypatch.setattr(checks_machine, "product_seconds", lambda *formats: [1.7, 1.0])
    monkeypatch.setattr(checks_machine, "cpu_has_bf16", lambda: True)
    assert "timed and no faster (timed again: 1.70 of float32's time)" in told("auto")
    monkeypatch.setattr(checks_machine, "cpu_has_bf16", lambda: False)
    assert told("auto") == "float32 on this processor, which has no products of bf16"
    assert 'train.precision "fp32" says' in told("fp32")


def with_own_head(right: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(right)
    def make(self: GPT, settings: Any, vocab_size: int) -> None:
        right(self, settings, vocab_size)
        self.lm_head = nn.Linear(settings.d_embed or settings.d_model, self.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    return make


@pytest.mark.parametrize("way", ["a head of its own", "a copy"])
def test_an_untied_head_is_found(hparams: Hparams, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "a copy":
        monkeypatch.setattr(GPT, "table", property(lambda self: self.embed.tokens.weight.clone()))
    else:
        monkeypatch.setattr(GPT, "__init__", with_own_head(GPT.__init__))
    found = faults(hparams)
    assert "tying" in found and set(found) <= {"tying", "resume"}, found


def test_a_dead_balance_gradient_is_found(hparams: Hparams, monkeypatch: pytest.MonkeyPatch) -> None:
    right = moe.Router.forward

    def dead(self: Any, *given: Any) -> Any:
        ids, weights, stats = right(self, *given)
        return ids, weights, stats._replace(probability=stats.probability.detach())

    monkeypatch.setattr(moe.Router, "forward", dead)
    found = faults(hparams)
    assert set(found) == {"balance"} and "no gradient" in found["balance"].told


def test_a_balance_loss_of_the_wrong_sign_is_found(hparams: Hparams, monkeypatch: pytest.MonkeyPatch) -> None:
    from moelet import step

    right = step.balance_slopes
    monkeypatch.setattr(step, "balance_slopes", lambda *given: (right(*given)[0], -right(*given)[1]))
    assert "rises along its own gradient" in faults(hparams, ["balance"])["balance"].told


def test_a_bias_that_does_not_move_is_found(tiny_settings: TinySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    from moelet import step

    monkeypatch.setattr(step, "_move_biases", lambda *given: None)
    settings = tiny_settings(model={"selection_bias": True}, balance={"bias_rate": 0.01, "loss": None})
    assert "no bias moves" in faults(make_hparams(settings), ["balance"])["balance"].told


# the norm's gradient forgets the weight; queries see one key too many
BROKEN_NORM = ("dot += slope * x * load_floats(weight + c);", "dot += slope * x;")
LEAKING_ATTENTION = ("ivec seen = columns <= (float)i;", "ivec seen = columns <= (float)(i + 1);")


def build_with(monkeypatch: pytest.MonkeyPatch, folder: Path, file: str, old: str, new: str) -> None:
    """Have kernels built from a copy of the sources with one change."""
    shutil.copytree(ROOT / "moelet" / "kernels", folder / "kernels")
    source = folder / "kernels" / file
    text = source.read_text()
    assert text.count(old) == 1
    source.write_text(text.replace(old, new))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(native, "__file__", str(folder / "kernels" / "native.py"))
    monkeypatch.setattr(native, "_load", functools.cache(native._load.__wrapped__))


@needs_kernels
def test_a_broken_kernel_is_found(hparams: Hparams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the gradient is wrong: the model computes, and learns something else."""
    build_with(monkeypatch, tmp_path / "broken", "norm.c", *BROKEN_NORM)
    found = faults(hparams)
    assert set(found) == {"parity of norms"}
    assert "MOELET_NATIVE=0" in str(found["parity of norms"].remedy)


@needs_kernels
@pytest.mark.nightly
def test_a_leak_in_c_is_found(hparams: Hparams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_with(monkeypatch, tmp_path / "broken", "attention.c", *LEAKING_ATTENTION)
    found = faults(hparams)
    assert "'blocked' sees later tokens" in found["causality"].told and "parity of attention" in found


@needs_kernels
def test_kernels_that_end_the_process_are_found(hparams: Hparams, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of another machine would that shares the home folder."""
    monkeypatch.setattr(checks_kernels, "trial", killed)
    assert "a process that uses them ends" in faults(hparams, ["kernels"])["kernels"].told


def killed(name: str) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGILL)


def test_an_unwritable_folder_is_found(hparams: Hparams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a file nothing can be made, whoever asks."""
    (tmp_path / "file").write_text("")
    train = hparams.train.model_copy(update={"run": str(tmp_path / "file" / "run")})
    found = faults(hparams.model_copy(update={"train": train}))
    assert set(found) == {"run folder"} and "--run" in str(found["run folder"].remedy)
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: full)
    assert "keeps up to" in faults(hparams, ["run folder"])["run folder"].told


def test_a_run_that_forgets_its_moments_is_found(hparams: Hparams, monkeypatch: pytest.MonkeyPatch) -> None:
    from moelet.foresee import checks_model

    right = checks_model.restore

    def forgetful(training: Any, saved: Any) -> None:
        right(training, saved._replace(optimizer={}))

    monkeypatch.setattr(checks_model, "restore", forgetful)
    assert "isn't the run that wasn't stopped" in faults(hparams, ["resume"])["resume"].told


def test_a_loud_start_is_found(hparams: Hparams, monkeypatch: pytest.MonkeyPatch) -> None:
    from moelet import modelling

    monkeypatch.setattr(modelling, "INIT_STD", 1.0)
    assert set(faults(hparams, ["first loss"])) == {"first loss"}


def test_missing_text_and_old_packages_are_found(hparams: Hparams, monkeypatch: pytest.MonkeyPatch) -> None:
    data = hparams.data.model_copy(update={"files": "/not/there"})
    assert set(faults(hparams.model_copy(update={"data": data}), ["text"])) == {"text"}
    monkeypatch.setitem(checks_machine.WANTED, "torch", "99.0")
    monkeypatch.setitem(checks_machine.WANTED, "no-such-package", "1")
    told = faults(hparams, ["versions"])["versions"].told
    assert "99.0 is needed" in told and "no-such-package is missing" in told


def test_versions_are_those_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert dict(re.findall(r'"([\w-]+)>=([\d.]+)"', block[1])) == checks_machine.WANTED
    assert 'requires-python = ">=3.11"' in project


# the hub


@pytest.mark.parametrize("needed", [False, True])
def test_an_offline_machine_is_a_fault_only_where_the_hub_is_needed(
    tiny_settings: TinySettings, needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    data = {"source": "hub", "dataset": "a/b", "files": None} if needed else {}
    (finding,) = examine(make_hparams(tiny_settings(data=data)), ["hub"])
    assert finding.state == ("fault" if needed else "note") and "127.0.0.1:9" in finding.told and finding.remedy
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (finding,) = examine(make_hparams(tiny_settings(data=data)), ["hub"])
    assert finding.state == ("fault" if needed else "note") and "HF_HUB_OFFLINE" in finding.told


def test_a_hub_that_answers_is_asked_for_the_dataset(
    tiny_settings: TinySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks_machine, "_unreachable", lambda endpoint: None)
    monkeypatch.setattr(checks_machine, "_refused", lambda source: None if source.dataset == "a/b" else "404")
    mix = [{"source": "hub", "dataset": "a/b"}, {"source": "embedded"}]
    parts = make_hparams(tiny_settings(data={"source": "mix", "mix": mix}))
    (finding,) = examine(parts, ["hub"])
    assert finding.state == "ok" and "a/b" in finding.told
    (finding,) = examine(make_hparams(tiny_settings(data={"source": "hub", "dataset": "a/c"})), ["hub"])
    assert finding.state == "fault" and "a/c: 404" in finding.told


# the command


def test_the_small_model_has_the_parts_of_the_settings(tiny_settings: TinySettings) -> None:
    given = make_hparams(tiny_settings(model={"n_experts": 1, "top_k": 1, "d_embed": None, "d_ff": 99}))
    small = Patient(given).small.model
    assert small.n_experts == 1 and small.d_embed is None and small.d_model == 64


def test_the_command_says_each_finding_and_ends_by_it(
    tiny_settings: TinySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {name: CHECKS[name] for name in ("versions", "tying", "run folder")}
    monkeypatch.setattr(doctor, "CHECKS", few)
    monkeypatch.setattr(examine, "__defaults__", (tuple(few),))
    (tmp_path / "s.json").write_text(json.dumps(tiny_settings()))
    (tmp_path / "file").write_text("")
    out = tmp_path / "found.json"
    assert main(["doctor", str(tmp_path / "s.json"), "--set", f"train.run={tmp_path / 'r'}", "--json", str(out)]) == 0
    assert "no fault in 3 findings" in capsys.readouterr().out
    assert json.loads(out.read_text())["faults"] == []
    command = ["doctor", str(tmp_path / "s.json"), "--set", f"train.run={tmp_path / 'file' / 'r'}", "--json", str(out)]
    assert main(command) == 78
    said = capsys.readouterr().out
    assert "FAULT  run folder" in said and "-> Give another folder" in said and "1 fault in 3" in said
    assert json.loads(out.read_text())["faults"] == ["run folder"]


def test_a_check_that_stops_is_a_fault(hparams: Hparams, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(patient: Patient) -> Any:
        raise RuntimeError("like that")

    monkeypatch.setitem(doctor.CHECKS, "tying", stops)
    assert "stopped with RuntimeError: like that" in faults(hparams, ["tying"])["tying"].told


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--help"]) == 0
    assert "Example: moelet doctor" in " ".join(capsys.readouterr().out.split())
