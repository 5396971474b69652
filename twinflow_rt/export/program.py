"""Compiles a loaded model into programs that run without Python, by torch.export and AOTInductor.

Networks are traced with the eager references of their ops: plain torch, which becomes generated code and torch's own
kernels. No custom op, packed weight or Triton kernel of this package is left in the file. A program is for one image
size, any number of images and prompts of any length; the sampler's steps are unrolled into it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..checkpoint.atomic import check_target, replacing, scratch_folder
from ..checkpoint.lora import Loras
from ..config import check_callable, check_flag, check_path, check_sides, dtype_name, items, shown
from ..errors import ConfigError, TwinFlowError
from ..loading import load
from ..ops import EAGER
from ..passes.convolutions import fold_upsampling
from ..passes.layers import unpack
from ..pipeline import Pipeline
from ..runtime.host_state import isolated
from ..sampling.sampler import sample
from ..sampling.schedule import SamplerConfig, schedule, steps
from ..stages.stage import StageOptions
from ..stages.text import TextEncoder
from ..stages.tokenizer import MARK
from . import archive
from .archive import TEXT, image_name
from .runtime import Exported

MAX_EVALUATIONS = 8  # each is a copy of the network in the program
TOLERANCE = 1  # of 255 levels
LEAST_TOKENS = 4  # after the fixed beginning: torch.export would specialise a program on lengths of 0 and 1
COMPILER = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    "cpp.dynamic_threads": True,  # as many as the machine that runs it has, not as this one
}


class Generate(nn.Module):
    """The program of one image size: all steps of the sampler and the decoder.

    Takes noise [B, C, h, w], embeds [B, L, D], lengths int64 [B]; then, if the sampler injects noise, what it injects
    [steps - 1, B, C, h, w] float32; then the family's extra inputs [B, P] in the order of their names. Returns pixels,
    uint8 [B, H, W, 3]. Floating point without a dtype here is the pipeline's.
    """

    def __init__(self, pipe: Pipeline, config: SamplerConfig) -> None:
        super().__init__()
        self.network, self.decoder = pipe.program.network, pipe.vae.network
        self.vae, self.config = pipe.vae, config
        self.extras = tuple(sorted(extra_widths(pipe)))
        self.injects = injected_noises(config, pipe.dtype) > 0

    def forward(self, noise: Tensor, embeds: Tensor, lengths: Tensor, *rest: Tensor) -> Tensor:
        noises, extras = rest[: self.injects], dict(zip(self.extras, rest[self.injects :], strict=True))
        context = self.network.encode_context(embeds, lengths, **extras)
        latents = sample(
            lambda x, step: self.network(x, self.network.step_modulation(step), context), noise, self.config,
            noise_fn=lambda step: noises[0][step - 1], project=EAGER.x0_project,
        )  # fmt: skip
        images: Tensor = self.vae.decode_uint8(latents)
        return images


def generator_of(pipe: Pipeline, size: tuple[int, int]) -> Generate:
    """Return the program of images of this size, its network folded for their times."""
    sampler = pipe.sampler_of(None, None, size)
    pipe.program.refold(schedule(sampler, pipe.dtype))
    return Generate(pipe, sampler)


class Encode(nn.Module):
    """The text encoder's program: token ids int64 [B, T], padded on the right by anything, to prompt embeddings
    [B, T - dropped, D]; `dropped` tokens are the fixed beginning of every prompt."""

    def __init__(self, text: TextEncoder) -> None:
        super().__init__()
        self.network, self.text = text.network, text

    def forward(self, ids: Tensor) -> Tensor:
        return self.text.kept(self.network(ids))


def injected_noises(config: SamplerConfig, dtype: torch.dtype) -> int:
    """Return how many noise tensors a program takes for the sampler to inject between steps: one per step but the
    last if any step injects, else 0."""
    plan = steps(config, dtype)
    return len(plan) - 1 if any(step.inject for step in plan[:-1]) else 0


def extra_widths(pipe: Pipeline) -> dict[str, int]:
    """Return the network's further inputs per prompt, beside its embeddings: {name: width}."""
    return {name: tensor.shape[-1] for name, tensor in pipe.text.probe(1).extras.items()}


@isolated()
def export_model(
    model: str | Path, output: str | Path, *, sizes: Sequence[tuple[int, int]] = (), base: str | Path | None = None,
    files: Sequence[str | Path] = (), device: str | None = None, dtype: str | torch.dtype | None = None,
    nfe: int | None = None, sampler: SamplerConfig | str | None = None, loras: Loras | None = None,
    text_encoder: bool = False, options: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda doing: None,
) -> dict[str, Any]:  # fmt: skip
    """Compile a model for use without Python and write it to `output`; return the manifest.

    model, base, files, device, dtype, nfe, sampler, loras: as for `load`; at most 8 evaluations. sizes: (height, width)
    in pixels, one program each; default: the model's own size. text_encoder: whether to export that, too.
    options: settings of torch._inductor. progress(doing) is called before each slow part.

    The code is for the kind of processor it is compiled on. Each program is run beside the model itself and must agree
    with it (at most 1 of 255 levels). The file is there whole or not at all. Raises ConfigError for arguments that
    cannot work, what `load` raises, TwinFlowError where torch cannot compile the model or compiles it wrongly.
    """
    output, text_encoder = check_output(output), check_flag("text_encoder", text_encoder)
    check_callable("progress", progress, ("doing",))
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"options must be a mapping of torch._inductor's settings; got {shown(options)}")
    if (asked := items(sizes)) is None:
        raise ConfigError(f"sizes must be a list of (height, width); got {shown(sizes)}")
    asked = [check_sides("sizes", size) for size in asked]
    progress("loading")
    pipe = load(
        model, base=base, files=files, device=device, dtype=dtype, nfe=nfe, sampler=sampler, loras=loras
    )
    check_exportable(pipe, model, text_encoder)
    use_eager_ops(pipe)
    chosen = tuple(dict.fromkeys(pipe.sizes.resolve(*size) for size in asked or ((None, None),)))
    with scratch_folder(output.parent) as folder:
        partial = folder / "twinflow.pt2"
        writer = archive.Writer(partial)
        for height, width in chosen:
            progress(f"compiling {width}x{height}")
            inputs, shapes = image_inputs(pipe, (height, width))
            program = generator_of(pipe, (height, width))
            compile_into(writer, image_name(height, width), program, inputs, shapes, options)
        if text_encoder:
            progress("compiling the text encoder")
            compile_into(writer, TEXT, Encode(language_model(pipe)), *text_inputs(pipe), options)
            writer.add(archive.TOKENIZER, language_model(pipe).tokenizer.core.to_str().encode())
        manifest = writer.close(facts(pipe, model, chosen, text_encoder))
        progress("comparing")
        compare(pipe, Exported(partial), chosen, text_encoder)
        with replacing(output) as whole:
            os.replace(partial, whole)
    return manifest


def check_output(output: str | Path) -> Path:
    """Return the path to write to; raise ConfigError unless it ends in .pt2 and can be written."""
    output = Path(check_path("output", output))
    if output.suffix != ".pt2":
        raise ConfigError(f"output {shown(str(output))}: the name must end in .pt2")
    check_target(output, "output")
    return output


def check_exportable(pipe: Pipeline, model: str | Path, text_encoder: bool) -> None:
    """Raise ConfigError where a program was saved quantized, has too many evaluations, or has a text stage that is no
    single language model though its encoder is wanted."""
    if (kept := pipe.program.plan.precision) and pipe.program.recipe is None:
        raise ConfigError(f"{model} was saved in {kept}, which cannot be exported; give the folder it came from")
    if len(pipe.program.schedule) > MAX_EVALUATIONS:
        raise ConfigError(
            f"{len(pipe.program.schedule)} evaluations would be that many copies of the network in one program; "
            f"export at most {MAX_EVALUATIONS}"
        )
    if text_encoder:
        language_model(pipe)


def language_model(pipe: Pipeline) -> TextEncoder:
    """Return the text stage; raise ConfigError unless it is one language model."""
    if not isinstance(pipe.text, TextEncoder):
        raise ConfigError(
            f"{type(pipe.text).__name__} is more than one language model and cannot be exported yet: leave the text "
            "encoder out and export prompts with `twinflow-rt encode`"
        )
    return pipe.text


def use_eager_ops(pipe: Pipeline) -> None:
    """Give every network of a loaded pipeline the eager ops and plain weights, in place: those of quantized files are
    dequantized."""
    networks = [pipe.program.network, *(part.network for stage in (pipe.text, pipe.vae) for part in stage.parts)]
    for network in networks:
        network.ops = EAGER
        unpack(network, pipe.dtype)
        fold_upsampling(network, ())
    pipe.text.ops = pipe.vae.ops = EAGER
    pipe.text.options = pipe.vae.options = StageOptions()


def image_inputs(
    pipe: Pipeline, size: tuple[int, int], images: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], Any]:
    """Return example inputs of `Generate` (random prompts of two lengths) and, for torch.export, the axes of each
    that may have any size."""
    generator = torch.Generator().manual_seed(seed)
    batch, multiple = torch.export.Dim("batch", min=1), int(pipe.program.network.prompt_multiple)
    most = max(pipe.text.max_tokens // multiple, 2)
    blocks = min(2, most) if multiple > 1 else min(7, most)
    if has_lengths(pipe):
        tokens: Any = torch.export.Dim("blocks", min=1, max=most)
        tokens = multiple * tokens if multiple > 1 else tokens
        length = multiple * blocks
    else:
        tokens, length = None, pipe.text.probe(1).embeds.shape[1]
    shape = (images, pipe.vae.channels, size[0] // pipe.vae.scale, size[1] // pipe.vae.scale)
    lengths = [length - k if has_lengths(pipe) else length for k in range(images)]

    def normal(*shape: int, dtype: torch.dtype = pipe.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(pipe.device, dtype)

    streams = injected_noises(pipe.sampler, pipe.dtype)
    rest = [(normal(streams, *shape, dtype=torch.float32), {1: batch})] if streams else []
    rest += [(normal(images, width), {0: batch}) for _, width in sorted(extra_widths(pipe).items())]
    inputs = (
        normal(*shape), normal(images, length, pipe.text.width), torch.tensor(lengths, device=pipe.device),
        *(tensor for tensor, _ in rest),
    )  # fmt: skip
    free = {0: batch} if tokens is None else {0: batch, 1: tokens}
    return inputs, ({0: batch}, free, {0: batch}, *([tuple(axes for _, axes in rest)] if rest else []))


def text_inputs(pipe: Pipeline) -> tuple[tuple[Tensor, ...], Any]:
    """Return example inputs of `Encode` and, for torch.export, their axes that may have any size."""
    text = language_model(pipe)
    dropped = text.dropped
    tokens = torch.export.Dim("tokens", min=dropped + LEAST_TOKENS, max=dropped + text.max_tokens)
    ids = torch.arange(2 * (dropped + 5), device=pipe.device).view(2, -1) % text.network.config.vocab_size
    return (ids,), ({0: torch.export.Dim("batch", min=1), 1: tokens},)


def has_lengths(pipe: Pipeline) -> bool:
    """Return whether prompts may differ in length; SD3.5 reads a fixed number of rows."""
    return isinstance(pipe.text, TextEncoder) or not extra_widths(pipe)


def compile_into(
    writer: archive.Writer, name: str, module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any,
    options: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    """Trace and compile `module` and add it to the archive; raise TwinFlowError where torch cannot."""
    module.eval()
    module(*inputs)  # fills tables and caches with values; traced first, they would hold none
    with tempfile.TemporaryDirectory() as folder:
        settings = {**COMPILER, "aot_inductor.output_path": folder, **(options or {})}
        try:
            traced = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
            made: Any = torch._inductor.aot_compile(traced.module(), inputs, options=settings)
        except Exception as error:  # whatever the compiler raises
            reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            raise TwinFlowError(f"torch {torch.__version__} cannot compile {name}: {reason}") from error
        files = [Path(file) for file in made if isinstance(file, str) and file]
        (weights,) = (entry for entry in made if not isinstance(entry, str))
        writer.add_program(name, files, constants_of(weights))


def constants_of(weights: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a compiled program's constants by name, each with the strides that the program reads it by."""
    for name, (tensor, properties) in weights.items():
        yield name, torch.empty_strided(properties.shape, properties.stride, dtype=tensor.dtype).copy_(tensor.detach())


def facts(pipe: Pipeline, model: str | Path, sizes: Sequence[tuple[int, int]], text_encoder: bool) -> dict[str, Any]:
    """Return the manifest's entries (docs/embedding.md) but for those that the archive's writer adds."""
    text = pipe.text
    multiple = int(pipe.program.network.prompt_multiple)
    fixed = None if has_lengths(pipe) else text.probe(1).embeds.shape[1]
    return {
        "twinflow_rt": __version__,
        "torch": torch.__version__,
        "model": "demo" if str(model) == "demo" else Path(model).resolve().name,
        "family": pipe.program.plan.family,
        "loras": [str(lora) for lora in pipe.program.plan.loras],
        "device": pipe.device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "dtype": dtype_name(pipe.dtype),
        "sampler": asdict(pipe.sampler),
        "nfe": len(schedule(pipe.sampler, pipe.dtype)),
        "sizes": [list(size) for size in sizes],
        "latent": {"channels": pipe.vae.channels, "scale": pipe.vae.scale},
        "noise": {"generator": "torch-cpu-per-image", "streams": injected_noises(pipe.sampler, pipe.dtype)},
        "prompt": {
            "width": text.width, "multiple": multiple, "fixed": fixed,
            "max_tokens": fixed or text.max_tokens // multiple * multiple,
            "extras": [[name, width] for name, width in sorted(extra_widths(pipe).items())],
        },
        "output": {"dtype": "uint8", "layout": "NHWC", "channels": 3},
        "text": text_facts(language_model(pipe)) if text_encoder else None,
    }  # fmt: skip


def text_facts(text: TextEncoder) -> dict[str, Any]:
    """Return the manifest's entry on the text encoder. prefix, suffix: what a prompt is written between before it is
    tokenized; None where the family does more than that to it."""
    before, found, after = text.tokenizer.render(MARK).partition(MARK)
    return {
        "vocabulary": text.network.config.vocab_size,
        "dropped": text.dropped,
        "least_tokens": text.dropped + LEAST_TOKENS,
        "max_tokens": text.dropped + text.max_tokens,
        "prefix": before if found else None,
        "suffix": after if found else None,
    }


def compare(pipe: Pipeline, exported: Exported, sizes: Sequence[tuple[int, int]], text_encoder: bool) -> None:
    """Run each exported program beside the model; raise TwinFlowError where they disagree."""
    for size in sizes:
        for images in (1, 2):
            inputs, _ = image_inputs(pipe, size, images, seed=images)
            ours, theirs = generator_of(pipe, size)(*inputs), exported.run(image_name(*size), inputs)
            if (worst := int((ours.int() - theirs.int()).abs().max())) > TOLERANCE:
                raise TwinFlowError(f"the compiled program for {size[1]}x{size[0]} is off by {worst} of 255 levels")
    if text_encoder:
        inputs, _ = text_inputs(pipe)
        ours, theirs = Encode(language_model(pipe))(*inputs).float(), exported.run(TEXT, inputs).float()
        bar = 1e-4 if pipe.dtype == torch.float32 else 3e-2
        if (error := float((ours - theirs).norm() / ours.norm())) > bar:
            raise TwinFlowError(f"the compiled text encoder is off by {error:.1e}, more than {bar:.0e}")
