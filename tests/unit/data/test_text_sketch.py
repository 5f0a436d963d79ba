"""What tells whether a text was trained on."""

from lora_gpt2.data.text_sketch import TextSketch, hash_shingles


def test_a_mix_whose_training_text_is_known_in_part_says_only_what_is_known():
    seen = "one two three four five six seven eight nine ten"
    whole = TextSketch.build([hash_shingles(seen)])
    part = TextSketch.build([hash_shingles(seen)], is_whole=False)
    other = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
    assert (whole.count_seen([seen, other]), part.count_seen([seen, other])) == (1, 1)
    assert (whole.count_seen([other]), part.count_seen([other])) == (0, None)
