"""Check the paper's text stages, and trace the last one at full size for 512 devices."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

from lwm.recipes.catalogue.index import recipe


def test_a_million_tokens_at_7b_make_no_square_and_no_logits():
    program = Path(__file__).with_name("trace_million.py")
    settings = {**os.environ, "JAX_NUM_CPU_DEVICES": "512", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, program], env=settings, capture_output=True, text=True, check=True
    )
    shapes = [tuple(shape) for shape in json.loads(done.stdout)]
    rows, length, layers, hidden, vocab = 4, 1 << 20, 32, 4096, 32000
    # The trace is complete: it has the activations of all layers, and blocks of attention.
    assert (layers, rows, length, hidden) in shapes
    assert any(shape[-2:] == (512, 512) for shape in shapes)
    # Over all devices nothing is larger than the activations that the layers keep.
    assert max(math.prod(shape) for shape in shapes) == layers * rows * length * hidden
    assert layers * rows * length * hidden < length**2
    parts = {vocab, vocab // 16}
    by_vocabulary = [shape for shape in shapes if parts & set(shape)]
    assert by_vocabulary
    assert max(math.prod(shape) for shape in by_vocabulary) < length * 2000 / 8


def test_the_stages_are_the_papers():
    """Check context, theta, tokens per batch, steps, warm-up and mesh."""
    table = {
        "text-32k": (32 << 10, 1e6, 1200, 100, "1,-1,4,1"),
        "text-128k": (128 << 10, 1e7, 3000, 200, "1,-1,8,1"),
        "text-256k": (256 << 10, 1e7, 3000, 200, "1,-1,16,1"),
        "text-512k": (512 << 10, 2.5e7, 720, 50, "1,-1,16,2"),
        "text-1m": (1 << 20, 5e7, 450, 25, "1,-1,16,4"),
    }
    for name, (length, theta, steps, warmup, mesh) in table.items():
        run = recipe(name)
        assert run.sequence_length == length
        assert run.model.rope_theta == theta
        assert run.batch_size * length == 4 << 20
        assert (run.loop.steps, run.optimizer.warmup_steps) == (steps, warmup)
        assert (run.mesh, run.model.size) == (mesh, "7b")
        assert run.optimizer.learning_rate == 4e-5
        assert run.optimizer.schedule == "constant"
