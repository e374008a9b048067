"""The folder of a run: its lock, and which runs may continue in it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from latentgen.errors import OutputError, ResumeError, RunLockedError
from latentgen.train.checkpoint import RunState, save_checkpoint
from latentgen.train.config import TrainConfig
from latentgen.train.run_dir import check_same_data, run_lock, state_to_resume
from tests.train.recipes import MakeRecipe


def save_state(config: TrainConfig, fields: dict[str, Any] | None = None, **state: Any) -> None:
    fields = config.model_dump(mode="json") if fields is None else fields
    save_checkpoint(config.output_dir, RunState(3, fields, {}, {}, {}, {}, **state), keep=1)


def test_one_writer_at_a_time(tmp_path: Path):
    folder = tmp_path / "a" / "run"
    for ended_by in (SystemExit(143), None):
        try:
            with run_lock(folder, enabled=True):
                with pytest.raises(RunLockedError, match="run"), run_lock(folder, enabled=True):
                    pass
                with run_lock(folder, enabled=False), run_lock(tmp_path / "b", enabled=True):
                    pass
                if ended_by is not None:
                    raise ended_by
        except SystemExit:
            pass


def test_a_folder_that_cannot_be_created(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="output_dir"), run_lock(tmp_path / "file" / "run", enabled=True):
        pass


def test_the_next_process_deletes_temporary_files(tmp_path: Path):
    (tmp_path / ".0123456789abcdef.tmp" / "unet").mkdir(parents=True)
    (tmp_path / ".fedcba9876543210.tmp").write_text("part of a log")
    (tmp_path / ".mine.tmp").write_text("a user's")
    with run_lock(tmp_path, enabled=True):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".mine.tmp"]


@pytest.mark.parametrize("resume", ["no", "latest", "auto"])
@pytest.mark.parametrize("run", ["none", "whole", "damaged"])
def test_a_run_starts_or_continues(run: str, resume: str, autoencoder_recipe: MakeRecipe):
    config = autoencoder_recipe(f"resume={resume}", "max_steps=9", "checkpoint_every=7", "log_every=2")
    if run != "none":
        save_state(autoencoder_recipe())
    if run == "damaged":
        (config.output_dir / "checkpoint-00000003" / "manifest.json").unlink()
    if (run, resume) in (("none", "no"), ("none", "auto")):
        assert state_to_resume(config) is None
    elif run == "whole" and resume != "no":
        state = state_to_resume(config)
        assert state is not None
        assert state.step == 3
    elif run == "damaged" and resume != "no":
        with pytest.warns(UserWarning, match="checkpoint-00000003"), pytest.raises(ResumeError):
            state_to_resume(config)
    else:
        with pytest.raises(ResumeError, match=re.escape(config.output_dir.name)):
            state_to_resume(config)


def test_newer_fields_have_their_defaults(autoencoder_recipe: MakeRecipe):
    config = autoencoder_recipe()
    fields = config.model_dump(mode="json")
    del fields["data"]["on_bad_image"]
    save_state(config, fields)
    assert state_to_resume(autoencoder_recipe("resume=true")) is not None
    with pytest.raises(ResumeError, match=r"data\.on_bad_image was error"):
        state_to_resume(autoencoder_recipe("resume=true", "data.on_bad_image=skip"))
    save_state(config, fields | {"momentum": 0.9})
    with pytest.raises(ResumeError, match="momentum"):
        state_to_resume(autoencoder_recipe("resume=true"))


def test_a_run_that_began_under_old_names_of_fields_resumes(text_to_image_recipe: MakeRecipe):
    config = text_to_image_recipe("validation_fraction=0.1", "validation={prompts: [a]}")
    fields = config.model_dump(mode="json")
    fields["held_out"] = fields.pop("validation_fraction")
    fields["task"]["cached_views"] = fields["task"].pop("views_per_image")
    save_state(config, fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert state_to_resume(config.model_copy(update={"resume": "latest"})) is not None


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("seed=6", "seed was 5, is 6"),
        ("optimizer.learning_rate=0.1", "optimizer.learning_rate was 0.003, is 0.1"),
        ("task.vae.block_out_channels=[16, 64]", "task.vae.block_out_channels was [16, 32], is [16, 64]"),
    ],
)
def test_changes_are_refused_or_allowed(override: str, change: str, autoencoder_recipe: MakeRecipe):
    save_state(autoencoder_recipe())
    field = override.partition("=")[0]
    with pytest.raises(ResumeError, match=re.escape(change)) as refused:
        state_to_resume(autoencoder_recipe("resume=true", override))
    assert f"allow_changes=[{field}]" in str(refused.value)
    for allowed in (field, field.rpartition(".")[0] or field):
        with pytest.warns(UserWarning, match=re.escape(change)):
            state_to_resume(autoencoder_recipe("resume=true", override, f"allow_changes=[{allowed}]"))
    with pytest.raises(ResumeError, match="ema_decay was 0"):
        state_to_resume(
            autoencoder_recipe("resume=true", override, "ema_decay=0.5", f"allow_changes=[{field}]")
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
def test_what_is_trained_cannot_change_within_a_run(override: str, lora_recipe: MakeRecipe):
    """Nor is allow_changes advised, which would not help."""
    field = override.partition("=")[0]
    save_state(lora_recipe())
    for allowed in ("allow_changes=[]", f"allow_changes=[{field}]"):
        with pytest.raises(ResumeError, match=re.escape(field)) as error:
            state_to_resume(lora_recipe("resume=true", override, allowed))
        assert "allow_changes" not in str(error.value)


def test_the_decay_of_an_average_may_change(lora_recipe: MakeRecipe):
    save_state(lora_recipe())
    with pytest.warns(UserWarning, match=r"ema_decay was 0\.9, is 0\.99"):
        state_to_resume(lora_recipe("resume=true", "ema_decay=0.99", "allow_changes=[ema_decay]"))


def test_a_run_with_all_its_steps_done(autoencoder_recipe: MakeRecipe):
    save_state(autoencoder_recipe())
    with pytest.raises(ResumeError, match=r"3 steps.*max_steps, 2"):
        state_to_resume(autoencoder_recipe("resume=auto", "max_steps=2"))
    with pytest.warns(UserWarning, match="raise max_steps"):
        assert state_to_resume(autoencoder_recipe("resume=auto", "max_steps=3")) is not None


def test_a_warning_says_if_the_number_of_processes_changes(
    autoencoder_recipe: MakeRecipe, recwarn: pytest.WarningsRecorder
):
    save_state(autoencoder_recipe(), processes=4)
    state_to_resume(autoencoder_recipe("resume=true"), processes=4)
    state_to_resume(autoencoder_recipe("resume=true"), processes=2, quiet=True)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="4 processes .* 2"):
        state_to_resume(autoencoder_recipe("resume=true"), processes=2)


def test_checkpoints_without_a_digest_accept_any_data(autoencoder_recipe: MakeRecipe):
    config = autoencoder_recipe()
    check_same_data(RunState(3, {}, {}, {}, {}, {}), "0123", config)
    check_same_data(RunState(3, {}, {}, {}, {}, {}, data_digest="0123"), "0123", config)
    with pytest.raises(ResumeError, match="data"):
        check_same_data(RunState(3, {}, {}, {}, {}, {}, data_digest="4567"), "0123", config)
