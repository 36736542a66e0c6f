"""Encode the groups of `tokenize` on many machines, as a Ray Data dataset.

Ray starts workers that load the VQGAN, and repeats the groups of a lost machine.
Files and VQGAN need the same paths on every machine.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lwm.core.errors import ConfigError, InputError
from lwm.curation.tokenize import EncodeGroups, FrameSettings, Group, Outcome, encode_group
from lwm.generation.codec import load_vqgan


class _Worker:
    def __init__(self, vqgan: Path, config: Path | None, settings: FrameSettings) -> None:
        self._codec = load_vqgan(vqgan, config=config)
        self._settings = settings

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        paths = [Path(path) for path in json.loads(row["paths"])]
        outcomes = encode_group(self._codec, paths, self._settings)
        # As one string, because Ray's tables have no lists of lists of lists.
        return {"group": row["group"], "outcomes": json.dumps(outcomes)}


def encode_on_ray(
    vqgan: Path, config: Path | None, settings: FrameSettings, workers: int | None = None
) -> EncodeGroups:
    """Return a function that encodes groups on the cluster of RAY_ADDRESS, or on this machine.

    Args:
        config: as for `load_vqgan`.
        workers: defaults to one for each GPU, or one for each machine without GPUs.
    """
    try:
        import ray.data  # type: ignore[import-not-found]
        import ray.exceptions  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            "the engine ray needs the package ray; install lwm[ray], or take --engine local"
        ) from error
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; it must be at least 1")
    arguments = (vqgan.absolute(), config and config.absolute(), settings)

    def encode(groups: Sequence[Group]) -> Iterator[list[Outcome]]:
        if not groups:
            return
        started = not ray.is_initialized()
        if started:
            ray.init(log_to_driver=False, logging_level="warning")
        try:
            yield from _in_order(_encoded_rows(ray, groups, arguments, workers))
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]  # after the worker's traceback
            raise InputError(
                f"a Ray worker failed ({reason}); repair it and repeat the command, which resumes"
            ) from error
        finally:
            if started:
                ray.shutdown()

    return encode


def _encoded_rows(
    ray: Any, groups: Sequence[Group], arguments: tuple[Any, ...], workers: int | None
) -> Iterator[dict[str, Any]]:
    gpus = int(ray.cluster_resources().get("GPU", 0))
    machines = sum(node["Alive"] for node in ray.nodes())
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # `tokenize_files` shows one
    context.execution_options.preserve_order = True
    rows = [
        {"group": number, "paths": json.dumps([str(file.path.absolute()) for file in group])}
        for number, group in enumerate(groups)
    ]
    encoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Worker,
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(size=min(workers or gpus or machines, len(rows))),
        num_gpus=1 if gpus else 0,
        num_cpus=1,
    )
    return encoded.iter_rows()


def _in_order(rows: Iterator[dict[str, Any]]) -> Iterator[list[Outcome]]:
    early: dict[int, list[Outcome]] = {}
    following = 0
    for row in rows:
        early[row["group"]] = [Outcome(*one) for one in json.loads(row["outcomes"])]
        while following in early:
            yield early.pop(following)
            following += 1
