"""Opening a model: which folder, which precision, what streams; then the passes, and a Pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .checkpoint import artifact, hub
from .checkpoint.checkpoint import Checkpoint, model_folder
from .checkpoint.lora import Loras, Merged, require_same, resolve_loras
from .compile import Program, compile_network, load_program
from .config import (
    DTYPES,
    SizeRule,
    check_choice,
    check_count,
    parse_bytes,
    resolve_device,
    resolve_dtype,
    resolve_precision,
    resolve_sampler,
)
from .errors import ConfigError
from .families import family_of
from .host_memory import keep_freed_memory
from .ops.native import library
from .passes.fold import Schedule
from .pipeline import Pipeline
from .plan import Plan
from .planning import precision as precisions
from .planning.memory_plan import plan_memory
from .runtime import out_of_memory
from .runtime.capture import MODES, open_captures
from .sampling.sampler import SamplerConfig, preset, schedule
from .stages.tiles import check_tile
from .stages.vae import PreviewDecoder

DEMO = Path(__file__).parent / "demo"


@out_of_memory.named("loading")
def load(
    path: str | Path = "demo", *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
    nfe: int | None = None, sampler: SamplerConfig | str | None = None, loras: Loras | None = None,
    progress: Callable[[str, int], None] | None = None, precision: str | None = None,
    exempt: Sequence[str] | str | Path = (), fp8_attention: bool = False,
    text_precision: str | None = None, text_exempt: Sequence[str] = (),
    prompt_cache: int = 0, download: bool = False, capture: str = "auto", batch_invariant: bool = False,
    memory_budget: int | str | None = None, largest: tuple[int | None, int | None, int] | None = None,
    tile: int | None = None,
    preview: str | Path | None = None,
) -> Pipeline:  # fmt: skip
    """Loads and compiles a model folder in diffusers' layout, "demo", the miniature that ships along, or
    hf://owner/name[@revision][/subfolder] from the cache of the Hugging Face hub.

    device: default the GPU if there is one. dtype: default the checkpoint's, or float32 where the
    device cannot compute in that at full rate. nfe: evaluations per image the network is folded for
    (default 1). loras: adapters to merge, {path: weight} or [path or (path, weight), ...]; an artifact
    takes those it was saved with, or None. progress(part, bytes) is called as tensors arrive.
    precision: "fp32", "fp16" or "bf16", the dtypes; "int8" (CPUs, NVIDIA GPUs from compute capability 8.0 on) or "fp8"
    (GPUs from 8.9 on; a CPU emulates it, slowly): linear layers of the transformer's blocks with 8-bit weights and
    activations; None: what suits checkpoint and device; "auto": that, or int8, fp8 or bf16 if it measured faster here
    and accurate (`twinflow-rt sensitivity --save`; the plan says why). exempt: parts of names of layers kept out of
    int8 or fp8, because they measured sensitive, or a file of that command, whose errors go into the plan.
    fp8_attention: beside "fp8", attention's scores are float8 products as well.
    text_precision: "int8" or "fp8", for the linear layers of the text encoders' blocks, where `precision` never
    reaches; text_exempt: parts of names of layers kept out of it.
    prompt_cache: bytes of device memory to keep prompts in that were seen before, as the network reads them
    (`Pipeline.prompts` counts hits); 0: none.
    capture: "graphs" records every stage once per shape and replays it (CUDA graphs, see `capture`), "auto"
    does so on a GPU where it pays, "off" never does.
    batch_invariant: compute every image alone, so that its bits do not depend on the batch around it.
    memory_budget: bytes, or text like "12GB": what device memory (on a CPU: anonymous memory) the model may take at
    its peak. Chooses what streams and whether decoding is tiled (see `memory_plan`), before anything is loaded.
    largest: (height, width, images) of the largest call it must hold for, default one image of the default size.
    tile: side in pixels of the tiles that larger images are decoded in (see `tiles`); default: whole, or as the
    budget needs.
    preview: folder of an AutoencoderTiny (taef1, taesd3, ...) that calls with preview=True decode with.
    download: fetch a hf:// model (`hub`); nothing else ever opens a connection.
    Raises CheckpointError, ConfigError, DeviceError, OutOfMemoryError.
    """
    asked, target = resolve_sampler(nfe, sampler), resolve_device(device)
    _, dtype = resolve_precision(precision, dtype)
    check_choice("capture", capture, MODES)
    captures = open_captures(capture, target)
    folder = model_folder(model_path(path, download))
    saved = artifact.read(folder) if artifact.is_artifact(folder) else None
    config = asked or (saved["sampler"] if saved else preset(1))
    plan = Plan.from_dict(saved["plan"]) if saved else None
    pairs = None if loras is None else resolve_loras(loras)
    if plan is not None:
        require_same(plan.loras, pairs)
        precisions.require_saved(plan, folder, precision, exempt, fp8_attention)
    checkpoint = _transformer(folder, pairs, plan)
    family = family_of(checkpoint.config)
    kind = resolve_dtype(dtype, target, DTYPES[plan.dtype] if plan else checkpoint.main_dtype())
    how: dict[str, Any] = {} if plan is not None else precisions.resolve(
        folder / "transformer", precision, exempt, fp8_attention, target, kind, free=dtype is None
    )  # fmt: skip
    kind = how.pop("dtype", kind)
    text, vae, sizes = family.open(folder, checkpoint.config)
    text.quantize(text_precision, text_exempt, target, kind)
    times, memory = schedule(config, kind), None
    if tile is not None:
        check_tile(vae.network, tile)
    if (budget := parse_bytes(memory_budget)) is not None:
        if plan is None:
            kinds = {"precision": how.get("precision"), "exempt": how.get("exempt", ())}
        else:
            kinds = {"precision": plan.precision, "exempt": plan.exempt, "saved": True}
        whole = resolve_largest(largest, sizes)
        memory = plan_memory(text, vae, checkpoint, family, times, target, kind, budget, whole, tile, **kinds)
        if captures is not None and captures.strict and (memory.text_streams or memory.streamed):
            raise ConfigError(
                f"capture='graphs' records every stage; blocks stream within memory_budget {memory_budget}, and such "
                "are not recorded: use capture='auto', or a larger budget"
            )
        text.streams, tile, how["streamed"] = memory.text_streams, memory.tile, memory.streamed
    vae.tile = tile
    part: Callable[[str], Callable[[int], None] | None] = lambda name: progress and partial(progress, name)
    with torch.no_grad():
        text.materialize(target, kind, part("text encoder"))
        to = {"device": target, "dtype": kind, "progress": part("transformer")}
        program = _program(checkpoint, family, plan, times, to, how)
        vae.materialize(target, kind, part("vae"))
        pipe = Pipeline(text, program, vae, sizes, config, target, kind, folder, prompt_cache, batch_invariant)
        pipe.memory = memory
        if preview is not None:
            pipe.preview = PreviewDecoder(Path(preview), vae)
            pipe.preview.materialize(target, kind, part("preview"))
    pipe.record(captures if memory is None or target.type == "cuda" else None)  # a CPU's budget counts every byte
    pipe.warm_up()
    if target.type == "cpu":
        library.release_threads()  # calls may come from other threads than this one
        if memory is None:
            keep_freed_memory()
    return pipe


def resolve_largest(largest: tuple[int | None, int | None, int] | None, sizes: SizeRule) -> tuple[int, int, int]:
    """Height, width and images of the largest call, checked; None: the default size, one image of it."""
    if largest is None:
        return (*sizes.resolve(None, None), 1)
    if not isinstance(largest, (tuple, list)) or len(largest) != 3:
        raise ConfigError(f"largest must be (height, width, images), not {largest!r:.80}")
    check_count("images in largest", largest[2])
    return (*sizes.resolve(largest[0], largest[1]), largest[2])


def model_path(path: str | Path, download: bool = False) -> Path:
    """The local folder that `load` takes for `path`."""
    return DEMO if str(path) == "demo" else hub.folder(path, download)


def _transformer(folder: Path, loras: Any, plan: Plan | None) -> Checkpoint:
    """The network's weights, with `loras` merged as they are read; an artifact's have them already."""
    if loras and plan is None:
        return Merged(folder / "transformer", loras)
    return Checkpoint(folder / "transformer", quantized=plan is not None and plan.precision is not None)


def _program(
    checkpoint: Checkpoint, family: Any, plan: Plan | None, times: Schedule, to: dict[str, Any], how: dict[str, Any]
) -> Program:
    """The compiled network: by the passes, or as an artifact's plan has it."""
    if plan is None:
        return compile_network(checkpoint, family, times, **to, **how)
    program = load_program(checkpoint, family, plan, **to)
    program.refold(times)  # refuses another schedule than the saved one
    return program
