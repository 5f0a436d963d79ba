"""Distances between adapters, and the plane that shows them."""

import numpy as np
import pytest
import torch

from lora_gpt2.core.chart import THEME
from lora_gpt2.evaluation.difference import draw_difference
from lora_gpt2.evaluation.map import (
    FONT,
    LETTER,
    MARK,
    build_map_page,
    choose_label_offsets,
    draw_map,
    list_rows,
    map_perplexity,
    map_updates,
    measure_overlap,
    scale_distances,
)
from lora_gpt2.evaluation.matrix import Cell
from lora_gpt2.evaluation.perplexity import Score
from lora_gpt2.model.lora import Adapter, LoraUpdate
from lora_gpt2.model.merge import to_delta
from lora_gpt2.recipe import LoraSettings
from lora_gpt2.store.compare import compare_adapters
from tests.builders import make_adapter


def measure(points):
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def test_points_of_a_plane_are_found_again():
    points = np.random.default_rng(0).normal(size=(7, 2))
    found, shown = scale_distances(measure(points))
    assert measure(found) == pytest.approx(measure(points))
    assert shown == pytest.approx(1)
    again, _ = scale_distances(measure(points))
    assert np.array_equal(found, again)


def test_what_no_plane_shows_is_said():
    corners = np.eye(9)  # all equally far apart
    found, shown = scale_distances(measure(corners))
    assert shown == pytest.approx(2 / 8)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("number", [1, 2])
def test_one_or_two_points_are_a_map_too(number):
    found, shown = scale_distances(np.ones((number, number)) - np.eye(number))
    assert found.shape == (number, 2)
    assert shown == pytest.approx(1)


def test_distances_of_updates_are_those_of_the_dense_matrices(base):
    settings = LoraSettings(rank=3, targets=("c_attn", "mlp.c_proj"))
    adapters = {"law": make_adapter(base.config, 1), "code": make_adapter(base.config, 2, settings)}
    found = map_updates(adapters, base.config)
    assert found.names == ("base", "law", "code")

    def flatten(adapter):
        sites = sorted({site for each in adapters.values() for site in each.updates})
        shapes = {s: to_delta(a.updates[s]).shape for a in adapters.values() for s in a.updates}
        dense = [to_delta(adapter.updates[s]) if s in adapter.updates else torch.zeros(shapes[s]) for s in sites]
        return torch.cat([each.double().flatten() for each in dense])

    law, code = map(flatten, adapters.values())
    assert found.distances[0, 1] == pytest.approx(float(law.norm()), rel=1e-5)
    assert found.distances[1, 2] == found.distances[2, 1] == pytest.approx(float((law - code).norm()), rel=1e-5)
    assert found.cosines[1, 2] == pytest.approx(float(law @ code / law.norm() / code.norm()), abs=1e-6)
    assert found.coordinates[0].tolist() == [0, 0], "the base is in the middle"
    assert measure(found.coordinates) == pytest.approx(found.distances), "three points are a plane"
    assert [row[0] for row in list_rows(found)] == ["law", "code"]


def make_cell(adapter, source, nll):
    return Cell(adapter=adapter, source=source, score=Score(nll_nats=10 * nll, tokens=10, words=5, bytes=20))


def test_perplexity_counts_what_the_wrong_adapter_costs_both_ways():
    losses = {
        ("base", "law"): 4.0, ("base", "code"): 5.0,
        ("law", "law"): 3.0, ("law", "code"): 5.5,
        ("code", "law"): 4.5, ("code", "code"): 3.5,
    }  # fmt: skip
    found = map_perplexity([make_cell(*key, value) for key, value in losses.items()], ["law", "code"])
    assert found.distances[0].tolist() == pytest.approx([0, 1.0, 1.5])
    assert found.distances[1, 2] == pytest.approx(((4.5 - 3.0) + (5.5 - 3.5)) / 2)
    assert found.cosines is None


def test_a_neighbour_that_is_better_is_at_no_distance():
    losses = {
        ("base", "a"): 4.0,
        ("base", "b"): 4.0,
        ("a", "a"): 3.0,
        ("a", "b"): 2.0,
        ("b", "a"): 3.2,
        ("b", "b"): 2.5,
    }
    found = map_perplexity([make_cell(*key, value) for key, value in losses.items()], ["a", "b"])
    assert found.distances[1, 2] == 0


def test_pictures_and_pages_are_drawn_and_follow_the_theme(base):
    adapters = {f"<a{seed}>": make_adapter(base.config, seed) for seed in range(1, 5)}
    found = map_updates(adapters, base.config)
    assert draw_map(found).startswith(b"\x89PNG")
    assert draw_map(found, "svg") == draw_map(found, "svg"), "the same bytes"
    page = build_map_page(found, "nano")
    assert "&lt;a1&gt;" in page
    assert "<a1>" not in page
    assert not [colour for colour in THEME if f": {colour}" in page.partition("</style>")[2]], "none is fixed"


def test_a_difference_is_drawn_for_any_two_adapters(base):
    head = Adapter(
        updates={"lm_head": LoraUpdate(a=torch.ones(2, 16), b=torch.ones(base.config.vocab_size, 2), alpha=2.0)}
    )
    some = make_adapter(base.config, 1)
    for other in (make_adapter(base.config, 2), head, Adapter(updates={})):
        rows = compare_adapters(some, other, base.config)
        assert draw_difference(rows, ["one", "other"]).startswith(b"\x89PNG")


def test_names_cover_neither_each_other_nor_points_nor_leave_the_picture():
    points = np.array([[10.0, 50], [12, 51], [60, 50], [62, 49], [62, 51], [190, 90], [100, 10]])
    names = [f"name-{number}" for number in range(len(points))]
    window = np.array([0.0, 0, 200, 100])
    boxes = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in points]
    marks = len(boxes)
    for (x, y), name, (side, height) in zip(points, names, choose_label_offsets(points, names, window), strict=True):
        box = (x + side, y + height, x + side + LETTER * len(name), y + height + FONT)
        assert not any(measure_overlap(box, other) for other in boxes)
        assert measure_overlap(box, window) == pytest.approx(LETTER * len(name) * FONT)
        boxes.append(box)
    assert len(boxes) == 2 * marks
