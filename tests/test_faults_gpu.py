"""A GPU that fails in the middle of a training. Card and failure are made up; the run is a real one."""

import pytest
import torch
from workflow_runs import TARGETS, copy_without, final_tables, snakemake

pytestmark = pytest.mark.faults

# every process of a run reads this as it starts, for it lies in the folder that jobs' modules come from
CARD_FAILS_ONCE = """
import sys
from pathlib import Path

if sys.orig_argv[-1].endswith(".train.py"):
    import torch

    step, calls, failed = torch.optim.Adam.step, [], Path("the-card-has-failed")

    def fail_in_the_sixth_step(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 6 and not failed.exists():
            failed.touch()
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return step(*arguments, **keywords)

    torch.optim.Adam.step = fail_in_the_sixth_step
"""


def test_a_training_whose_gpu_fails_says_so_and_the_same_command_goes_on(undisturbed, tmp_path):
    # what is there of the other methods stays
    gone = ("models", "registered/simulated/voxelmorph", "scores/simulated/voxelmorph", "scores/*.*", "tables")
    folder = copy_without(undisturbed, tmp_path / "run", *gone)
    (folder / "src" / "sitecustomize.py").write_text(CARD_FAILS_ONCE)
    card = {"GPU_POOL": "first", "GPU_LEASE_DIR": str(tmp_path / "lease")}

    told = snakemake(folder, *TARGETS, succeeds=False, **card)
    assert (folder / "the-card-has-failed").exists()
    assert "Error: GPU first stopped working: CUDA error: unspecified launch failure." in told
    assert "The same command, given again, goes on from the last state that was kept." in told
    (kept,) = folder.glob("results/models/simulated/.resume/*/last.ckpt")
    assert torch.load(kept, weights_only=True)["step"] == 4  # two validations, and not the step after them
    assert not (folder / TARGETS[0]).exists()

    snakemake(folder, *TARGETS, **card)
    log = (folder / "results/logs/train/simulated/voxelmorph/seed1.log").read_text()
    assert "after step 4" in log
    assert final_tables(folder) == final_tables(undisturbed)
