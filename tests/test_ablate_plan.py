"""Plans of ablations: read strictly, and what a variant's settings come to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from llava_hd.bench.ablate_paper import quoted
from llava_hd.bench.ablate_plan import Plan, Variant, load_plan, plan_from, plan_names
from llava_hd.hd.errors import UsageError

GOOD = {"seeds": [3], "variants": {"full": {}, "linear": {"projector": "linear"}}}


def test_the_shipped_plans_are_read_and_written_back() -> None:
    assert {"paper", "tiny"} <= set(plan_names())
    for name in plan_names():
        plan = load_plan(name)
        assert plan_from(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_papers_plan_takes_back_each_of_its_choices_one_at_a_time() -> None:
    plan = load_plan("paper")
    tables = set()
    for name, variant in plan.variants.items():
        other = plan.against(name)
        if other is not None:
            found = quoted(variant.differing(plan.variants[other]))
            assert found is not None, name
            tables.add(found.choice)
    assert len(tables) == 7 and len(plan.seeds) >= 2
    assert {v.resolution for v in plan.variants.values()} == {224, 336, 448}
    assert {v.data_share for v in plan.variants.values()} == {1.0, 0.5, 0.3}


def test_what_the_paper_is_quoted_for_is_what_its_numbers_say() -> None:
    for settings in ({"projector": "linear"}, {"global_view": False}, {"resolution": 336}):
        table = quoted(Variant(**settings).differing(Variant()))
        assert table is not None and table.effect == "worse"
        without, with_it = ([float(cell) for cell in row[1:]] for row in table.rows)
        assert all(a < b for a, b in zip(without, with_it, strict=True))
    two = Variant(projector="linear", row_ends=False)
    assert quoted(two.differing(Variant())) is None
    assert quoted(Variant(steps_2=7).differing(Variant())) is None


def test_less_data_means_fewer_steps_unless_the_plan_says_otherwise() -> None:
    variants = {
        "all": Variant(),
        "third": Variant(data_share=0.3),
        "long": Variant(data_share=0.3, steps_2=9, steps_1=4),
    }
    plan = Plan(variants, steps_1=10, steps_2=5)
    assert [plan.steps(name) for name in variants] == [(10, 5), (10, 2), (4, 9)]
    assert replace(plan, steps_2=1).steps("third") == (10, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed is not a setting; did you mean 'seeds'?"),
        ({"variants": {}}, "variants must be a table"),
        ({"variants": {"full": {}}}, "two or more"),
        ({"variants": {"a": {}, "b": {}}}, "a and b are the same"),
        ({"variants": {"a": {}, "b": {"projecter": "linear"}}},
         "variants.b.projecter is not a setting; did you mean 'projector'?"),
        ({"variants": {"a": {}, "b": {"resolution": 448.0}}}, "variants.b.resolution"),
        ({"variants": {"a": {}, "b": {"resolution": 300}}}, "variants.b.resolution 300 is unknown"),
        ({"variants": {"a": {}, "b": {"resolution": 336, "row_ends": False}}},
         "variants.b.row_ends has no place at resolution 336"),
        ({"variants": {"a": {}, "b": {"data_share": 0}}}, "variants.b.data_share must be above 0"),
        ({"variants": {"a": {}, "b": {"steps_2": 0}}}, "variants.b.steps_2 must be 1 or more"),
        ({"variants": {"a": {}, "b": {"row_ends": False, "against": "c"}}},
         "variants.b.against 'c' is no earlier variant; there is a"),
        ({"variants": {"a": {}, "../b": {"row_ends": False}}}, "'../b' is no name"),
        ({"variants": {"a": {}, 3: {"row_ends": False}}}, "3 is no name"),
        ({"variants": {"a": {}, "b": 3}}, "variants.b must be a table of settings"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"seeds": "all"}, "seeds must be a list"),
        ({"steps_1": 0}, "steps_1 must be 1 or more"),
    ],
)  # fmt: skip
def test_a_bad_plan_is_told_in_a_line(tmp_path: Path, change: dict, words: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **change}))
    with pytest.raises(UsageError) as caught:
        load_plan(str(path))
    text = str(caught.value)
    assert text.startswith(str(path)) and words in text and "\n" not in text


def test_a_plan_that_is_not_there_and_one_that_is_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plan papre: no such file; the shipped ones are paper"):
        load_plan("papre")
    (tmp_path / "p.yaml").write_text("variants: [")
    with pytest.raises(UsageError, match="is not YAML"):
        load_plan(str(tmp_path / "p.yaml"))
