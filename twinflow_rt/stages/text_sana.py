"""SANA's text stage: Gemma 2 behind an instruction to elaborate on the prompt."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..models.text_encoders import gemma2
from .text import TextEncoder
from .tokenizer import Tokenizer

# SANA's "complex human instruction" (arXiv 2410.10629), word for word: the model was trained behind it
INSTRUCTION = "\n".join((
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
    "image generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
    "relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
    "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
    "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
    "skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional "
    "commentary or evaluations:",
    "User Prompt: ",
))  # fmt: skip


class SanaTokenizer(Tokenizer):
    """The instruction, then the prompt in lower case."""

    def render(self, prompt: str) -> str:
        return INSTRUCTION + prompt.lower().strip()


class SanaText(TextEncoder):
    """The embeddings of the first token and of those from the instruction's last on, at most 300, as in
    diffusers' SanaPipeline; that pads them to 300 and masks, here a prompt has its own length."""

    model = gemma2.MODEL
    tokenizer_class = SanaTokenizer
    max_tokens = 300

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tokenizer.core.no_truncation()
        self.dropped = len(self.tokenizer.core.encode(INSTRUCTION).ids) - 2  # all but its first and last token

    def kept(self, states: Tensor) -> Tensor:
        return torch.cat((states[:, :1], states[:, 1 + self.dropped :]), 1)
