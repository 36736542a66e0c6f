"""Check that requested precision reaches the compiled products."""

import jax
import jax.numpy as jnp
import pytest

from lwm.core.hardware import precise


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("bfloat16", False)])
def test_float32_products_are_exact_and_others_are_not_slowed_down(
    dtype: str, exact: bool
) -> None:
    x = jnp.ones((4, 4), dtype)
    lowered = jax.jit(precise(lambda x: x @ x, dtype)).lower(x).as_text()
    assert ("precision = [HIGHEST, HIGHEST]" in lowered) == exact
    assert "HIGHEST" not in jax.jit(lambda x: x @ x).lower(x).as_text()
