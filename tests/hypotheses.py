"""How many examples property tests try: what a test asks for, or a tenth for quick local use.

    @given(st.lists(st.floats()))
    @examples(60)

`make test` and CI try as many as that; `pytest --hypothesis-profile=dev` tries a tenth.
"""

from __future__ import annotations

from hypothesis import settings

_USUAL = 100
settings.register_profile("dev", deadline=None, max_examples=_USUAL // 10)


def examples(number: int) -> settings:
    """Try so many examples, each of which may take its time."""
    share = settings().max_examples / _USUAL
    return settings(max_examples=max(1, round(number * share)), deadline=None)
