"""The environment that a launcher sets changes no figure of a run, or is refused in one sentence.

The variables are those that `accelerate launch` exports for its flags and its configuration file.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from same_runs import assert_same, figures

from looped.cli import main
from looped.config import dump_config
from looped.errors import UserError
from looped.training.launcher_env import PLAIN, READ, check_launcher
from looped.training.train import train

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
SHORT = {"training.budget": 3, "training.log_every": 1, "training.checkpoint_every": 0, "objective": "ar"}

HARMLESS = {
    "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "max-autotune",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True", "ACCELERATE_DYNAMO_USE_DYNAMIC": "True",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True", ACCUMULATION: "1", "ACCELERATE_GRADIENT_CLIPPING": "1.0",
    "ACCELERATE_FP8_BACKEND": "NO", "ACCELERATE_FP8_FORMAT": "E4M3", "ACCELERATE_USE_FSDP": "false",
    "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "MEGATRON_LM_GRADIENT_CLIPPING": "0.1", "PARALLELISM_CONFIG_TP_SIZE": "2", "ACCELERATE_CPU_AFFINITY": "0",
    "ACCELERATE_BYPASS_DEVICE_MAP": "true", "ACCELERATE_DEBUG_MODE": "true", "ACCELERATE_USE_SAGEMAKER": "false",
    "ACCELERATE_ALLOW_CP_STANDALONE": "true", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "NO",
}

WRONG = {
    ACCUMULATION: ("4", "has training.accumulation 1"), "ACCELERATE_GRADIENT_CLIPPING": ("0.1", "optim.grad_clip 1.0"),
    "ACCELERATE_MIXED_PRECISION": ("bf16", "training.precision fp32"),
    "ACCELERATE_DYNAMO_BACKEND": ("EAGER", "training.compile false"),
    "ACCELERATE_FP8_BACKEND": ("TE", "training.precision"), "ACCELERATE_DOWNCAST_BF16": ("1", "training.precision"),
    "XLA_USE_BF16": ("1", "training.precision"), "XLA_DOWNCAST_BF16": ("1", "training.precision"),
    "ACCELERATE_USE_DEEPSPEED": ("true", PLAIN), "ACCELERATE_USE_FSDP": ("true", PLAIN),
    "ACCELERATE_USE_MEGATRON_LM": ("true", PLAIN), "ACCELERATE_USE_PARALLELISM_CONFIG": ("true", PLAIN),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": ("DATA_PARALLEL", PLAIN),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny):
    run = tmp_path_factory.mktemp("alone") / "run"
    train(tiny(**SHORT), run)
    return run


def test_variables_that_ask_for_nothing_else_change_no_figure(alone, tmp_path, tiny, monkeypatch):
    for name, value in HARMLESS.items():
        monkeypatch.setenv(name, value)
    train(tiny(**SHORT), tmp_path / "run")
    assert_same(alone, tmp_path / "run")


def test_every_variable_that_is_read_has_a_value_that_is_refused_here():
    assert {each.variable for each in READ} == set(WRONG)


@pytest.mark.parametrize("variable", WRONG)
def test_a_variable_that_would_change_a_run_is_refused_at_once(tmp_path, tiny, monkeypatch, capsys, variable):
    value, said = WRONG[variable]
    monkeypatch.setenv(variable, value)
    (tmp_path / "config.yaml").write_text(dump_config(tiny(**SHORT)), encoding="utf-8")
    assert main(["train", str(tmp_path / "config.yaml"), "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert variable in error
    assert repr(value) in error
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_accumulation_that_the_config_has_too_divides_the_gradient_once(alone, tmp_path, tiny, monkeypatch):
    """The positive control: with both, four micro-batches, whose mean is the gradient of the whole batch."""
    monkeypatch.setenv(ACCUMULATION, "4")
    train(tiny(**SHORT, **{"training.accumulation": 4}), tmp_path / "run")
    for ours, theirs in zip(figures(tmp_path / "run"), figures(alone), strict=True):
        for name in {"loss", "grad_norm"} & set(ours):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_bf16_and_a_compiled_step_may_be_asked_for_by_both(tiny):
    both = tiny(**{"training.precision": "bf16", "training.compile": True})
    check_launcher(both, {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})
    with pytest.raises(UserError, match=r"training\.precision fp32"):
        check_launcher(tiny(), {"ACCELERATE_MIXED_PRECISION": "bf16"})


def test_what_accelerate_launch_exports_by_default_passes(tiny, monkeypatch):
    defaults = dict.fromkeys(("mpirun_hostfile", "gpu_ids", "main_process_ip", "main_process_port"))
    args = SimpleNamespace(no_python=False, module=False, num_machines=1, num_processes=1, cpu=True, use_cpu=True,
                           debug=False, mixed_precision="no", dynamo_backend="no", dynamo_mode="default",
                           dynamo_use_fullgraph=False, dynamo_use_dynamic=False, enable_cpu_affinity=True,
                           dynamo_use_regional_compilation=False, num_cpu_threads_per_process=1,
                           training_script="x", training_script_args=[], **defaults)
    _, exported = prepare_simple_launcher_cmd_env(args)
    assert "ACCELERATE_DYNAMO_BACKEND" in exported
    check_launcher(tiny(), exported)


def test_threads_of_the_config_stand_where_accelerate_would_choose_some(tmp_path, tiny):
    """For processes on a CPU without OMP_NUM_THREADS it sets all cores."""
    code = ("import sys, torch; from looped.config import load_config; import looped.training.processes as p; "
            "p.start_accelerator(load_config(sys.argv[1])); print('threads', torch.get_num_threads())")
    threads = torch.get_num_threads() + 2
    (tmp_path / "c.yaml").write_text(dump_config(tiny(**{"training.threads": threads})), encoding="utf-8")
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))} | group
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "c.yaml"], capture_output=True, text=True,
                          timeout=120, env=environment)
    assert f"threads {threads}" in done.stdout, done.stderr[-2000:]
