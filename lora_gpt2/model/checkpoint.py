"""A base on disk: the bundled one, a folder, or one from the hub; its configuration and tokenizer.

Never imports torch, so that preparing text does not pay for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_gpt2.core.errors import CorruptError, DataError, NotFoundError, ResourceError, UsageError
from lora_gpt2.core.hub import download
from lora_gpt2.core.strict_json import load_json
from lora_gpt2.core.user_files import read_user_text
from lora_gpt2.data.tokenizer import Tokenizer, load_tokenizer
from lora_gpt2.model.config import GPT2Config, parse_config
from lora_gpt2.model.weight_files import has_own_head

GENERATION_CONFIG = "generation_config.json"

BUNDLED = Path(__file__).parent.parent / "bases"
HUB_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = [
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
]
MAX_CONFIG_BYTES = 2**20
OFFLINE_HINT = (
    "copy its folder (config.json, model.safetensors, tokenizer.json) from another machine: --base FOLDER; "
    "to try things out, --base nano is in the package"
)


def list_bundled() -> list[str]:
    """Returns the names of the bases in the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def find_base(name: str) -> Path:
    """Returns the folder of a base; asks the hub only for the known names and `owner/name`.

    Raises:
        NotFoundError: nothing has that name.
        ResourceError: it would have to come from the hub, and the hub cannot be reached.
    """
    if not name.strip():  # Path("") is the current folder
        raise NotFoundError("the base has no name", f"known are {', '.join([*list_bundled(), *HUB_NAMES])}")
    if name in list_bundled():
        return BUNDLED / name
    if (Path(name) / "config.json").is_file() and name not in HUB_NAMES:
        return Path(name)
    if name in HUB_NAMES or (HUB_ID.fullmatch(name) and not Path(name).exists()):
        return download(
            HUB_NAMES.get(name, name), HUB_FILES, ("config.json", "*.safetensors"), "the base", OFFLINE_HINT
        )
    known = ", ".join([*list_bundled(), *HUB_NAMES])
    raise NotFoundError(f"there is no base '{name}'", f"known are {known}; or give a hub id or a folder")


def name_everywhere(name: str) -> str:
    """Returns the name of a base by which it is found from any folder: that of one on disk becomes its whole path."""
    is_known = name in list_bundled() or not Path(name).is_dir()
    return name if is_known else str(Path(name).resolve())


def shorten_base_name(name: str) -> str:
    """Returns the short name of a base that a folder of ours or a hub id names, else the name as it is."""
    bundled = {str(BUNDLED / short): short for short in list_bundled()}
    known = bundled | {identifier: short for short, identifier in HUB_NAMES.items()}
    return known.get(name) or known.get(os.path.abspath(name)) or name


def locate_for_peft(name: str) -> str:
    """Returns what transformers and PEFT load a base by: a folder for a bundled one, the hub's id for a known name."""
    return str(BUNDLED / name) if name in list_bundled() else HUB_NAMES.get(name, name)


def _read_json(folder: Path) -> dict[str, Any]:
    """Returns the parsed `config.json` of a base's folder."""
    try:
        values = load_json(read_user_text(folder / "config.json", max_bytes=MAX_CONFIG_BYTES))
    except NotFoundError as error:
        raise NotFoundError(f"{folder} has no config.json", "give a Hugging Face GPT-2 folder") from error
    except (UsageError, DataError, ResourceError, ValueError, RecursionError) as error:
        raise CorruptError(f"{folder / 'config.json'} is not JSON", "copy the checkpoint again") from error
    if not isinstance(values, dict):
        raise CorruptError(f"{folder / 'config.json'} is not a JSON object", "copy the checkpoint again")
    return values


@dataclass(frozen=True)
class Checkpoint:
    """A base on disk, in Hugging Face's format; its configuration is read once.

    Args:
        folder: where its files are.
        values: `config.json` as it is.
        config: what we run of it.
    """

    folder: Path
    values: Mapping[str, Any]
    config: GPT2Config

    @classmethod
    def open(cls, name: str) -> Checkpoint:
        """Returns the checkpoint of a base; see `find_base` for names and errors.

        Raises `CorruptError` or `MismatchError` if its configuration is not that of a GPT-2 that we run.
        """
        return cls.read(find_base(name))

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Returns the checkpoint in a folder; raises as `open`."""
        values = _read_json(folder)
        config = parse_config(values, str(folder / "config.json"))
        if config.tie_word_embeddings and has_own_head(folder):
            config = replace(config, tie_word_embeddings=False)
        return cls(folder, values, config)

    def load_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer; raises as `load_tokenizer`."""
        return load_tokenizer(self.folder, self.config.eos_id, self.config.vocab_size, self._list_ends())

    def _list_ends(self) -> list[list[int]]:
        """Returns the lists of tokens that end a text, of the configuration and of `generation_config.json`."""
        try:
            own = load_json((self.folder / GENERATION_CONFIG).read_bytes())
        except (OSError, ValueError, RecursionError):
            own = {}
        found = [values.get("eos_token_id") for values in (self.values, own) if isinstance(values, Mapping)]
        return [[each for each in ends if type(each) is int] for ends in found if isinstance(ends, list)]
