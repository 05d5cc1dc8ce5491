"""tests/sampled_cases.py: what make test leaves to make test-all."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

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
