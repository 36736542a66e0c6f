"""`lwm.load`: from a MODEL string to a model on this machine's devices, or on those of several
processes."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax

from lwm.checkpoints.add_vision import require_codebook
from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.open import open_checkpoint
from lwm.checkpoints.place import load_weights
from lwm.core.config import override
from lwm.core.distributed import together
from lwm.core.errors import ConfigError
from lwm.core.mesh import make_mesh, require_all_devices
from lwm.core.sharding import DECODE
from lwm.core.vocabulary import Vocabulary
from lwm.data.text.tokenizer import Tokenizer, checkpoint_tokenizer, read_tokenizer
from lwm.generation.codec import VqganCodec, load_vqgan
from lwm.generation.model import Model
from lwm.models.costs import BYTES
from lwm.models.llama import require_mesh


def open_tokenizer(checkpoint: Checkpoint, tokenizer: str | None) -> Tokenizer | None:
    """The tokenizer named by the user, or else the checkpoint's own, or None.

    Raises:
        CheckpointError: it is broken, or of an unknown kind.
    """
    own = checkpoint.vocabulary
    if tokenizer is not None:
        found = read_tokenizer(Path(tokenizer))
        if isinstance(own, Vocabulary) and found.chat_template is None:
            found = replace(found, chat_template=own.chat_template)
        return found
    return checkpoint_tokenizer(own)


def open_codec(
    checkpoint: Checkpoint, vqgan: Path | None, config: Path | None = None
) -> VqganCodec | None:
    """The VQGAN named by the user, or else the checkpoint's own, or None.

    Raises:
        ConfigError: its codes are not those of the model.
        CheckpointError: it is missing or broken.
    """
    path = checkpoint.vqgan if vqgan is None else vqgan
    if path is None:
        return None
    codec = load_vqgan(path, config=config)
    require_codebook(codec.config, str(path), checkpoint.config, checkpoint.source)
    return codec


def default_dtype() -> str:
    """float32 on a CPU, where it is the fast type; bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@together()
def load(
    model: str | Path,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    vqgan: str | Path | None = None,
    vqgan_config: str | Path | None = None,
    dtype: str | None = None,
    mesh: str | None = None,
    theta: float | None = None,
    context: int | None = None,
) -> Model:
    """Loads a model onto this machine's devices. Of several processes (`jax.distributed`), all
    must load it, and then ask the same of it: each gets every answer.

    Args:
        model: a directory (ours or Hugging Face Llama), a `.gguf` file, `params::FILE`,
            `trainstate_params::FILE`, `flax_params::FILE`, `hf:OWNER/NAME`, or a known name such
            as `smollm2`.
        config: for the original's checkpoints, a size such as `7b` or a JSON file of settings.
        tokenizer: a `tokenizer.json`, a `tokenizer.model` or a directory, where the checkpoint
            brings none.
        vqgan: what turns pictures into the model's codes, where the checkpoint brings none: a
            directory, a run that trained one, or the original's pickle.
        vqgan_config: for the original's pickle, a JSON file of its settings, unless they are its
            defaults.
        dtype: `float32` or `bfloat16`; by default the first on CPU and the second elsewhere.
        mesh: sizes of the axes data, fsdp, tensor, sequence, such as `1,1,1,4`; by default one
            device. Several processes need it, and all their devices must be in it.
        theta: base of the rotary positions, where another than the model's own is wanted.
        context: longest sequence in tokens, where another than the model's own is wanted; beyond
            what it was trained for it needs a larger theta, and usually training.

    Raises:
        CheckpointError: the model cannot be found or read.
        ConfigError: a setting is wrong, or the mesh does not fit the model or the machine.
        CapacityError: the weights do not fit into memory.
    """
    dtype = default_dtype() if dtype is None else dtype
    if dtype not in BYTES:
        raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(BYTES)}")
    laid = None if mesh is None else make_mesh(mesh)
    require_all_devices(laid)
    checkpoint = open_checkpoint(str(model), config=None if config is None else str(config))
    own = override(checkpoint.config, rope_theta=theta, max_sequence_length=context)
    checkpoint = replace(checkpoint, config=own)
    if laid is not None:
        require_mesh(checkpoint.config, laid, DECODE)
    opener = partial(open_tokenizer, checkpoint, None if tokenizer is None else str(tokenizer))
    if tokenizer is not None:  # asked for, so a fault in it is told at once
        given = opener()
        opener = lambda: given  # noqa: E731
    codec_opener = partial(
        open_codec,
        checkpoint,
        None if vqgan is None else Path(vqgan),
        None if vqgan_config is None else Path(vqgan_config),
    )
    if vqgan is not None:
        codec = codec_opener()
        codec_opener = lambda: codec  # noqa: E731
    return Model(
        source=checkpoint.source,
        config=checkpoint.config,
        weights=load_weights(checkpoint, dtype=dtype, mesh=laid),
        open_tokenizer=opener,
        open_codec=codec_opener,
        dtype=dtype,
        mesh=laid,
    )
