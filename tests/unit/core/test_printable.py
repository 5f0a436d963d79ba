import pytest

from lora_gpt2.core.printable import printable, shorten, show_value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x1b]52;c;aGk=\x07", "\\x1b]52;c;aGk=\\x07"),
        ("a\rb\nc\td", "a\\rb\\nc\\td"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("\u202egpj.exe\u2066", "\\u202egpj.exe\\u2066"),
        ("a\u2028b", "a\\u2028b"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("Grüße, 漢字 👩‍🚀 – C:\\x", "Grüße, 漢字 👩‍🚀 – C:\\x"),
    ],
)
def test_nothing_that_a_terminal_obeys_is_left(text, shown):
    assert printable(text) == shown


def test_lines_of_our_own_stay():
    assert printable("a\tb\n\x1bc\r\n", keep_lines=True) == "a\tb\n\\x1bc\\r\n"


def test_values_are_short_whatever_they_are():
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, deep, 10**5000, list(range(10**5)), {"\x1b": "\x1b"}):
        shown = show_value(value)
        assert len(shown) <= 80
        assert "\x1b" not in shown
    assert show_value("a") == "'a'"
    assert len(shorten("\x1b" * 1000)) == 80
