"""The precision of training on a device: what auto means, TF32, what a device cannot do, and what says so."""

import json
import warnings
from contextlib import contextmanager

import pytest
import torch

from looped.config import dump_config, load_config
from looped.cost.arm_timing import Stepper
from looped.cost.block_memory import formula_bytes
from looped.cost.counts import count, format_counts
from looped.cost.traced_flops import FakeTraining
from looped.devices import DTYPES, NATIVE, USABLE, Placement
from looped.domains import domain_of
from looped.errors import UserError
from looped.precision import Precision, training_device
from looped.training import processes, runs
from looped.training.launcher_env import check_launcher
from looped.training.runs import open_run

SMALL = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "model.num_prelude_layers": 1,
         "model.num_coda_layers": 1, "denoise.cond_width": 8, "denoise.target.dim": 4, "data.length": 8,
         "evaluation.prompt_length": 4, "data.vocab_size": 270, "training.batch_size": 2}


def small(**changes):
    return load_config(None, SMALL | changes)


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(bf16=False)`: torch says that it sees a CUDA device, with bf16 and TF32 or without."""
    def make(bf16=True):
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or bf16)
        monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

    return make


@pytest.mark.parametrize(("device", "settings", "bf16", "name"), [
    ("cpu", {}, True, "fp32"), ("mps", {}, True, "fp32"), ("cuda:0", {}, True, "bf16 with TF32"),
    ("cuda:0", {}, False, "fp32"), ("cuda:0", {"training.precision": "fp32"}, True, "fp32 with TF32"),
    ("cuda:0", {"training.precision": "fp32", "training.tf32": False}, True, "fp32"),
    ("cpu", {"training.precision": "bf16"}, True, "bf16")])
def test_what_a_setting_means_on_a_device(gpu, device, settings, bf16, name):
    gpu(bf16)
    assert Precision.of(small(**settings), device).name == name


@contextmanager
def warned(expected, says):
    with pytest.warns(UserWarning, match=says) if expected else warnings.catch_warnings():
        if not expected:
            warnings.simplefilter("error")
        yield


AVX2 = {"architecture": "x86_64", "avx": True, "avx2": True}
AVX512 = AVX2 | {"avx512_f": True}


@pytest.mark.parametrize(("found", "dtype", "slow"), [
    (AVX2, "fp32", {"bf16", "fp16"}), (AVX512, "fp32", {"fp16"}), (AVX512 | {"avx512_bf16": True}, "bf16", {"fp16"}),
    (AVX512 | {"amx_bf16": True, "amx_fp16": True}, "bf16", set()), ({"architecture": "aarch64"}, "fp32", set()),
    ({}, "fp32", set())], ids=["AVX2", "AVX512", "AVX512-BF16", "AMX", "ARM", "unknown"])
def test_a_cpu_without_instructions_for_a_dtype_is_spared_it_and_warned_of(monkeypatch, gpu, found, dtype, slow):
    gpu()
    monkeypatch.setattr("looped.devices._of_cpu", lambda: found)
    native = {"training.precision": "native"}
    assert Precision.of(small(**native), "cpu").dtype == dtype
    assert (Precision.of(small(), "cpu").dtype, Precision.of(small(**native), "cuda").dtype) == ("fp32", "bf16")
    for asked in DTYPES:
        with warned(asked in slow, rf"^this CPU has no instructions for {asked}, .*; leave out --dtype$"):
            Placement.of("cpu", asked)
        with warned(asked in slow, rf"^this CPU has no .* {asked}, .*; set training.precision to native or fp32$"):
            Precision(asked).check(torch.device("cpu"))


def test_torch_names_the_capabilities_that_decide():
    """Of this machine: a name that torch does not know would decide nothing in silence."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not str(found.get("architecture")).startswith("x86"):
        pytest.skip("not an x86 CPU, or a torch that cannot tell")
    assert {*found} >= {name for names in (*NATIVE.values(), *USABLE.values()) for name in names}


@pytest.mark.parametrize(("environment", "device"), [
    ({}, "cuda:0"), ({"ACCELERATE_USE_CPU": "true"}, "cpu"), ({"ACCELERATE_USE_CPU": "false"}, "cuda:0"),
    ({"ACCELERATE_TORCH_DEVICE": "cuda:3"}, "cuda:3")])
def test_training_takes_the_device_that_accelerate_takes(gpu, monkeypatch, environment, device):
    gpu()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert training_device() == torch.device(device)


def test_costs_are_those_of_the_device_and_timed_steps_those_of_the_processor(gpu):
    """The precision of auto in `looped info`, `--dry-run`, `bench step` and the launcher's check."""
    here = count(small(), 270)
    gpu()
    auto, explicit = count(small(), 270), count(small(**{"training.precision": "bf16"}), 270)
    assert auto == explicit != here
    assert "per micro-batch in bf16" in format_counts(auto)
    assert " in " not in format_counts(here).split("micro-batch")[1].split("\n")[0]
    config = small()
    assert FakeTraining(config, domain_of(config).first_inputs(config)).precision.dtype == "bf16"
    kept = [formula_bytes(small(**{"training.precision": name})) for name in ("auto", "fp32", "bf16")]
    assert kept[0] == kept[1] != kept[2]
    losses = [Stepper(small(**{"training.precision": name})).loss().item() for name in ("auto", "fp32", "bf16")]
    assert losses[0] == losses[1] != losses[2]
    check_launcher(config, {"ACCELERATE_MIXED_PRECISION": "bf16"})


def test_bf16_on_a_device_without_it_is_one_sentence(gpu, monkeypatch):
    gpu(bf16=False)
    with pytest.raises(UserError, match=r"training.precision bf16 needs a GPU of .* and Tesla T4 is older; set "
                                        r"training.precision to auto or fp32"):
        processes.start_accelerator(small(**{"training.precision": "bf16"}))
    Precision.of(small(**{"training.precision": "bf16"}), "cpu").check(torch.device("cpu"))
    Precision.of(small(), "cuda").check(torch.device("cuda"))


@pytest.mark.parametrize(("own", "tf32"), [("highest", True), ("high", False)])
def test_tf32_is_what_the_config_says_and_the_process_gets_its_own_back(own, tf32):
    matmul, first = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(own)
    try:
        with Precision("fp32", tf32).products(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == own
        with Precision("fp32", tf32).products(torch.device("cuda")):
            assert (matmul.fp32_precision == "tf32") is tf32
        assert torch.get_float32_matmul_precision() == own
        matmul.fp32_precision = "tf32"  # torch's newer interface
        with Precision("fp32", False).products(torch.device("cuda")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(first)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """`started(config, device)`: a run that was started on a device and has a checkpoint of step 4."""
    monkeypatch.setattr(runs, "list_checkpoints", lambda path: [path / "checkpoints" / "step-00000004"])
    monkeypatch.setattr(runs, "start_of", lambda *args: (4, 4))

    def make(config, device):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "stamp.json").write_text(json.dumps(runs.stamp(config, device)))
        (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
        return tmp_path / "run"

    return make


def resumed(config, run, device):
    """The warnings of a resumed run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_run(config, run, device=device):
            pass
    return [str(each.message) for each in caught if "trained in" in str(each.message)]


def test_a_run_that_goes_on_in_another_precision_says_so_once_and_records_it(gpu, started):
    gpu()
    run = started(small(), "cuda:0")
    first = json.loads((run / "stamp.json").read_text())
    assert first["precision"] == {"dtype": "bf16", "tf32": True}
    assert resumed(small(), run, "cuda:0") == []
    assert resumed(small(), run, "cpu") == [
        f"run {run} goes on in fp32 on cpu and was trained in bf16 with TF32 up to step 4; results differ by rounding "
        f"from those of a run on one device"]
    assert resumed(small(), run, "cpu") == []
    stamp = json.loads((run / "stamp.json").read_text())
    (change,) = stamp.pop("changes")
    assert (change["setting"], change["step"], change["new"]) == ("precision", 4, {"dtype": "fp32", "tf32": False})
    assert stamp == first
    assert len(resumed(small(), run, "cuda:0")) == 1
    assert resumed(small(), run, "cuda:0") == []


@pytest.mark.parametrize(("old", "new", "device", "why"), [
    ("fp32", "auto", "cpu", None), ("auto", "fp32", "cpu", None), ("auto", "bf16", "cuda:0", None),
    ("fp32", "auto", "cuda:0", "started with training.precision 'fp32', now it is 'auto'"),
    ("auto", "bf16", "cpu", "started with training.precision 'auto', now it is 'bf16'")])
def test_auto_and_what_it_stands_for_may_take_each_others_place(gpu, started, old, new, device, why):
    gpu()
    run = started(small(**{"training.precision": old}), device)
    config = small(**{"training.precision": new})
    if why is None:
        assert resumed(config, run, device) == []
        assert load_config(run / "config.yaml") == config
        return
    with pytest.raises(UserError, match=why):
        resumed(config, run, device)


def test_a_run_of_the_gpu_goes_on_elsewhere_in_its_own_precision(gpu, started):
    gpu()
    run, bf16 = started(small(**{"training.tf32": False}), "cuda:0"), {"training.precision": "bf16"}
    assert resumed(small(**bf16, **{"training.tf32": False}), run, "cpu") == []


def test_a_run_without_a_recorded_precision_is_taken_at_its_configs(gpu, started):
    gpu()
    run = started(small(), "cpu")
    stamp = json.loads((run / "stamp.json").read_text())
    del stamp["precision"]
    (run / "stamp.json").write_text(json.dumps(stamp))
    assert resumed(small(), run, "cuda:0") == []
    assert runs.last_precision({}, small(), "cpu") == Precision("fp32")
