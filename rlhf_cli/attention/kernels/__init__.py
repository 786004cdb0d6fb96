"""FlashAttention in Triton over every layout: forward, dK/dV, dQ, the autograd function around them, and decoding.

    schedule    which tiles there are, longest first (torch only)
    tiles       how large a tile is on which head size, and what shared memory that takes (no imports)
    arguments   strides, scales and results that all entry points share (torch only)
    device      what kernels share: loading a tile, products, who sees whom
    forward     output and log-sum-exp
    backward    dK/dV; dQ and dBias
    launch      from tensors to a kernel with its grid, arguments and tile
    function    the backend's differentiable function
    decode      few queries over many keys without a gradient: its two kernels and its function

Importing `device`, `forward`, `backward`, `launch`, `function` or `decode` imports triton; `TRITON_INTERPRET=1` counts
only if it is set before that.
"""
