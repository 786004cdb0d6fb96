"""Models: loading and saving, adapters, reward models, and the roles they play in PPO."""

import logging

# bitsandbytes, which PEFT imports wherever it is installed, logs what kernels it would rather have, and every rounding.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
