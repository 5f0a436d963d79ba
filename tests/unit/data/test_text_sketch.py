"""What tells whether a text was trained on."""

import numpy as np

from lora_gpt2.data.text_sketch import TextSketch, _winnow, hash_shingles, split_words


def test_a_mix_whose_training_text_is_known_in_part_says_only_what_is_known():
    seen = "one two three four five six seven eight nine ten"
    whole = TextSketch.build([hash_shingles(seen)])
    part = TextSketch.build([hash_shingles(seen)], is_whole=False)
    other = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
    assert (whole.count_seen([seen, other]), part.count_seen([seen, other])) == (1, 1)
    assert (whole.count_seen([other]), part.count_seen([other])) == (0, None)


def test_a_sketch_of_before_is_read_by_the_rule_of_before():
    """It lacks the hashes of whole documents that keep two or three shingles."""
    texts = [write_words(55, seed) for seed in range(40)]
    new = TextSketch.build([hash_shingles(text) for text in texts])
    old = TextSketch.from_bytes(TextSketch.build([_winnow(split_words(text)) for text in texts]).shingles.tobytes())
    assert (new.knows_wholes, old.knows_wholes) == (True, False)
    assert TextSketch.from_bytes(new.to_bytes()).knows_wholes
    assert not TextSketch.join([new, old]).knows_wholes
    assert [sketch.count_seen(texts) for sketch in (new, old, TextSketch.join([new, old]))] == [40, 40, 40]
    assert old.count_seen([write_words(55, seed) for seed in range(40, 80)]) == 0


def write_words(count, seed):
    return " ".join(f"w{value}" for value in np.random.default_rng(seed).integers(500, size=count))


def test_a_short_text_was_trained_on_as_a_whole_or_with_its_neighbours():
    """Texts of one kind have runs of eight words in common; that alone says nothing."""
    common = write_words(9, 0)
    trained = [f"{common} {write_words(8, seed)}" for seed in range(1, 40)]
    sketch = TextSketch.build([hash_shingles(text) for text in trained])
    assert sketch.count_seen([f"{common} {write_words(8, seed)}" for seed in range(50, 90)]) == 0
    assert sketch.count_seen([trained[3].upper(), f"{common} x", trained[7]]) == 2
    parts = [write_words(12, seed) for seed in range(200, 212)]
    draws = map(np.random.default_rng, range(400))
    stock = [f"{' '.join(draw.choice(parts, 2))} {write_words(30, 1000 + k)}" for k, draw in enumerate(draws)]
    of_stock = TextSketch.build([hash_shingles(text) for text in stock[:200]])
    assert of_stock.count_seen(stock[200:]) == 0, "of 200 of which nearly half are the same phrases"
    assert of_stock.count_seen(stock[:200]) == 200
    book = write_words(400, 7)
    lines = [" ".join(book.split()[start : start + 10]) for start in range(0, 400, 10)]
    whole = TextSketch.build([hash_shingles(book)])
    assert whole.count_seen(lines) >= 35, "its lines, one after the other"
    assert whole.count_seen([write_words(10, seed) for seed in range(100, 140)]) == 0
    assert whole.count_seen([book, write_words(60, 9)]) == 1
