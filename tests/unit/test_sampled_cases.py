"""tests/sampled_cases.py: what make test leaves to make test-all."""

import dataclasses
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetcomp import frontend
from hetcomp.ir.plan import Plan
from tests.reference.tiny_models import EACH_OP, OTHERS, build
from tests.sampled_cases import each_choice, left_out

CASES = st.lists(st.fixed_dictionaries({name: st.sampled_from("abc") for name in ("x", "y", "z")}), max_size=20)


@given(CASES)
def test_every_value_is_in_some_case_that_stays(cases):
    chosen = [cases[i] for i in each_choice(cases)]
    assert {pair for c in cases for pair in c.items()} == {pair for c in chosen for pair in c.items()}
    assert chosen == [c for i, c in enumerate(cases) if i in each_choice(cases)]


def test_a_product_shrinks_to_its_longest_side():
    cases = [{"format": f, "isa": i, "rows": r} for f, i, r in product("abcde", "xyz", "12")]
    assert len(each_choice(cases)) == 5


def test_marked_tests_and_combinations_are_left_out(pytester):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("a", [1, 2, 3])
        @pytest.mark.parametrize("b", [1, 2])
        def test_product(a, b): ...

        @pytest.mark.exhaustive
        def test_marked(): ...

        @pytest.mark.parametrize("a", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
        def test_one(a): ...

        def test_plain(): ...
        """
    )
    items, _ = pytester.inline_genitems()
    out = {item.name for item in left_out(items)}
    kept = {item.name for item in items} - out
    assert out >= {"test_marked", "test_one[2]"} and kept >= {"test_plain", "test_one[1]"}
    assert len([name for name in kept if name.startswith("test_product")]) == 3


def test_tests_of_what_a_fixture_makes_share_its_values_out(pytester):
    pytester.makepyfile(
        """
        import pytest

        pytestmark = pytest.mark.spread("made")

        @pytest.fixture(scope="module", params="abcdef")
        def made(request): ...

        def test_one(made): ...

        @pytest.mark.parametrize("rows", [1, 2])
        def test_other(made, rows): ...

        @pytest.mark.parametrize("rows", [1, 2])
        def test_of_something_else(rows): ...
        """
    )
    items, _ = pytester.inline_genitems()
    out = {item.name for item in left_out(items)}
    kept = sorted({item.name for item in items} - out)
    assert len([name for name in kept if "else" in name]) == 2
    shared = [name for name in kept if "else" not in name]
    assert {name.partition("[")[2][0] for name in shared} == set("abcdef")
    assert len(shared) == 6 and {name for name in shared if name.startswith("test_one")}
    assert {name[-2] for name in shared if name.startswith("test_other")} == {"1", "2"}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_families_that_make_test_compiles_have_every_variant_of_every_op():
    """A variant: the number of operands, functions and options as they are, of numbers that are no sizes whether they
    are 0 or 1, which are off."""

    def variants(family: str) -> set[tuple[object, ...]]:
        layers = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gpt_oss" else {}
        model = build(family, odd=True, num_hidden_layers=2, **layers)
        plan: Plan = frontend.load(model, context_length=16, max_batch=2, max_tokens=16, max_logit_rows=16).plan
        found: set[tuple[object, ...]] = set()
        for op in (op for template in plan.templates for op in template.ops):
            found.add((op.kind, len(op.inputs)))
            for name, value in dataclasses.asdict(op.attrs).items():
                if name.endswith(("heads", "dim")):
                    continue
                found.add((op.kind, name, value > 1 if type(value) in (int, float) else value))
        return found

    have = set().union(*map(variants, EACH_OP))
    assert {family: variants(family) - have for family in OTHERS} == {family: set() for family in OTHERS}
