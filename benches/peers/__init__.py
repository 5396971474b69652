"""This runtime beside its CPU peers: same weights, prompts and seeds, each in a process of its own.

    python -m benches.peers --json benches/records/peers-cpu.json            (from the repository's root)

    cases     demo        the shipped model, a whole image
              medium      a Z-Image of about 150M parameters (random weights), 576 image tokens
              vae         Flux's decoder (Z-Image's), 256x256
              qwen-vae    Qwen-Image's decoder, one frame of 256x256
              medium-256, medium-1024 (when asked for): medium at 256 and at 1024 image tokens
    peers     ours, ours-int8, diffusers, diffusers-compile, openvino; and where the CPU multiplies bfloat16
              (AVX512-BF16, AMX) ours-bf16 and openvino-bf16

Peers stay loaded and idle while one of them runs. In every round each has a turn, in a new order: a pause, then
two calls. The pause is there because threads of OpenMP that have nothing to do spin for milliseconds before they
sleep, and would take a core from whoever comes next. The figure itself is the second call's time: what a server
under load or a batch sees. The first call's, in which threads wake and caches fill, is `after_pause`. Calls of
more than 0.25 s are made once a turn. Before anything is timed, outputs are compared with diffusers eager.
A whole image has a new prompt in every call, so that nothing is answered from a cache of prompts.
`network` is the transformer alone and its rate is stated as a share of the matrix product rate measured
in the same run. First image: from the start of the process, imports included. At the end the goals are
printed and written, each met or missed in this run (`goals.py`); the demo's once more for calls after a pause.
Where an image's time goes: `python -m benches.peers.profile`.

diffusers' Z-Image network does not convert to OpenVINO (complex rotary tables, pad_sequence), so that
peer gets this project's plain torch networks of the same mathematics and weights, at fixed shapes and
with time as a constant, which OpenVINO folds.
"""
