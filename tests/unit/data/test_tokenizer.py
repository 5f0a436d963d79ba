import pytest

from lora_gpt2.core.errors import CorruptError, DataError, NotFoundError
from lora_gpt2.data.tokenizer import TextStream, load_tokenizer

ODD = ["", " ", "a", "the cat", "ä€😀", "👩‍👩‍👧", "\u200bمرحبا", "\0\x07", "<|endoftext|>", "\ufffd", "a\r\nb"]


@pytest.fixture
def tokenizer(base_folder):
    return load_tokenizer(base_folder, 0)


@pytest.mark.parametrize("text", ODD)
def test_text_survives_and_a_stream_equals_the_whole(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = TextStream(tokenizer)
    assert "".join([*(stream.push(i) for i in ids), stream.finish()]) == text
    assert tokenizer.eos_id not in ids, "EOS inside text is ordinary characters"


def test_a_stream_never_shows_half_a_character(tokenizer):
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode("😀")]
    assert pieces == ["", "", "", "😀"]
    stream = TextStream(tokenizer)
    assert [stream.push(tokenizer.encode("😀")[0]), stream.finish()] == ["", "\ufffd"]


def test_a_lone_surrogate_is_a_data_error(tokenizer):
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("\ud800")


def test_eos_is_the_last_id_and_the_fingerprint_depends_on_the_vocabulary(tokenizer, tmp_path, base_folder):
    assert tokenizer.eos_id == tokenizer.vocab_size - 1
    assert tokenizer.fingerprint == load_tokenizer(base_folder, 0).fingerprint
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((base_folder / name).read_bytes())
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n", encoding="utf-8")
    assert load_tokenizer(tmp_path, 0).fingerprint != tokenizer.fingerprint


def test_missing_and_foreign_tokenizers_are_refused(tmp_path):
    with pytest.raises(NotFoundError):
        load_tokenizer(tmp_path, 0)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}')
    with pytest.raises(CorruptError):
        load_tokenizer(tmp_path, 0)


def test_gpt2s_own_vocabulary_tokenises_as_tokenizers_does(shared):
    from tokenizers import Tokenizer

    ours = load_tokenizer(shared / "gpt2_tokenizer", 50256)
    theirs = Tokenizer.from_file(str(shared / "gpt2_tokenizer" / "tokenizer.json"))
    text = "It's GPT-2's tokenizer:  2 spaces,\n\ttabs, naïve 😀 don't."
    assert ours.encode(text) == theirs.encode(text).ids
    assert (ours.vocab_size, ours.eos_id) == (50257, 50256)
    assert theirs.encode("<|endoftext|>").ids == [50256]
    assert 50256 not in ours.encode("<|endoftext|>")
