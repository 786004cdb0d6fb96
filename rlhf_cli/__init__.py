"""RLHF from one recipe: supervised fine-tuning, labeling, a reward model, PPO and an honest evaluation."""

__version__ = "0.1.0"
