import inspect
import pickle
import traceback

import pytest

from lora_gpt2.core import errors
from lora_gpt2.core.errors import LoraGpt2Error

CODES = {
    "LoraGpt2Error": 1,
    "UsageError": 2,
    "RecipeError": 2,
    "DataError": 3,
    "NotFoundError": 4,
    "IntegrityError": 5,
    "CorruptError": 5,
    "MismatchError": 5,
    "ConflictError": 6,
    "ResourceError": 7,
    "BusyError": 7,
    "InterruptedRunError": 6,
    "EngineFailed": 7,
    "TrainingDiverged": 8,
    "CheckFailed": 9,
    "Interrupted": 130,
    "Waiting": 130,
}


def test_every_error_has_its_exit_code():
    found = {n: c.exit_code for n, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, LoraGpt2Error)}
    assert found == CODES


def test_the_module_docstring_names_every_error_with_its_code():
    for name, code in CODES.items():
        if name != "LoraGpt2Error":
            lines = [line for line in errors.__doc__.splitlines() if f" {name} " in f"{line} "]
            assert any(str(code) in line for line in lines), name


def test_an_error_carries_message_and_hint():
    error = errors.DataError("found this", "type that")
    assert (str(error), error.message, error.hint) == ("found this", "found this", "type that")


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        (
            "name it with --set data.encoding=NAME, or use --set data.encoding_errors=replace",
            "name it with settings={'data.encoding': NAME}, or use settings={'data.encoding_errors': 'replace'}",
        ),
        (
            "give more, or a file: --set data.validation=[FILE]",
            "give more, or a file: settings={'data.validation': [FILE]}",
        ),
        ("build it with --set data.template='{a} {b}'", "build it with settings={'data.template': '{a} {b}'}"),
        ("--resume continues it, --fresh starts over", "resume=True continues it, fresh=True starts over"),
        (
            "leave it out with --set generate.constrained=false",
            "leave it out with settings={'generate.constrained': False}",
        ),
        ("a budget of forgetting, such as --forget 0.1", "a budget of forgetting, such as forget=0.1"),
        ("shorten it, or use --truncate left to keep its end", "shorten it, or use truncate_left=True to keep its end"),
        ("use --base FOLDER", "use base=FOLDER"),
        ("such as --base gpt2", "such as base='gpt2'"),
        ("say it with --base, such as --base nano", "say it with base=, such as base='nano'"),
        ("'adapters import x --name N --rank 3' makes it", "'adapters import x --name N --rank 3' makes it"),
        ("another store is named with --store or", "another store is named with store= or"),
        ("see 'lora-gpt2 train --resume'", "see 'lora-gpt2 train --resume'"),
        ("pass texts", "pass texts"),
    ],
)
def test_a_traceback_ends_with_the_hint_in_pythons_words(hint, shown):
    error = pickle.loads(pickle.dumps(errors.DataError("found this", hint)))
    lines = "".join(traceback.format_exception(error)).splitlines()
    assert lines[-2:] == ["lora_gpt2.core.errors.DataError: found this", shown]
