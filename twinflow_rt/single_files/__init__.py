"""Weight files under other names than diffusers': which networks they hold.

They are recognised by names and shapes beside a base folder, the released model in diffusers' layout, which says what
the model is. `twinflow-rt convert` writes them in place of the base's networks, `load(base=...)` reads them so.
"""
