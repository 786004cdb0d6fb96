"""Models: loading, saving, building, quantization, adapters and reward models."""

import logging

# PEFT imports bitsandbytes if it is installed, which then logs missing kernels and every cast of its inputs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
