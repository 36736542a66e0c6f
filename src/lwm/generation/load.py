"""Load a model onto the devices of one or several processes by its MODEL string."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from lwm.checkpoints.add_vision import require_codebook
from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.open import open_checkpoint
from lwm.checkpoints.place import load_weights
from lwm.core.config import check_arguments, override
from lwm.core.distributed import together
from lwm.core.errors import ConfigError
from lwm.core.hardware import traits
from lwm.core.mesh import make_mesh, require_all_devices
from lwm.core.sharding import DECODE
from lwm.core.vocabulary import Vocabulary
from lwm.data.text.templates import TEMPLATES, choose_template, with_turn_end
from lwm.data.text.tokenizer import Tokenizer, checkpoint_tokenizer, read_tokenizer
from lwm.generation.codec import VqganCodec, load_vqgan
from lwm.generation.model import Model
from lwm.models.llama import require_mesh
from lwm.models.sizes import BYTES


def open_tokenizer(checkpoint: Checkpoint, tokenizer: str | Path | None) -> Tokenizer | None:
    """Open the tokenizer at a path, which defaults to the checkpoint's, if any."""
    vocabulary = checkpoint.vocabulary
    if tokenizer is None:
        result = checkpoint_tokenizer(vocabulary)
        if result is None:
            return None
    else:
        result = read_tokenizer(Path(tokenizer))
        if isinstance(vocabulary, Vocabulary) and result.chat_template is None:
            result = replace(result, chat_template=vocabulary.chat_template)
    for template in (choose_template("auto", result), *TEMPLATES.values()):
        result = with_turn_end(result, template)
    return replace(result, limit=checkpoint.config.vocab_size)


def open_codec(
    checkpoint: Checkpoint, vqgan: str | Path | None, config: str | Path | None = None
) -> VqganCodec | None:
    """Open the VQGAN at a path, which defaults to the checkpoint's, if any."""
    path = checkpoint.vqgan if vqgan is None else vqgan
    if path is None:
        return None
    codec = load_vqgan(path, config=config)
    require_codebook(codec.config, str(path), checkpoint.config, checkpoint.source)
    return codec


@check_arguments
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
    """Load a model onto this machine's devices.

    If there are several processes (`jax.distributed`), all must load the model and then make the
    same calls, and each gets every answer.

    Args:
        model: a directory (ours or Hugging Face Llama), a `.gguf` file, `params::FILE`,
            `trainstate_params::FILE`, `flax_params::FILE`, `hf:OWNER/NAME`, or a known name such
            as `smollm2`.
        config: for the original's checkpoints, a size such as `7b` or a JSON file of settings.
        tokenizer: a `tokenizer.json`, a `tokenizer.model` or a directory; defaults to the
            checkpoint's.
        vqgan: the VQGAN for images and videos: a directory, a run that trained one, or the
            original's pickle; defaults to the checkpoint's.
        vqgan_config: for the original's pickle, a JSON file of its settings; defaults to the
            original's default settings.
        dtype: `float32` or `bfloat16`; defaults to float32 on CPU and bfloat16 elsewhere.
        mesh: sizes of the axes data, fsdp, tensor, sequence, such as `1,1,1,4`; defaults to one
            device. Several processes need a mesh that contains all their devices.
        theta: base of the rotary positions; defaults to the model's.
        context: longest sequence in tokens; defaults to the model's. A longer one than the model
            was trained for needs a larger theta, and usually training.

    Raises:
        CheckpointError: the model cannot be found or read.
        ConfigError: a setting is wrong, or the mesh does not fit the model or the machine.
        CapacityError: the weights do not fit into memory.
    """
    dtype = traits().dtype if dtype is None else dtype
    if dtype not in BYTES:
        raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(BYTES)}")
    devices = None if mesh is None else make_mesh(mesh)
    require_all_devices(devices)
    checkpoint = open_checkpoint(str(model), config=None if config is None else str(config))
    settings = override(checkpoint.config, rope_theta=theta, max_sequence_length=context)
    checkpoint = replace(checkpoint, config=settings)
    if devices is not None:
        require_mesh(settings, devices, DECODE)
    # What the user names is opened at once, so that its errors come before the weights.
    tokenizer_opener = cache(partial(open_tokenizer, checkpoint, tokenizer))
    codec_opener = cache(partial(open_codec, checkpoint, vqgan, vqgan_config))
    if tokenizer is not None:
        tokenizer_opener()
    if vqgan is not None:
        codec_opener()
    return Model(
        source=checkpoint.source,
        config=settings,
        open_tokenizer=tokenizer_opener,
        open_codec=codec_opener,
        weights=load_weights(checkpoint, dtype=dtype, mesh=devices),
        dtype=dtype,
        mesh=devices,
    )
