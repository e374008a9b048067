"""The folder of a run: its lock, its log, and who may go on in it."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from latentgen.errors import OutputError, ResumeError, RunLockedError
from latentgen.train.checkpoint import RunState, save_checkpoint
from latentgen.train.config import TrainConfig
from latentgen.train.run_files import LOG, trim_log
from latentgen.train.run_folder import run_lock, starting_state
from tests.train.recipes import MakeRecipe


def save_state(config: TrainConfig, fields: dict[str, Any]) -> None:
    save_checkpoint(config.output_dir, RunState(3, fields, {}, {}, {}, {}), keep=1)


def save_state_of(config: TrainConfig) -> None:
    save_state(config, config.model_dump(mode="json"))


def test_one_writer_at_a_time(tmp_path: Path):
    with run_lock(tmp_path / "a" / "run", enabled=True):
        with (
            pytest.raises(RunLockedError, match="another process trains in"),
            run_lock(tmp_path / "a" / "run", enabled=True),
        ):
            pass
        with run_lock(tmp_path / "a" / "run", enabled=False), run_lock(tmp_path / "b", enabled=True):
            pass
    with run_lock(tmp_path / "a" / "run", enabled=True):
        pass


def test_the_lock_ends_with_an_error(tmp_path: Path):
    with pytest.raises(SystemExit), run_lock(tmp_path, enabled=True):
        raise SystemExit(143)
    with run_lock(tmp_path, enabled=True):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"output_dir .* cannot be written"),
        run_lock(tmp_path / "file" / "run", enabled=True),
    ):
        pass


def test_a_new_run_needs_a_folder_without_checkpoints(autoencoder_recipe: MakeRecipe):
    config = autoencoder_recipe()
    assert starting_state(config) is None
    save_state_of(config)
    with pytest.raises(ResumeError, match="holds a run already: add --set resume=latest"):
        starting_state(config)


def test_a_resumed_run_needs_a_checkpoint(autoencoder_recipe: MakeRecipe):
    with pytest.raises(ResumeError, match="nothing to resume"):
        starting_state(autoencoder_recipe("resume=true"))


def test_free_fields_may_change(autoencoder_recipe: MakeRecipe):
    save_state_of(autoencoder_recipe())
    changed = ("max_steps=9", "checkpoint_every=7", "keep_checkpoints=3", "log_every=2")
    state = starting_state(autoencoder_recipe("resume=true", *changed))
    assert state is not None
    assert state.step == 3


def test_a_run_that_began_under_old_names_of_fields_resumes(text_to_image_recipe: MakeRecipe):
    config = text_to_image_recipe("validation_fraction=0.1", "validation={prompts: [a]}")
    fields = config.model_dump(mode="json")
    fields["held_out"] = fields.pop("validation_fraction")
    fields["task"]["cached_views"] = fields["task"].pop("views_per_image")
    save_state(config, fields)
    resumed = config.model_copy(update={"resume": "latest"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert starting_state(resumed) is not None


def test_fields_that_came_later_have_their_defaults(autoencoder_recipe: MakeRecipe):
    config = autoencoder_recipe()
    fields = config.model_dump(mode="json")
    del fields["data"]["on_bad_image"]
    save_state(config, fields)
    assert starting_state(autoencoder_recipe("resume=true")) is not None
    with pytest.raises(ResumeError, match=r"data\.on_bad_image was error, is skip"):
        starting_state(autoencoder_recipe("resume=true", "data.on_bad_image=skip"))


def test_fields_that_are_gone_are_an_error(autoencoder_recipe: MakeRecipe):
    config = autoencoder_recipe()
    save_state(config, config.model_dump(mode="json") | {"momentum": 0.9})
    with pytest.raises(ResumeError, match="a version with other recipes"):
        starting_state(autoencoder_recipe("resume=true"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=6", "seed was 5, is 6"),
        ("optimizer.learning_rate=0.1", r"optimizer\.learning_rate was 0\.003, is 0\.1"),
        (
            "task.vae.block_out_channels=[16, 64]",
            r"task\.vae\.block_out_channels was \[16, 32\], is \[16, 64\]",
        ),
        ("task.vae.norm_num_groups=4", r"task\.vae\.norm_num_groups was 8, is 4"),
        ("mixed_precision=bf16", "mixed_precision was no, is bf16"),
    ],
)
def test_other_fields_are_shown_and_refused(override: str, message: str, autoencoder_recipe: MakeRecipe):
    save_state_of(autoencoder_recipe())
    with pytest.raises(ResumeError, match=f"the run began with: {message}; to change"):
        starting_state(autoencoder_recipe("resume=true", override))


def test_the_log_keeps_what_will_not_be_run_again(tmp_path: Path):
    rows = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (10, 20, 30, 40)]
    (tmp_path / LOG).write_text("".join(rows) + '{"step": 2', "utf-8")
    trim_log(tmp_path, 20)
    assert (tmp_path / LOG).read_text("utf-8") == rows[0] + rows[1]
    trim_log(tmp_path, 0)
    assert (tmp_path / LOG).read_text("utf-8") == ""
    trim_log(tmp_path / "new", 0)


def test_auto_begins_or_goes_on(autoencoder_recipe: MakeRecipe):
    assert starting_state(autoencoder_recipe("resume=auto")) is None
    save_state_of(autoencoder_recipe())
    state = starting_state(autoencoder_recipe("resume=auto"))
    assert state is not None
    assert state.step == 3


@pytest.mark.parametrize("resume", ["latest", "auto"])
def test_a_run_of_which_nothing_is_whole_is_no_new_run(resume: str, autoencoder_recipe: MakeRecipe):
    config = autoencoder_recipe()
    save_state_of(config)
    (config.output_dir / "checkpoint-00000003" / "manifest.json").unlink()
    with (
        pytest.warns(UserWarning, match="not whole"),
        pytest.raises(ResumeError, match="no whole checkpoint; delete them or choose another output_dir"),
    ):
        starting_state(autoencoder_recipe(f"resume={resume}"))


@pytest.mark.parametrize("allowed", ["optimizer.learning_rate", "optimizer"])
def test_changes_that_are_allowed_are_told(allowed: str, autoencoder_recipe: MakeRecipe):
    save_state_of(autoencoder_recipe())
    changes = ("resume=true", "optimizer.learning_rate=0.1")
    with pytest.raises(ResumeError, match=r"add --set 'allow_changes=\[optimizer\.learning_rate\]'$"):
        starting_state(autoencoder_recipe(*changes))
    with pytest.warns(
        UserWarning, match=r"from step 3 on .* another: optimizer\.learning_rate was 0\.003, is 0\.1$"
    ):
        assert starting_state(autoencoder_recipe(*changes, f"allow_changes=[{allowed}]")) is not None
    with pytest.raises(ResumeError, match="seed was 5, is 6; to change it"):
        starting_state(autoencoder_recipe(*changes, "seed=6", f"allow_changes=[{allowed}]"))


def test_some_changes_mean_another_run(autoencoder_recipe: MakeRecipe):
    save_state_of(autoencoder_recipe())
    with pytest.raises(
        ResumeError, match=r"optimizer\.name was muon, is adamw; optimizer\.name cannot change within a run"
    ):
        starting_state(
            autoencoder_recipe(
                "resume=true", "optimizer.name=adamw", "allow_changes=[optimizer.name, optimizer]"
            )
        )


@pytest.mark.parametrize(
    "override",
    [
        "task.method.rank=4",
        "task.method.targets=[to_q]",
        "task.method.train_text_encoder=false",
        "ema_decay=0",
    ],
)
def test_what_is_learnt_cannot_change_within_a_run(override: str, lora_recipe: MakeRecipe):
    """No allow_changes is advised that would not help."""
    field = override.partition("=")[0]
    save_state_of(lora_recipe())
    for allowed in ("allow_changes=[]", f"allow_changes=[{field}]"):
        with pytest.raises(
            ResumeError, match=f"; {re.escape(field)} cannot change within a run: begin a new one"
        ):
            starting_state(lora_recipe("resume=true", override, allowed))


def test_the_decay_of_an_average_may_change(lora_recipe: MakeRecipe):
    save_state_of(lora_recipe())
    with pytest.warns(UserWarning, match=r"ema_decay was 0\.9, is 0\.99"):
        starting_state(lora_recipe("resume=true", "ema_decay=0.99", "allow_changes=[ema_decay]"))


@pytest.mark.parametrize("resume", ["latest", "auto"])
def test_a_run_that_has_done_more_than_it_is_asked_for(resume: str, autoencoder_recipe: MakeRecipe):
    save_state_of(autoencoder_recipe())
    with pytest.raises(
        ResumeError, match="has done 3 steps, and max_steps is 2: set it to more, or choose another"
    ):
        starting_state(autoencoder_recipe(f"resume={resume}", "max_steps=2"))
    with pytest.warns(UserWarning, match="all 3 steps of the run are done, .* to go on, raise max_steps"):
        assert starting_state(autoencoder_recipe(f"resume={resume}", "max_steps=3")) is not None


def test_another_number_of_processes_is_told(
    autoencoder_recipe: MakeRecipe, recwarn: pytest.WarningsRecorder
):
    config = autoencoder_recipe()
    fields = config.model_dump(mode="json")
    save_checkpoint(config.output_dir, RunState(3, fields, {}, {}, {}, {}, processes=4), keep=1)
    starting_state(autoencoder_recipe("resume=true"), processes=4)
    starting_state(autoencoder_recipe("resume=true"), processes=2, quiet=True)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="computed by 4 processes and goes on with 2"):
        starting_state(autoencoder_recipe("resume=true"), processes=2)
