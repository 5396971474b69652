"""`twinflow-rt convert`: weight files under other names become a model folder in diffusers' layout.

Every key is accounted for before a byte is written; the folder has its name only when complete and checked.
"""

from .conversion import convert as convert
