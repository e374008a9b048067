"""CLIP's transformer and tokenizer from their files: building, weight names, loading and saving.

transformers takes seconds to import, so only the functions that build a model or a tokenizer do it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from latentgen.errors import CheckpointCorruptError, CheckpointNotFoundError
from latentgen.files import atomic_write, quote
from latentgen.models.config import CLIPTextConfig

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# The prefix of weight names up to transformers 5.5, and in files on the Hub.
_FILE_PREFIX = "text_model."
# Has no prefix in any version.
_PROJECTION = "text_projection."

# Written by transformers before 4.31, and the same in every model.
OLD_BUFFERS = (f"{_FILE_PREFIX}embeddings.position_ids", "embeddings.position_ids")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def build_model(config: CLIPTextConfig) -> CLIPTextModel | CLIPTextModelWithProjection:
    import transformers

    fields = config.model_dump(exclude={"architectures", "model_type", "use_attention_mask"})
    built = transformers.CLIPTextConfig(**fields)
    return (
        transformers.CLIPTextModelWithProjection(built)
        if config.projects
        else transformers.CLIPTextModel(built)
    )


def empty_model(
    config: CLIPTextConfig, device: torch.device
) -> tuple[CLIPTextModel | CLIPTextModelWithProjection, str]:
    """A model on the meta device, and the prefix of its weight names in this version of transformers."""
    with torch.device("meta"):
        model = build_model(config)
    # Files do not hold this buffer, and the meta device leaves it empty.
    for module in model.modules():
        position_ids = module._buffers.get("position_ids")
        if position_ids is not None:
            module.register_buffer(
                "position_ids", torch.arange(position_ids.shape[-1], device=device)[None], persistent=False
            )
    prefixed = any(name.startswith(_FILE_PREFIX) for name in model.state_dict())
    return model, _FILE_PREFIX if prefixed else ""


def name_with_prefix(key: str, prefix: str) -> str:
    """A weight name with `prefix` in place of the prefix that files use."""
    return key if key.startswith(_PROJECTION) else prefix + key.removeprefix(_FILE_PREFIX)


def name_in_files(name: str) -> str:
    """The name of a weight or layer in files, whichever version of transformers is installed."""
    return name_with_prefix(name, _FILE_PREFIX)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load a CLIP tokenizer from `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Raises:
        CheckpointNotFoundError: the folder holds neither.
        CheckpointCorruptError: they cannot be read.
    """
    from transformers import CLIPTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointNotFoundError(
            f"{quote(folder)} holds no tokenizer; looked for {' and '.join(_TOKENIZER_FILES)}"
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    # The tokenizers library raises bare Exception for a malformed file.
    except Exception as error:
        raise CheckpointCorruptError(f"the tokenizer in {quote(folder)} cannot be read: {error}") from error
    # The options of loading must not be saved with the tokenizer.
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer's files atomically.

    Raises:
        OutputError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for made in sorted(Path(scratch).iterdir()):
            with atomic_write(folder / made.name) as file:
                file.write(made.read_bytes())
