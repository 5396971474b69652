"""`twinflow-rt convert`: weight files under other names become a model folder in diffusers' layout.

A base folder, the released model in diffusers' layout, says what the model is (configs, tokenizer,
scheduler) and provides every network that the given files do not. Each file is recognised by its
names, every key is accounted for, and every shape compared before a byte is written. The folder
appears under its name only when complete and checked by what reads it later.
"""

from .conversion import convert as convert
