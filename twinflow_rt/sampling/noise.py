"""Per-image noise: image k depends on its own seed, a stream number and a shape, on nothing else.

Values are drawn in float32 on the CPU, one generator per image, then cast and moved. So neither
batch size, nor an image's place in the batch, nor dtype, nor device changes what a seed means.

Stream 0 is the initial latents and seeds the generator with the seed itself: for seeds below 2^32 the values are those
of torch.randn(shape, generator=torch.Generator().manual_seed(seed)). Given a list of seeds, TwinFlow's scripts draw the
same in bfloat16 (for multiples of 16 values, as all real latents have; with torch 2.13: torch 2.11 draws other values
in that dtype). Stream i > 0, the noise that a stochastic sampler injects on reaching its i-th time, seeds with
splitmix64's i-th output for the state `seed`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import check_count, integer, items, shown
from ..errors import ConfigError

MAX_SEED = 2**64 - 1
MAX_BATCH, MAX_SEEDS = 10_000, 10_000_000  # images of one call, and of a list of them
_U32, _U64 = 2**32 - 1, 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of splitmix64


def resolve_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed per image.

    None draws s from the operating system's entropy and continues as for an int; int s gives
    s, s + 1, ..., s + count - 1; a list, tuple, range or array is taken as it is and must hold `count` seeds.
    Seeds are integers in 0..2^64 - 1; anything else (bool, float, negative, ...) is a ConfigError.
    """
    count = check_count("seed count", count)
    if count > MAX_SEEDS:
        raise ConfigError(f"seeds for {shown(count)} images; at most {MAX_SEEDS} are made: ask for fewer")
    if seed is None:
        return _consecutive(secrets.randbelow(2**32 - count), count)
    if (each := items(seed)) is not None:
        if len(each) != count:
            raise ConfigError(f"got {len(each)} seeds for {count} images; pass one per image, or a single integer")
        return [_checked(s) for s in each]
    if isinstance(seed, torch.Generator) and count > 1:
        raise ConfigError(f"one torch.Generator for {count} images: give a list of them, one per image, or an integer")
    return _consecutive(_checked(seed), count)


def check_batch(count: int) -> None:
    """Raises ConfigError for more images than one call takes, before anything is made for each of them."""
    if count > MAX_BATCH:
        raise ConfigError(f"{shown(count)} images in one call; at most {MAX_BATCH} are taken: make several calls")


def initial_noise(
    seeds: Sequence[int], shape_chw: Sequence[int], dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Standard normal latents [len(seeds), *shape_chw], the state at t = 1 (stream 0)."""
    return step_noise(seeds, 0, shape_chw, dtype, device)


def step_noise(
    seeds: Sequence[int], step: int, shape_chw: Sequence[int], dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Standard normal noise [len(seeds), *shape_chw] of stream `step`: see the module docstring.

    For CUDA the draw is pinned and its copy asynchronous, so the caller does not wait.
    """
    pinned = torch.device(device).type == "cuda"
    noise = torch.empty(len(seeds), *shape_chw, dtype=torch.float32, pin_memory=pinned)
    generator = torch.Generator()
    for image, seed in zip(noise, seeds, strict=True):
        image.normal_(generator=generator.manual_seed(stream_seed(seed, step)))
    return noise.to(device=device, non_blocking=pinned).to(dtype)


def stream_seed(seed: int, stream: int) -> int:
    """The 32-bit generator seed of (seed, stream).

    torch's CPU generator reads only 32 bits of its seed, so wider seeds are hashed rather than cut:
    s and s + 2^32 give different images.
    """
    if stream == 0 and seed <= _U32:
        return seed
    return _splitmix64((seed + stream * _GOLDEN) & _U64) >> 32


def _splitmix64(x: int) -> int:
    """The output function of splitmix64 (Steele, Lea and Flood, OOPSLA 2014); integers mod 2^64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _U64
    return x ^ (x >> 31)


def _consecutive(first: int, count: int) -> list[int]:
    _checked(first + count - 1)
    return list(range(first, first + count))


def _checked(seed: object) -> int:
    value = _fresh_seed(seed) if isinstance(seed, torch.Generator) else integer(seed)
    if value is None or not 0 <= value <= MAX_SEED:
        raise ConfigError(f"seed must be an integer from 0 to 2^64 - 1, got {shown(seed)}")
    return value


def _fresh_seed(generator: torch.Generator) -> int:
    """Return the seed of a generator that has drawn nothing yet, and draw, so that it is not taken for fresh again: in
    diffusers the second call with one makes another image."""
    seed, device = generator.initial_seed(), generator.device
    if not torch.equal(generator.get_state(), torch.Generator(device).manual_seed(seed).get_state()):
        raise ConfigError("this torch.Generator has drawn numbers before: make a new one for each call, or give seed=")
    torch.rand(1, generator=generator, device=device)
    return seed
