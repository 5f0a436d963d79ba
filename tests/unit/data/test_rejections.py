from lora_gpt2.data.pipeline import ReadSummary
from lora_gpt2.data.rejections import MAX_SAME, UNREADABLE, Rejections
from lora_gpt2.data.shards import ShardReport


def test_the_first_of_many_that_are_the_same_are_kept_and_the_others_counted():
    rejections = Rejections()
    for number in range(1000):
        rejections.add({"origin": "", "reason": UNREADABLE, "text": f"a.csv:{number}: 3 cells, expected 2"})
    rejections.add({"origin": "", "reason": UNREADABLE, "text": "a.csv:7: not JSON", "count": 5})
    rejections.add({"origin": "a", "reason": "empty", "text": ""})
    assert len(rejections.entries) == MAX_SAME + 2
    assert sum(entry.get("count", 1) for entry in rejections.entries) == 1006
    assert rejections.entries[0]["text"] == "a.csv:0: 3 cells, expected 2"


def test_entries_that_differ_are_all_kept():
    entries = [{"origin": str(n), "reason": "too short", "text": f"text {n}"} for n in range(1000)]
    assert Rejections(entries).entries == entries


def test_reports_begin_empty():
    assert ReadSummary().bad.entries == ShardReport().rejected == []
