"""FlashAttention in Triton over every layout: the forward kernel, dK/dV, dQ, and the autograd function around them.

    schedule    which tiles there are, longest first (torch only)
    tiles       how large a tile is on which head size (no imports)
    device      what kernels share: loading a tile, products, who sees whom
    forward     output and log-sum-exp
    backward    dK/dV; dQ and dBias
    function    the backend's function

Importing `device`, `forward`, `backward` or `function` imports triton; `TRITON_INTERPRET=1` counts only if it is set
before that.
"""
