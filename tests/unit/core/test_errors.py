import inspect

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
