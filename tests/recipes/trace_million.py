"""Writes, as JSON, the shapes of all values in a step of `text-1m` at 7B on 512 devices."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp

from lwm.core.mesh import make_mesh
from lwm.recipes.catalogue.by_name import recipe
from lwm.training.batches import Layout
from lwm.training.plan import Plan
from lwm.training.step import Batch


def shapes_inside(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of all values that a traced function makes, loops and branches included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {variable.aval.shape for variable in equation.outvars}
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    found |= shapes_inside(inner)
    return found


def main() -> None:
    run = recipe("text-1m")
    mesh = make_mesh("1,4,16,8")
    config = run.model.resolve(run.sequence_length, None, "")
    plan = Plan(
        config=config, mesh=mesh, optimizer=run.optimizer, compute=run.compute, lora=run.lora,
        steps=run.loop.steps,
    )  # fmt: skip
    layout = Layout(mesh, run.batch_size, run.accumulate, run.sequence_length)
    shaped = partial(jax.ShapeDtypeStruct, layout.shape, sharding=layout.sharding)
    integers = dict.fromkeys(("tokens", "targets", "positions", "segments"), shaped(jnp.int32))
    batch = Batch(**integers, weights=shaped(jnp.float32))  # type: ignore[arg-type]
    traced = jax.make_jaxpr(plan.step())(plan.template(), None, batch)
    json.dump(sorted(shapes_inside(traced.jaxpr)), sys.stdout)


if __name__ == "__main__":
    main()
