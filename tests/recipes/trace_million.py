"""Print, as JSON, the shapes of all values in a step of `text-1m` at 7B on 512 devices."""

import json
import sys
from typing import Any

import jax

from lwm.core.mesh import make_mesh
from lwm.recipes.catalogue.index import recipe
from lwm.training.batches import Batch, BatchLayout
from lwm.training.text import TextTraining


def shapes_inside(jaxpr) -> set[tuple[int, ...]]:
    """Return the shapes of all values that a traced function makes, also in loops and branches."""
    shapes = set()
    for equation in jaxpr.eqns:
        shapes |= {variable.aval.shape for variable in equation.outvars}
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    shapes |= shapes_inside(inner)
    return shapes


def abstract_batch(layout: BatchLayout) -> Any:
    ids, weights = (
        jax.ShapeDtypeStruct(layout.shape, dtype, sharding=layout.sharding)
        for dtype in ("int32", "float32")
    )
    arrays: Any = dict.fromkeys(Batch.__dataclass_fields__, ids) | {"weights": weights}
    return Batch(**arrays)


def main() -> None:
    run = recipe("text-1m")
    mesh = make_mesh("1,4,16,8")
    training = TextTraining(
        mesh=mesh,
        layout=BatchLayout(mesh, run.batch_size, run.accumulate, run.sequence_length),
        config=run.model.resolve(run.sequence_length, None, ""),
        optimizer=run.optimizer,
        compute=run.compute,
        steps=run.loop.steps,
    )
    arguments = (training.template(), None, abstract_batch(training.layout))
    traced = jax.make_jaxpr(training.compiled_step())(*arguments)
    json.dump(sorted(shapes_inside(traced.jaxpr)), sys.stdout)


if __name__ == "__main__":
    main()
