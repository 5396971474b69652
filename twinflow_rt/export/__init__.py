"""Programs without Python: a model compiled ahead of time into one file that C++ loads (docs/embedding.md).

    program.py   what is traced and compiled: prompt embeddings and noise to pixels, token ids to embeddings
    archive.py   the file: compiled code, weights shared by all sizes, a manifest with the hash of every part
    runtime.py   runs such a file from Python, without the networks of this package

`csrc/embed` runs it from C++; `cli/export.py` is `twinflow-rt export`.
"""
