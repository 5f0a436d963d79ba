"""Half of a surrogate pair is no text, wherever JSON comes from."""

import json

import pytest

from lora_gpt2.core.errors import CorruptError
from lora_gpt2.core.strict_json import load_json
from lora_gpt2.store.peft.config import parse_peft_config


def test_what_cannot_be_written_as_utf_8_is_refused():
    assert load_json(b'{"a": "\\ud83d\\ude00", "b": "\\\\ud800"}') == {"a": "\U0001f600", "b": "\\ud800"}
    for wrong in ('{"a": "\\ud800"}', '{"\\uDFFF": 1}', '[["x\\ud800y"]]', b'"\xff"', "{"):
        with pytest.raises(ValueError, match=r"."):
            load_json(wrong)


def test_a_configuration_with_one_is_damaged_not_a_bug():
    for key in ("target_modules", "exclude_modules", "rank_pattern"):
        value = {"\ud800": 4} if key == "rank_pattern" else ["c_attn", "\ud800"]
        content = json.dumps({"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], key: value}).encode()
        with pytest.raises(CorruptError, match="is not JSON"):
            parse_peft_config(content, "here")
