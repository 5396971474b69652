"""GenEval-style examination of images of coloured shapes (scipy, from the extra "eval")."""

from .check import Scores, Verdict, check, examine, score
from .detect import Detection, detect
from .diversity import diversity, pairwise_distance
from .sheet import contact_sheet

__all__ = [
    "Detection", "Scores", "Verdict", "check", "contact_sheet", "detect", "diversity", "examine",
    "pairwise_distance", "score",
]  # fmt: skip
