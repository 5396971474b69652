"""GenEval-style examination of images of coloured shapes (scipy, from the extra "eval")."""

from .check import Scores, Verdict, check, examine, score
from .detect import Detection, detect
from .sheet import contact_sheet

__all__ = ["Detection", "Scores", "Verdict", "check", "contact_sheet", "detect", "examine", "score"]
