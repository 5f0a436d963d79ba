import json
import pickle
import shutil
import warnings

import pytest
import torch
from transformers import GPT2LMHeadModel, GPT2TokenizerFast

import lora_gpt2
from lora_gpt2.core.errors import CorruptError, DataError, MismatchError, NotFoundError
from lora_gpt2.core.fingerprint import fingerprint_json
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.data.tokenizer import EOS, TextStream, Tokenizer, load_tokenizer
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import DataSettings

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


@pytest.fixture
def grown(base_folder, tmp_path):
    """A base whose vocabulary was extended, as `add_tokens` and `resize_token_embeddings` do it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GPT2LMHeadModel.from_pretrained(base_folder)
        theirs = GPT2TokenizerFast.from_pretrained(base_folder)
        theirs.add_tokens(["fridge", "dog house", "Kühlschrank"])
        theirs.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"]})
        model.resize_token_embeddings(len(theirs))
        model.save_pretrained(tmp_path / "grown")
        theirs.save_pretrained(tmp_path / "grown")
    return tmp_path / "grown", theirs


def test_added_tokens_decode_as_transformers_decodes_them(grown):
    folder, theirs = grown
    ours = load_base(str(folder), choose_runtime("float32", torch.device("cpu"))).tokenizer
    text = "the fridge and <|user|>dog house<|bot|> run"
    ids = theirs(text)["input_ids"]
    assert {theirs.convert_tokens_to_ids(t) for t in ("fridge", "<|user|>")} <= set(ids)
    assert ours.decode(ids) == theirs.decode(ids) == text
    stream = TextStream(ours)
    assert "".join([*map(stream.push, ids), stream.finish()]) == text
    assert ours.decode([ours.eos_id]) == ""
    beyond_ascii = "the Kühlschrank"  # transformers reads an added token's letters as GPT-2's stand-ins for bytes
    assert (
        ours.decode(theirs(beyond_ascii)["input_ids"])
        == beyond_ascii
        != theirs.decode(theirs(beyond_ascii)["input_ids"])
    )


def test_added_special_tokens_are_tokens_in_any_text_and_eos_is_none(grown):
    folder, theirs = grown
    ours = load_tokenizer(folder, 0)
    for reading in (ours, pickle.loads(pickle.dumps(ours))):
        assert reading.encode("the <|user|> asks<|bot|>") == theirs("the <|user|> asks<|bot|>")["input_ids"]
        text = f"the <|user|> asks {EOS} now<|bot|>{EOS}"
        assert reading.eos_id not in reading.encode(text), "EOS is only ever set by us"
        assert reading.decode(reading.encode(text)) == text
        assert {theirs.convert_tokens_to_ids(token) for token in ("<|user|>", "<|bot|>")} <= set(reading.encode(text))
        assert reading.fingerprint == ours.fingerprint


def test_added_tokens_of_slow_tokenizers_are_read(base_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(base_folder / name, tmp_path / name)
    count = len(json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<two>": count + 1, "<one>": count}))
    ours = load_tokenizer(tmp_path, count - 1)
    assert ours.encode("<one>the<two>") == [count, *ours.encode("the"), count + 1]
    assert ours.decode([count + 1, count]) == "<two><one>"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<one>": count + 7}))
    with pytest.raises(CorruptError, match="which does not follow"):
        load_tokenizer(tmp_path, count - 1)


def test_what_the_tokenizers_own_settings_call_eos_is_in_texts_and_stops_them(base_folder, tmp_path):
    theirs = GPT2TokenizerFast.from_pretrained(base_folder)
    theirs.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    theirs.save_pretrained(tmp_path)
    for ours in (own := load_tokenizer(tmp_path, 5), pickle.loads(pickle.dumps(own))):
        assert ours.eos_id == theirs.bos_token_id, "between documents GPT-2's own"
        assert ours.stop_id == theirs.eos_token_id != ours.eos_id
        assert ours.stop_ids == {ours.eos_id, ours.stop_id}
        before = Tokenizer(ours.backend, ours.stop_id)  # EOS was the one of the settings
        assert ours.fingerprints == {ours.fingerprint, before.fingerprint}
        assert len(ours.fingerprints) == 2
        text = "<|im_start|>user\n a <|im_end|>\n<|im_start|>assistant\n"
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.eos_id not in ours.encode(f"{text} {EOS} c")
        assert ours.decode(ours.encode(f"{text} {EOS} c")) == f"{text} {EOS} c"
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    plain = load_tokenizer(tmp_path, 5)
    assert (plain.eos_id, plain.stop_id) == (theirs.bos_token_id, theirs.bos_token_id)


def test_a_vocabulary_without_gpt2s_eos_has_the_one_that_its_settings_name(base_folder, tmp_path):
    GPT2TokenizerFast.from_pretrained(base_folder).save_pretrained(tmp_path)
    whole = tmp_path / "tokenizer.json"
    whole.write_text(whole.read_text(encoding="utf-8").replace(EOS, "</s>"), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    ours = load_tokenizer(tmp_path, 5)
    assert ours.eos_id == ours.stop_id == ours.backend.token_to_id("</s>") != 5
    assert ours.eos_id not in ours.encode("a </s> b"), "EOS is only ever set by us"


def test_the_fingerprint_covers_added_tokens_and_is_as_it_was_without_any(grown, base_folder):
    plain, more = load_tokenizer(base_folder, 0), load_tokenizer(grown[0], 0)
    assert plain.fingerprint != more.fingerprint
    model = json.loads(plain.backend.to_str())["model"]
    was = fingerprint_json({"vocab": model["vocab"], "merges": model["merges"], "eos": plain.eos_id})
    assert plain.fingerprint == was


def test_special_tokens_of_a_base_are_the_same_in_training_evaluation_and_generation(grown, tmp_path, reporter):
    folder, theirs = grown
    path = tmp_path / "chats.jsonl"
    texts = [f"<|user|>the {n}<|bot|>cat {n}" for n in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepared = prepare_data(DataSettings(sources=(str(path),), block_size=16), load_tokenizer(folder, 0), reporter)
    assert theirs.convert_tokens_to_ids("<|user|>") in prepared.train.stream
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = torch.tensor([[theirs.convert_tokens_to_ids(EOS), *theirs(texts[0])["input_ids"]]])
    expected = model(ids, labels=ids).loss.item()
    ours = lora_gpt2.load(str(folder), dtype="float32")
    score = ours.perplexity(texts[0])
    assert (score.tokens, score.nll_nats_per_token) == (ids.shape[1] - 1, pytest.approx(expected, rel=1e-5))
    longer = model.generate(ids[:, 1:], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert ours.generate(texts[0], temperature=0, max_new_tokens=5).text == theirs.decode(longer[0, ids.shape[1] - 1 :])


@pytest.mark.parametrize("number", [300, 2**20, 2**31])
def test_a_vocabulary_with_gaps_is_one_of_its_largest_number(base_folder, tmp_path, number):
    folder = tmp_path / "gaps"
    shutil.copytree(base_folder, folder)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab["the"] = number
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    tokenizer = load_tokenizer(folder, vocab["<|endoftext|>"])
    assert tokenizer.vocab_size == number + 1
    with pytest.raises(MismatchError, match=f"has ids up to {number}, the model has"):
        load_base(str(folder), choose_runtime("float32"))
    if number == 300:
        assert tokenizer.token_bytes[number] == b"the"
        assert tokenizer.decode(tokenizer.encode("the king")) == "the king"
